"""EAGLE-3 drafts for TINY in the forms that people publish, with every parameter random."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from conftest import TINY
from decode_cases import MARKOV, target_of

from beagle_jax.model.eagle3 import Eagle3Spec, init_eagle3
from beagle_jax.model.layers import RopeScaling
from beagle_jax.weights.draft import Draft

V, D = TINY.vocab_size, TINY.hidden_size
HOT = np.random.default_rng(9).permutation(V)[:40].astype(np.int32)
# Moderate weights: float32 error of two summation orders then stays well below the tolerances.
PLAIN = replace(
    Eagle3Spec.from_target(TINY, init_std=0.15), state_layers=(0, 1, 2), draft_vocab_size=len(HOT)
)
SPECS = {
    "SafeAILab": PLAIN,
    "speculators": replace(
        PLAIN,
        norm_before_residual=True,
        norm_before_fc=True,
        norm_output=True,
        qk_norm=True,
        attention_bias=True,
        state_layers=(0, 2),
    ),
    "narrow": replace(
        PLAIN,
        hidden_size=24,
        num_heads=6,
        num_kv_heads=3,
        own_embedding=True,
        fc_norm=True,
        fc_bias=True,
        rope_scaling=RopeScaling(2.0),
        rms_norm_eps=1e-3,
    ),
    "the target's head": replace(PLAIN, own_head=False),
}


def random_params(spec: Eagle3Spec, seed: int = 0) -> dict[str, jax.Array]:
    """Norms near one and biases near zero, so that each of them matters."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(
            np.asarray(array)
            + np.float32(0.3) * rng.standard_normal(array.shape) * (array.ndim == 1)
        )
        for name, array in init_eagle3(spec, jax.random.key(seed)).items()
    }


def random_eagle3(name: str = "SafeAILab") -> Draft:
    """A draft that is nearly always wrong."""
    spec = SPECS[name]
    return Draft(spec, random_params(spec), jnp.asarray(HOT), {})


def right_eagle3(error: float = 0.0) -> Draft:
    """The draft of a MARKOV target: right nearly always, or with `error` > 0 misled now and then by
    features and by entries before.

    An entry attends to entries of its own token, whose values are the token's embedding.
    """
    spec = replace(Eagle3Spec.from_target(MARKOV, init_std=0.3), num_heads=4, num_kv_heads=4)
    params = init_eagle3(spec, jax.random.key(2))
    alone_DI = jnp.concatenate([jnp.eye(D), jnp.zeros((D, D))], axis=1)
    params |= {name: error * params[name] for name in ("fc", "down_proj")}
    params |= {"q_proj": 12 * alone_DI, "k_proj": 12 * alone_DI, "v_proj": alone_DI}
    params |= {"o_proj": jnp.eye(D), "head_VD": target_of(MARKOV).params["head_VD"]}
    return Draft(spec, params, None, {})

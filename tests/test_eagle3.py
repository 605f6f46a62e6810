"""The EAGLE-3 block against method.md 14 in plain torch, in every published form."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY
from eagle3_cases import PLAIN, SPECS, D, random_params
from eagle3_oracle import features, simulated, weights

from beagle_jax.config import DraftConfig
from beagle_jax.errors import UserError
from beagle_jax.model.eagle3 import Eagle3Block, Eagle3Spec, init_eagle3
from beagle_jax.model.kinds import new_spec
from beagle_jax.model.masks import causal_mask

ROW = 7


def row_of(spec: Eagle3Spec) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [L, d] and streams [L, I] of one row."""
    rng = np.random.default_rng(1)
    width = D * len(spec.state_layers)
    return tuple(
        rng.standard_normal((ROW, size)).astype(np.float32) for size in (spec.hidden_size, width)
    )


def expected(spec: Eagle3Spec, params, e_LD, taps_LI, bug: str = "") -> np.ndarray:
    """The outputs [L - 1, d] of the first step, which are those of whole rows."""
    with torch.no_grad():
        e_LD, streams = torch.tensor(e_LD).double(), torch.tensor(taps_LI).double().split(D, -1)
        made = simulated(weights(params), spec, e_LD, list(streams), 1, bug)
        return torch.stack([made[j, 1] for j in range(ROW - 1)]).numpy()


def run(spec: Eagle3Spec, params, e_LD, taps_LI) -> jax.Array:
    mask_BTT = causal_mask(jnp.array([ROW - 1]), ROW - 1)
    row = Eagle3Block(spec).apply(
        {"params": params}, e_LD[None], taps_LI[None], mask_BTT, method="row"
    )
    return row[0]


@pytest.mark.parametrize("name", SPECS)
def test_the_block_is_that_of_torch(name):
    spec = SPECS[name]
    params, (e_LD, taps_LI) = random_params(spec), row_of(spec)
    assert {key: array.shape for key, array in params.items()} == spec.param_shapes()
    np.testing.assert_allclose(
        run(spec, params, e_LD, taps_LI),
        expected(spec, params, e_LD, taps_LI),
        rtol=1e-4,
        atol=1e-4,
    )


SWITCHES = {
    "norm_before_residual": "speculators",
    "norm_before_fc": "speculators",
    "qk_norm": "speculators",
    "attention_bias": "speculators",
    "fc_norm": "narrow",
    "fc_bias": "narrow",
    "rope_scaling": "narrow",
}


@pytest.mark.parametrize("bug", [*SWITCHES, "feature first", "the residual is the embedding"])
def test_planted_bugs(bug):
    """A switch that is ignored, and parts in other places."""
    spec = SPECS[SWITCHES.get(bug, "SafeAILab")]
    params, (e_LD, taps_LI) = random_params(spec), row_of(spec)
    off = None if bug == "rope_scaling" else False
    other = replace(spec, **{bug: off}) if bug in SWITCHES else spec
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            run(spec, params, e_LD, taps_LI),
            expected(other, params, e_LD, taps_LI, bug),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("name", SPECS)
def test_head_norm_and_embedding(name):
    """What the head reads, and whose head and embedding they are."""
    spec, params = SPECS[name], random_params(SPECS[name])
    x_MD = np.random.default_rng(2).standard_normal((3, spec.hidden_size)).astype(np.float32)
    size_M1 = np.sqrt((x_MD**2).mean(-1, keepdims=True) + spec.rms_norm_eps)
    normed_MD = x_MD / size_M1 * np.asarray(params["norm"])
    np.testing.assert_allclose(spec.final_norm(params, x_MD), normed_MD, rtol=1e-5)
    targets_VD = jnp.zeros((5, D))
    assert (spec.head(params, targets_VD) is targets_VD) != spec.own_head
    assert (spec.embedding(params, targets_VD) is targets_VD) != spec.own_embedding
    block = Eagle3Block(spec).bind({"params": params})
    carried_MD = normed_MD if spec.norm_output else x_MD
    np.testing.assert_allclose(block.carried(x_MD), carried_MD, rtol=1e-5)


def test_features_stand_in_the_order_of_the_layers():
    spec, params = PLAIN, random_params(PLAIN)
    taps_LI = row_of(spec)[1]
    streams = [torch.tensor(taps_LI).double()[:, D * n : D * (n + 1)] for n in range(3)]
    found_LD = Eagle3Block(spec).apply({"params": params}, taps_LI[None], method="features")[0]
    with torch.no_grad():
        in_order, backwards = (
            features(weights(params), spec, order).numpy() for order in (streams, streams[::-1])
        )
    np.testing.assert_allclose(found_LD, in_order, atol=1e-5)
    assert np.abs(found_LD - backwards).max() > 0.1


def test_parameters_of_the_published_shape():
    """Of a draft for Llama-3.1-8B with 32,000 tokens, without the embedding: W_fc 4096 x 12288,
    q, k and v over 8,192, and a head of 32,000 rows.
    """
    spec = Eagle3Spec.from_target(
        replace(
            TINY,
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
        )
    ).scoring(32000)
    assert spec.taps == (2, 16, 29)
    by_hand = 4096 * 12288 + (4096 + 2 * 1024) * 8192 + 4096 * 4096 + 3 * 4096 * 14336
    by_hand += 32000 * 4096 + 4 * 4096
    shapes = jax.eval_shape(lambda: init_eagle3(spec, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == by_hand


@pytest.mark.parametrize(
    ("layers", "taps"),
    [(32, (2, 16, 29)), (28, (2, 14, 25)), (7, (2, 3, 4)), (6, (2, 3)), (2, (1, 2)), (0, (0,))],
)
def test_the_layers_that_it_reads(layers, taps):
    """2, L // 2, L - 3; below seven layers some coincide."""
    assert Eagle3Spec.from_target(replace(TINY, num_layers=layers)).taps == taps


def test_the_layers_that_a_config_names():
    spec = new_spec(DraftConfig(kind="eagle3", state_layers=(0, 2)), TINY)
    assert spec.taps == (0, 2) and spec.param_shapes()["fc"] == (D, 2 * D)
    with pytest.raises(UserError, match=r"draft.state_layers is \[1, 3\], but .* streams 0 to 2"):
        new_spec(DraftConfig(kind="eagle3", state_layers=(1, 3)), TINY)

"""Beagle drafts for TINY that read several layers, with every parameter random."""

from dataclasses import replace

import jax
import numpy as np
from conftest import TINY

from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.weights.draft import Draft

D = TINY.hidden_size
# More heads than the target has, of another width, and an MLP of its own.
SPEC = replace(
    BeagleSpec.from_target(TINY, init_std=0.15),
    state_layers=(0, 1),
    num_heads=6,
    num_kv_heads=6,
    head_dim=10,
    intermediate_size=40,
)


def random_params(spec: BeagleSpec = SPEC, seed: int = 0) -> dict[str, jax.Array]:
    """The projections of streams, which start at zero, are random too."""
    rng = np.random.default_rng(seed)
    params = init_draft(spec, jax.random.key(seed))
    more = {name: params[name].shape for name in ("k_layers", "v_layers") if name in params}
    return params | {
        name: jax.numpy.asarray(0.15 * rng.standard_normal(shape), "float32")
        for name, shape in more.items()
    }


def random_layers_draft(seed: int = 1, hot_ids=None) -> Draft:
    """A draft that is nearly always wrong."""
    return Draft(SPEC, random_params(seed=seed), hot_ids, {})

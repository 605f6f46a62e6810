"""Drafts of every kind learn the same from a float16 target as from a float32 one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY, random_params
from eagle3_cases import PLAIN
from step_cases import CLEAN, EARLY, SPEC, L

from beagle_jax.config import TestTimeStage
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.states import target_states
from beagle_jax.data.template import Row
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.model.kinds import fresh_params
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.step import make_steps

TEST_TIME = TestTimeStage(steps=10, learning_rate=1e-3, warmup=0, simulation_steps=2)
KINDS = {
    "beagle, several layers": (dataclasses.replace(SPEC, state_layers=(0, 1)), EARLY),
    "eagle": (EagleSpec.from_target(TINY), TEST_TIME),
    "eagle3": (dataclasses.replace(PLAIN, draft_vocab_size=None, own_head=False), TEST_TIME),
}
# float16 has 11 bits; of the losses here, near 4, it moves the fourth digit.
TOLERANCE = 2e-3


def rows() -> list[Row]:
    rng = np.random.default_rng(2)
    return [
        Row(rng.integers(0, TINY.vocab_size, length).tolist(), [n >= 3 for n in range(length)])
        for length in (14, 9, 6)
    ]


def losses(kind: str, states: str | None, folder, dtype, begin: int = 0) -> np.ndarray:
    """Losses and the gradient's norm of a first step. states: how they are stored; None: online."""
    spec, stage = KINDS[kind]
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(TINY, std=0.2))
    stored = states and target_states(
        params, TINY, rows(), folder / f"{states}-{dtype.__name__}", states, spec.taps
    )
    loader = BatchLoader(rows(), stored, batch=3, row_tokens=L, seed=0, taps=spec.taps)
    batch = loader.batch_at(0)
    if begin:
        batch = batch._replace(tokens_BL=np.roll(batch.tokens_BL, begin, axis=1))
    frozen = FrozenTarget(params["embed_VD"], params["embed_VD"], params, TINY)
    step, _, init = make_steps(spec, CLEAN, stage, ONE_DEVICE)
    _, metrics = step(init(fresh_params(spec, jax.random.key(1))), frozen, batch, 0)
    return np.array([metrics.objective, metrics.ploss, metrics.grad_norm])


@pytest.mark.parametrize("states", ["float32", None], ids=["stored", "online"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_float16_target_teaches_what_a_float32_target_teaches(kind, states, tmp_path):
    exact = losses(kind, states, tmp_path, jnp.float32)
    half = losses(kind, states, tmp_path, jnp.float16)
    assert np.isfinite(half).all() and (half != exact).any()
    np.testing.assert_allclose(half, exact, rtol=TOLERANCE)


def test_planted_bug_tokens_one_place_late(tmp_path):
    exact = losses("eagle", None, tmp_path, jnp.float32)
    late = losses("eagle", None, tmp_path, jnp.float16, begin=1)
    assert np.abs(late / exact - 1).max() > 10 * TOLERANCE

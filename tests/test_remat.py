"""`train.remat`: the same values and gradients from less memory, in every stage."""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY
from step_cases import EARLY, LATE, NOISY, SPEC, quick_jit, three_rows

from beagle_jax.config import TestTimeStage
from beagle_jax.data.loader import Batch
from beagle_jax.model.draft import LayerBlock
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.model.kinds import fresh_params
from beagle_jax.training import positions, predicting
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.kinds import objective_of
from beagle_jax.training.step import stage_loss

TEST_TIME = TestTimeStage(steps=10, simulation_steps=2)
CASES = {
    "early": (SPEC, EARLY),
    "late": (SPEC, LATE),
    "late, many offsets": (SPEC, LATE.changed(multi_token=True)),
    "eagle": (EagleSpec.from_target(TINY), TEST_TIME),
}


@lru_cache
def gradient_of(case: str, remat: str):
    spec, stage = CASES[case]
    config = NOISY.changed(remat=remat)

    def loss(params, *rest):
        objective = objective_of(spec, stage)
        return stage_loss(params, spec, config, stage, objective, *rest, ONE_DEVICE)

    return jax.value_and_grad(loss, has_aux=True)


def graded(case: str, remat: str, tiny_params):
    table_VD = tiny_params["embed_VD"]
    of = (FrozenTarget(table_VD, table_VD), three_rows(3, 0, 1), jax.random.key(4))
    params = fresh_params(CASES[case][0], jax.random.key(0))
    (value, _), gradient = quick_jit(gradient_of(case, remat))(params, *of)
    return value, gradient


def same(plain, other) -> None:
    np.testing.assert_allclose(plain[0], other[0], rtol=1e-6)
    for name, gradient in plain[1].items():
        size = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(other[1][name], gradient, rtol=0, atol=1e-5 * size, err_msg=name)


@pytest.fixture
def few_at_once(monkeypatch) -> None:
    """Four positions of each row at once: rows of 14 are four chunks, the last one padded."""
    monkeypatch.setattr(predicting, "AT_ONCE", 12)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if case == "late, many offsets" else [])
        for case in CASES
    ],
)
def test_the_same_loss_and_gradients(case, tiny_params, few_at_once):
    same(graded(case, "none", tiny_params), graded(case, "block", tiny_params))


def test_planted_bug_a_gradient_that_loses_a_chunk(tiny_params, few_at_once, monkeypatch):
    right = jax.lax.scan

    def wrong(function, total, of):
        return right(function, total, jax.tree.map(lambda x: x.at[0].set(0), of))

    plain = graded("early", "none", tiny_params)
    monkeypatch.setattr(positions.jax.lax, "scan", wrong)
    gradient_of.cache_clear()
    with pytest.raises(AssertionError):
        same(plain, graded("early", "block", tiny_params))
    gradient_of.cache_clear()


def temporaries(case: str, remat: str, width: int) -> int:
    """Bytes of temporaries of the compiled gradient; nothing runs."""
    spec, shape = CASES[case][0], jax.ShapeDtypeStruct
    params = {name: shape(size, jnp.float32) for name, size in spec.param_shapes().items()}
    table = shape((8, spec.hidden_size), jnp.float32)
    ints = [shape(size, jnp.int32) for size in ((1, width), (1, 1), (1, 1))]
    states = shape((1, width, spec.hidden_size), jnp.float32)
    batch = Batch(ints[0], states, shape((1, width), bool), *ints[1:])
    key = jax.eval_shape(jax.random.key, 0)
    lowered = jax.jit(gradient_of(case, remat)).lower(
        params, FrozenTarget(table, table), batch, key
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("case", ["early", "late"])
def test_less_memory(case, monkeypatch):
    monkeypatch.setattr(predicting, "AT_ONCE", 64)
    wide = replace(SPEC, intermediate_size=2048)
    monkeypatch.setitem(CASES, case, (wide, CASES[case][1]))
    gradient_of.cache_clear()
    plain, less = (temporaries(case, remat, 768) for remat in ("none", "block"))
    gradient_of.cache_clear()
    # Three activations of 768 x 2048 float32 are 19 MB.
    assert plain - less > 12e6, (plain, less)


def test_the_setting_reaches_the_block(tiny_params, few_at_once, monkeypatch):
    """Without remat the block predicts all positions at once, with it four of each row."""
    seen, right, params = [], LayerBlock.predict, fresh_params(SPEC, jax.random.key(0))

    def predict(self, e_BTD, attended):
        seen.append(e_BTD.shape[1])
        return right(self, e_BTD, attended)

    monkeypatch.setattr(LayerBlock, "predict", predict)
    for remat in ("none", "block"):
        seen.clear()
        gradient_of.cache_clear()
        jax.eval_shape(
            gradient_of("early", remat),
            params,
            FrozenTarget(*[tiny_params["embed_VD"]] * 2),
            three_rows(3, 0, 1),
            jax.random.key(4),
        )
        assert set(seen) == {14 if remat == "none" else 4}
    gradient_of.cache_clear()

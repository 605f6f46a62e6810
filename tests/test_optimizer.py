"""Learning rates, clipping, moments and weight decay of the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError
from step_cases import CLEAN, EARLY

from beagle_jax.config import EarlyStage, StageConfig
from beagle_jax.training import step
from beagle_jax.training.step import make_optimizer

# Schedule and clipping


def learning_rates(stage: StageConfig, steps: int) -> list[float]:
    """Reads the learning rates off the updates.

    Adam turns a constant gradient into exactly the learning rate.
    """
    optimizer, params = make_optimizer(CLEAN, stage), {"w": jnp.zeros(1)}
    state, rates = optimizer.init(params), []
    for _ in range(steps):
        updates, state = optimizer.update({"w": jnp.full(1, 0.25)}, state, params)
        rates.append(-float(updates["w"][0]))
    return rates


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (
            EarlyStage(steps=8, learning_rate=0.4, warmup=4),
            [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4],
        ),
        (EarlyStage(steps=8, learning_rate=0.4, warmup=0), [0.4] * 8),
        (
            EarlyStage(steps=6, learning_rate=0.4, warmup=2, schedule="cosine"),
            [0.2, 0.4, 0.4, 0.341421, 0.2, 0.058579],
        ),
        (
            EarlyStage(steps=4, learning_rate=0.4, warmup=0, schedule="cosine"),
            [0.4, 0.341421, 0.2, 0.058579],
        ),
        (
            EarlyStage(steps=7, learning_rate=0.4, warmup=2, schedule="wsd", decay=4),
            [0.2, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1],
        ),
        (
            EarlyStage(steps=10, learning_rate=0.4, warmup=0, schedule="wsd"),
            [0.4] * 8 + [0.4, 0.2],
        ),
    ],
)
def test_warm_up_then_constant_cosine_or_a_linear_end(stage, expected):
    np.testing.assert_allclose(learning_rates(stage, len(expected)), expected, atol=1e-5)


def test_no_update_of_a_stage_has_a_rate_of_zero():
    """Nor with several batches an update, where the warm-up counts batches."""
    stage = EarlyStage(steps=12, learning_rate=0.4, warmup=6, schedule="cosine")
    for accumulate in (1, 2, 3):
        rate = step.learning_rates(stage)
        rates = [float(rate(before, accumulate)) for before in range(0, 12, accumulate)]
        assert min(rates) > 0.0 and max(rates) == pytest.approx(0.4)
        assert rates[0] == pytest.approx(0.4 * accumulate / 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 3}, "decay is 3, but schedule is constant"),
        ({"decay": 8, "schedule": "wsd"}, "decay is 8 batches, but only 7 of steps = 9 come after"),
        ({"warmup": 9, "schedule": "wsd"}, "decay is 1 batches, but only 0 of steps = 9"),
    ],
)
def test_an_end_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        EarlyStage(**{"steps": 9, "warmup": 2} | settings)


def clipped(gradient: dict, clip_norm: float) -> dict:
    """Reads the gradient that Adam receives off its first moment."""
    optimizer = make_optimizer(CLEAN.changed(clip_norm=clip_norm), EARLY)
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    (moments,) = [
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(leaf, "mu")
    ]
    return {name: moment / (1 - CLEAN.beta1) for name, moment in moments.mu.items()}


def check_clipped(actual: dict, expected: dict) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, err_msg=name)


def test_clipping_is_by_the_norm_of_all_tensors_together():
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # norm 5
    check_clipped(clipped(gradient, 0.5), {"a": [0.3, 0.0], "b": [[0.4]]})
    check_clipped(clipped(gradient, 6.0), gradient)
    # Clipped by value, and by tensor.
    for wrong in (
        {"a": [0.5, 0.0], "b": [[0.5]]},
        {"a": [0.3, 0.0], "b": [[0.5]]},
    ):
        with pytest.raises(AssertionError):
            check_clipped(clipped(gradient, 0.5), wrong)


def test_moments_and_weight_decay_are_the_config_s():
    config = CLEAN.changed(beta1=0.5, beta2=0.75, weight_decay=0.1, clip_norm=100.0)
    optimizer, params = (
        make_optimizer(config, EarlyStage(steps=2, learning_rate=0.1, warmup=0)),
        {"w": jnp.array([[2.0]]), "norm": jnp.array([2.0])},
    )

    def gradient(value: float) -> dict[str, jax.Array]:
        return {"w": jnp.array([[value]]), "norm": jnp.array([value])}

    state = optimizer.init(params)
    _, state = optimizer.update(gradient(1.0), state, params)
    updates, _ = optimizer.update(gradient(3.0), state, params)
    mean, variance = (0.25 * 1 + 0.5 * 3) / 0.75, (0.25 * 0.75 * 1 + 0.25 * 9) / (1 - 0.75**2)
    step_of = mean / variance**0.5
    np.testing.assert_allclose(updates["w"], [[-0.1 * (step_of + 0.1 * 2)]], rtol=1e-5)
    np.testing.assert_allclose(updates["norm"], [-0.1 * step_of], rtol=1e-5)  # not decayed


def test_muon_decays_no_norm_weight_either():
    config = CLEAN.changed(weight_decay=0.5, optimizer="muon")
    optimizer = make_optimizer(config, EarlyStage(steps=2, learning_rate=0.1, warmup=0))
    params = {"w": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], np.full((2, 2), -0.05), rtol=1e-5)
    np.testing.assert_array_equal(updates["norm"], [0.0, 0.0])

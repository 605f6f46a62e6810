"""Learning rates, clipping, moments and weight decay of the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_cases import CLEAN, EARLY

from beagle_jax.config import EarlyStage, StageConfig
from beagle_jax.training.step import (
    make_optimizer,
)

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
            [0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4],
        ),
        (EarlyStage(steps=8, learning_rate=0.4, warmup=0), [0.4] * 8),
        (
            EarlyStage(steps=6, learning_rate=0.4, warmup=2, schedule="cosine"),
            [0.0, 0.2, 0.4, 0.341421, 0.2, 0.058579, 0.0, 0.0],
        ),
        (
            EarlyStage(steps=4, learning_rate=0.4, warmup=0, schedule="cosine"),
            [0.4, 0.341421, 0.2, 0.058579, 0.0, 0.0],
        ),
    ],
)
def test_warm_up_then_constant_or_cosine(stage, expected):
    np.testing.assert_allclose(learning_rates(stage, len(expected)), expected, atol=1e-5)


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
        {"w": jnp.array([2.0])},
    )
    state = optimizer.init(params)
    _, state = optimizer.update({"w": jnp.array([1.0])}, state, params)
    updates, _ = optimizer.update({"w": jnp.array([3.0])}, state, params)
    mean, variance = (0.25 * 1 + 0.5 * 3) / 0.75, (0.25 * 0.75 * 1 + 0.25 * 9) / (1 - 0.75**2)
    np.testing.assert_allclose(updates["w"], [-0.1 * (mean / variance**0.5 + 0.1 * 2)], rtol=1e-5)

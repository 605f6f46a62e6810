"""Gradient accumulation: uneven micro-batches equal the big batch, also after an interruption."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY
from loop_cases import (
    Breaking,
    config_for,
    infinite_state,
    loader_of,
    same_params,
    saved_steps,
    train_stage,
)

from beagle_jax.config import EarlyStage, LateStage, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.errors import UserError
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.training.step import make_optimizer, make_steps, updated

pytestmark = pytest.mark.usefixtures("shared_steps")

SPEC = BeagleSpec.from_target(TINY, init_std=0.3)
# No noise and windows of one: a row's part of the objective then depends on nothing but the row.
EARLY = EarlyStage(steps=12, learning_rate=1e-3, warmup=0, window=1)
CONFIG = TrainConfig(
    batch=2, row_tokens=10, loss_rows=8, noise="none", early=EARLY, late=LateStage(steps=0)
)


@pytest.fixture(scope="module")
def six_rows() -> Batch:
    """Makes rows with 7, 1, 2, 1, 8 and 3 supervised tokens: micro-batches of 8, 3 and 11."""
    rng = np.random.default_rng(4)
    counted_BT = np.arange(10) < np.array([7, 1, 2, 1, 8, 3])[:, None]
    states_BLD = rng.standard_normal((6, 10, TINY.hidden_size)).astype(np.float32)
    tokens_BL = rng.integers(0, TINY.vocab_size, (6, 10)).astype(np.int32)
    return Batch(
        tokens_BL, states_BLD, counted_BT, np.full((6, 1), 10, np.int32), np.zeros((6, 1), np.int32)
    )


@lru_cache
def steps_of(config: TrainConfig):
    return make_steps(SPEC, config, EARLY, ONE_DEVICE)


def one_update(
    config: TrainConfig, batches: list[Batch], frozen, steps_of=steps_of
) -> tuple[dict, float]:
    """Returns parameters and gradient norm after these batches, from the same start."""
    step, _, init = steps_of(config)
    state = init(init_draft(SPEC, jax.random.key(1)))
    for batch in batches:
        state, metrics = step(state, frozen, batch, 42)
    return state.params, float(metrics.grad_norm)


def micro(batch: Batch) -> list[Batch]:
    return [jax.tree.map(lambda x, at=first: x[at : at + 2], batch) for first in (0, 2, 4)]


def check_equal(whole, accumulated) -> None:
    np.testing.assert_allclose(accumulated[1], whole[1], rtol=1e-5)
    for name, array in whole[0].items():
        np.testing.assert_allclose(accumulated[0][name], array, atol=1e-5, err_msg=name)


def test_uneven_micro_batches_equal_the_big_batch(frozen, six_rows):
    whole = one_update(CONFIG.changed(batch=6), [six_rows], frozen)
    check_equal(whole, one_update(CONFIG.changed(accumulate=3), micro(six_rows), frozen))


def test_planted_bug_a_mean_of_means(frozen, six_rows, monkeypatch):
    """Each micro-batch is divided by its own count, as in usual accumulation."""
    right = updated

    def wrong(state, gradient, supervised, *rest):
        return right(state, jax.tree.map(lambda x: x / supervised, gradient), jnp.int32(1), *rest)

    whole = one_update(CONFIG.changed(batch=6), [six_rows], frozen)
    monkeypatch.setattr("beagle_jax.training.step.updated", wrong)
    with pytest.raises(AssertionError):
        check_equal(
            whole,
            one_update(CONFIG.changed(accumulate=3), micro(six_rows), frozen, steps_of.__wrapped__),
        )


def test_weights_wait_for_the_last_batch(frozen, six_rows):
    step, _, init = steps_of(CONFIG.changed(accumulate=3))
    start = init_draft(SPEC, jax.random.key(1))
    state, moved = init(start), []
    for batch in micro(six_rows):
        state, _ = step(state, frozen, batch, 42)
        moved.append(float(jnp.abs(state.params["q_proj"] - start["q_proj"]).max()))
        assert (float(jnp.abs(state.opt_state.gradient["q_proj"]).max()) > 0) == (len(moved) < 3)
    assert moved[:2] == [0, 0] and moved[2] > 0
    assert int(state.step) == 3 and int(state.opt_state.supervised) == 0


def test_a_run_stopped_between_two_updates_goes_on_exactly(tmp_path, frozen):
    """Checkpoints after 2, 4, .. batches hold a sum of gradients: every third batch updates."""

    def accumulated(config):
        more = dict(accumulate=3, checkpoint_every=2, late=LateStage(steps=0))
        return config.changed(train=config.train.changed(**more))

    training = loader_of(20, 1)

    def run(config, loader):
        start = init_draft(SPEC, jax.random.key(3))
        return train_stage(config, frozen, loader, params=start)

    whole = run(accumulated(config_for(tmp_path / "whole")), training)

    class Stopping:
        """A loader that is interrupted before the sixth batch."""

        steps_per_epoch, padding = training.steps_per_epoch, training.padding

        def batch_at(self, step: int) -> Batch:
            if step == 5:
                raise KeyboardInterrupt
            return training.batch_at(step)

    cut = accumulated(config_for(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        run(cut, Stopping())
    assert 4 in saved_steps(cut)
    # It is the second of the update's three batches.
    with pytest.raises(UserError, match="early stage, step 5: the loss is"):
        run(cut, Breaking(loader_of(20, 1), 4, infinite_state))
    assert saved_steps(cut)[-1] == 4
    same_params(run(cut, training), whole)


def test_the_schedule_counts_batches(frozen):
    """Every third batch changes the weights, with the learning rate of that many batches."""
    stage = EarlyStage(steps=12, learning_rate=0.6, warmup=6)
    optimizer, params, rates = (
        make_optimizer(CONFIG.changed(accumulate=3), stage),
        {"w": jnp.zeros(1)},
        [],
    )
    state = optimizer.init(params)
    for _ in range(4):
        updates, state = optimizer.update({"w": jnp.full(1, 0.25)}, state, params)
        rates.append(-float(updates["w"][0]))
    np.testing.assert_allclose(rates, [0.3, 0.6, 0.6, 0.6], atol=1e-5)

"""`train.ema`: the moving average of the weights, what is measured and exported of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE
from loop_cases import (
    SPEC,
    Breaking,
    config_for,
    interrupt,
    lines_of,
    loader_of,
    same_params,
    train_stage,
)
from step_cases import EARLY, NOISY, three_rows

from beagle_jax.model.beagle import init_draft
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.step import averaged, exported, make_steps

pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.fixture
def frozen(tiny_params) -> FrozenTarget:
    return FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"])


def states_of(steps: int, frozen: FrozenTarget, **changes) -> list:
    """Returns the states after each step, from the same first weights."""
    train_step, _, init = make_steps(SPEC, NOISY.changed(**changes), EARLY, ONE_DEVICE)
    state, states = init(init_draft(SPEC, jax.random.key(3))), []
    for _ in range(steps):
        state, _ = train_step(state, frozen, three_rows(3, 3, 3), 42)
        states.append(jax.tree.map(jnp.copy, state))
    return states


def averages(params: list[dict], decay: float) -> dict:
    """Averages by hand: the decay grows with the number of updates."""
    ema = init_draft(SPEC, jax.random.key(3))
    for number, new in enumerate(params, 1):
        keep = min(decay, (1 + number) / (10 + number))
        ema = {name: keep * ema[name] + (1 - keep) * new[name] for name in ema}
    return ema


def check_average(actual: dict, expected: dict) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("decay", [0.2, 0.9])
def test_it_averages_the_weights_after_each_update_and_changes_none_of_them(frozen, decay):
    states, plain = states_of(4, frozen, ema=decay), states_of(4, frozen)
    same_params(states[-1].params, plain[-1].params)
    params = [state.params for state in states]
    check_average(exported(states[-1]), averages(params, decay))
    before = [init_draft(SPEC, jax.random.key(3)), *params[:-1]]
    with pytest.raises(AssertionError):  # planted: the weights before the update
        check_average(exported(states[-1]), averages(before, decay))
    assert exported(plain[-1]) is plain[-1].params


def test_batches_that_only_add_up_do_not_move_it(frozen):
    states = states_of(4, frozen, ema=0.5, accumulate=2)
    same_params(states[0].ema, init_draft(SPEC, jax.random.key(3)))
    same_params(states[2].ema, states[1].ema)
    check_average(states[3].ema, averages([states[1].params, states[3].params], 0.5))


def test_without_the_setting_there_is_none():
    params = {"w": jnp.ones(2)}
    assert averaged(None, params, jnp.int32(1), NOISY) is None


def test_a_stage_returns_measures_and_resumes_the_average(frozen, tmp_path):
    config, plain = config_for(tmp_path / "a", ema=0.5), config_for(tmp_path / "b")
    held_out = loader_of(8, 2)
    whole = train_stage(config, frozen, held_out=held_out)
    last = train_stage(plain, frozen, held_out=held_out)
    with pytest.raises(AssertionError):
        same_params(whole, last)
    losses = [
        [line["loss"] for line in lines_of(of) if line.get("split") == "held_out"]
        for of in (config, plain)
    ]
    assert losses[0] != losses[1]
    cut = config_for(tmp_path / "cut", ema=0.5)
    with pytest.raises(KeyboardInterrupt):
        train_stage(cut, frozen, Breaking(loader_of(20, 1), 8, interrupt))
    same_params(train_stage(cut, frozen), whole)

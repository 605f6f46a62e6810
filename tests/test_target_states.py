"""The target's states on disk equal a direct forward, are made once, and are never mixed up."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from test_loader import rows_of_lengths

from beagle_jax import files
from beagle_jax.data import states
from beagle_jax.data.states import target_states
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward

# States

# Padded to 64, 32, 32, 96 and 32 positions.
STATE_ROWS = rows_of_lengths(40, 3, 1, 70, 3)
direct_forward = jax.jit(forward, static_argnums=1)


def check_states(row_states, rows, params) -> None:
    """Checks that the states are those of each row alone, unpadded."""
    for row, states_LD in zip(rows, row_states, strict=True):
        length = len(row.tokens)
        positions = jnp.arange(length)[None]
        direct = direct_forward(
            params,
            TINY,
            jnp.asarray([row.tokens]),
            positions,
            causal_mask(jnp.asarray([length]), length),
        ).states_BTD[0]
        # 1e-4: two layers in another order of summation
        np.testing.assert_allclose(states_LD, direct, rtol=1e-4, atol=1e-4)


def test_states_equal_a_direct_forward(tiny_params, tmp_path):
    row_states = target_states(tiny_params, TINY, STATE_ROWS, tmp_path / "a.states")
    assert {np.asarray(states_LD).dtype for states_LD in row_states} == {np.dtype(np.float32)}
    check_states(row_states, STATE_ROWS, tiny_params)


@pytest.mark.parametrize("bug", ["shifted", "sorted by length", "one row twice"])
def test_misplaced_states_are_seen(tiny_params, tmp_path, bug):
    rows = (
        sorted(STATE_ROWS, key=lambda row: -len(row.tokens))
        if bug == "sorted by length"
        else STATE_ROWS
    )
    row_states = target_states(tiny_params, TINY, rows, tmp_path / "a.states")
    if bug == "shifted":
        row_states = [np.roll(states_LD, 1, axis=0) for states_LD in row_states]
    if bug == "one row twice":
        row_states[1] = row_states[4]
    with pytest.raises(AssertionError):
        check_states(row_states, STATE_ROWS, tiny_params)


def test_states_are_read_back_until_the_rows_change(tiny_params, tmp_path, monkeypatch):
    first = np.concatenate(target_states(tiny_params, TINY, STATE_ROWS, tmp_path / "a.states"))
    with monkeypatch.context() as patch:
        patch.setattr(states, "_compute", lambda *_: pytest.fail("computed again"))
        again = target_states(tiny_params, TINY, STATE_ROWS, tmp_path / "a.states")
        np.testing.assert_array_equal(np.concatenate(again), first)
    changed = [Row([60, *row.tokens[1:]], row.supervised) for row in STATE_ROWS]
    check_states(
        target_states(tiny_params, TINY, changed, tmp_path / "a.states"), changed, tiny_params
    )


def test_a_disk_that_is_too_small_is_refused(tiny_params, tmp_path, monkeypatch):
    total = sum(len(row.tokens) for row in STATE_ROWS)
    free = total * 32 * 4 - 1
    monkeypatch.setattr(states.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(
        UserError,
        match=r"the target's states need 0.0\d MB, 0.0\d MB are free; lower data.answer_tokens, "
        r"set data.states_dtype: int8",
    ):
        target_states(tiny_params, TINY, STATE_ROWS, tmp_path / "a.states")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(states.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free + 1))
    assert len(target_states(tiny_params, TINY, STATE_ROWS, tmp_path / "a.states")) == len(
        STATE_ROWS
    )


def test_a_run_broken_off_leaves_the_old_states(tiny_params, tmp_path, monkeypatch):
    target_states(tiny_params, TINY, STATE_ROWS[:3], tmp_path / "a.states")

    def broken_compute(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(states, "_compute", broken_compute)
        with pytest.raises(KeyboardInterrupt):
            target_states(tiny_params, TINY, STATE_ROWS, tmp_path / "a.states")
        check_states(
            target_states(tiny_params, TINY, STATE_ROWS[:3], tmp_path / "a.states"),
            STATE_ROWS[:3],
            tiny_params,
        )


def test_new_states_never_pass_for_old_ones(tiny_params, tmp_path, monkeypatch):
    """A run that ends between its two writes must not leave the old description with new states."""
    first, second = STATE_ROWS[:2], [STATE_ROWS[1], STATE_ROWS[0]]
    target_states(tiny_params, TINY, first, tmp_path / "a.states")
    replace = files.os.replace

    def once(*names):
        replace(*names)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", once)
        with pytest.raises(KeyboardInterrupt):
            target_states(tiny_params, TINY, second, tmp_path / "a.states")
    check_states(target_states(tiny_params, TINY, first, tmp_path / "a.states"), first, tiny_params)

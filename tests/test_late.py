"""The late stage against its plain form, and against the early stage (method.md 13.2, 13.3,
13.6).
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from late_oracle import late_keys_values, oracle_states

from beagle_jax.model.beagle import BeagleBlock, BeagleSpec, init_draft
from beagle_jax.model.packing import of_row
from beagle_jax.training import late
from beagle_jax.training.early import early_states
from beagle_jax.training.late import late_states

# Moderate weights: float32 error of the two summation orders then stays well below the tolerance.
SPEC = BeagleSpec.from_target(TINY, init_std=0.15)
# 13 is no multiple of any window but 1; the second row is ragged.
LENGTH = jnp.array([[13], [9]], jnp.int32)
START = jnp.zeros((2, 1), jnp.int32)  # whole rows are asked for


@pytest.fixture(scope="module")
def row():
    keys = jax.random.split(jax.random.key(3), 3)
    e_BLD = jax.random.normal(keys[0], (2, 13, SPEC.hidden_size))
    h_BLD = jax.random.normal(keys[1], (2, 13, SPEC.hidden_size))
    return init_draft(SPEC, keys[2]), e_BLD, h_BLD


def _scored(window: int, steps: int, multi_token: bool) -> list[tuple[int, int]]:
    """Returns draft step and window offset of each prediction that method.md 4.2 sums.

    With l = i, or with l = k.
    """
    return [
        (step, offset)
        for step in range(steps)
        for offset in range(step, window if multi_token else step + 1)
    ]


_late = jax.jit(
    late_states, static_argnums=1, static_argnames=("window", "steps", "detach", "multi_token")
)
_early = jax.jit(early_states, static_argnums=1, static_argnames=("window",))


@partial(jax.jit, static_argnames=("window", "steps", "detach", "multi_token", "plant"))
def _both(params, e_BLD, h_BLD, offset, *, window, steps, detach, multi_token=False, plant=""):
    """Returns states and gradients of the fast and of the plain form, on the same rows.

    plant: a name of its own for a program with a planted bug, so that no other test meets it. It
    has no gradients: the states show the bug.
    """
    settings = dict(window=window, steps=steps, offset=offset, detach=detach)
    at, scored = (
        late.window_queries(LENGTH, e_BLD.shape[1], window, window, offset),
        _scored(window, steps, multi_token),
    )

    def pick(per_step):
        return jnp.stack(
            [of_row(per_step[step], at.query_BUJ[:, :, offset]) for step, offset in scored], axis=2
        )

    mask = jnp.stack([at.valid_BUJ[:, :, offset] for _, offset in scored], axis=2)[..., None]
    # A nonlinear function of every supervised state, weighted as the loss is.
    beta = jnp.array([steps - step for step, _ in scored], jnp.float32)[None, None, :, None]

    def score(s):
        return jnp.sum(jnp.where(mask, jnp.sin(s) * beta, 0))

    def fast(p):
        return late_states(
            p, SPEC, e_BLD, h_BLD, LENGTH, START, multi_token=multi_token, **settings
        ).state_BUJD

    def plain(p):
        return pick(oracle_states(p, SPEC, e_BLD, h_BLD, LENGTH[:, 0], **settings))

    def graded(form):
        return jax.grad(lambda p: (score(states := form(p)), states), has_aux=True)(params)

    both = [({}, form(params)) if plant else graded(form) for form in (fast, plain)]
    return [jnp.where(mask, states, 0) for _, states in both], [gradient for gradient, _ in both]


def _compare(row, window, steps, detach, offsets, **options) -> None:
    for offset in offsets:
        values, gradients = _both(
            *row, jnp.int32(offset), window=window, steps=steps, detach=detach, **options
        )
        np.testing.assert_allclose(values[0], values[1], atol=1e-5)
        for name in gradients[0]:
            scale = float(jnp.abs(gradients[1][name]).max())
            np.testing.assert_allclose(
                gradients[0][name], gradients[1][name], atol=1e-4 * scale, err_msg=name
            )


@pytest.mark.parametrize(
    ("window", "steps", "detach"),
    [(1, 1, True), (2, 2, False), (5, 3, True), (5, 3, False), (4, 4, True), (5, 5, False)],
)
def test_equals_plain_form(row, window, steps, detach):
    _compare(row, window, steps, detach, range(window))


@pytest.mark.parametrize(("window", "steps", "detach"), [(3, 3, True), (3, 3, False), (4, 2, True)])
def test_multi_token_equals_plain_form(row, window, steps, detach):
    """The loss form l = k: each step scores later queries too (Fig. 12 of the paper)."""
    _compare(row, window, steps, detach, range(window), multi_token=True)


def test_planted_bug_multi_token_forgets_all_but_the_newest_key(row, monkeypatch):
    monkeypatch.setattr(late, "append_rows", lambda rows, more: more)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _compare(row, 3, 3, True, [1], multi_token=True, plant="newest key")


def test_planted_bug_true_key_of_own_position(row, monkeypatch):
    right = late.keys_before
    monkeypatch.setattr(
        late, "keys_before", lambda chat_BT, start_BT, *rest: right(chat_BT, start_BT + 1, *rest)
    )
    with pytest.raises(AssertionError):
        _compare(row, 3, 3, True, [1], plant="own position")


def test_planted_bug_predicted_key_one_position_late(row, monkeypatch):
    monkeypatch.setattr(BeagleBlock, "keys_values", late_keys_values)
    with pytest.raises(AssertionError):
        _compare(row, 4, 4, True, [2], plant="late key")


def test_detach_changes_gradients_only(row):
    attached, detached = (
        _both(*row, jnp.int32(1), window=5, steps=3, detach=detach) for detach in (False, True)
    )
    # Two programs: rounding differs where XLA fuses them differently, by a few 1e-7 (measured).
    np.testing.assert_allclose(attached[0][0], detached[0][0], atol=1e-5)
    assert float(jnp.abs(attached[1][0]["v_proj"] - detached[1][0]["v_proj"]).max()) > 1e-3


@pytest.mark.parametrize("multi_token", [False, True])
@pytest.mark.parametrize("offset", [0, 2])
def test_first_step_is_the_early_stage(row, offset, multi_token):
    """At the windows' first positions; with l = k in whole windows (method.md 13.3)."""
    params, e_BLD, h_BLD = row
    early = _early(params, SPEC, e_BLD, h_BLD, LENGTH, START, window=3, offset=jnp.int32(offset))
    settings = dict(
        window=3, steps=1, offset=jnp.int32(offset), detach=True, multi_token=multi_token
    )
    simulated = jax.device_get(_late(params, SPEC, e_BLD, h_BLD, LENGTH, START, **settings))
    seen = [set() for _ in LENGTH]
    for line, places, valid, states in zip(
        (0, 1), simulated.query_BUJ, simulated.valid_BUJ, simulated.state_BUJD, strict=True
    ):
        np.testing.assert_allclose(states[valid], early[line][places[valid]], atol=1e-5)
        seen[line] |= set(places[valid].tolist())
    assert seen == [
        set(range(offset, length, 1 if multi_token else 3)) for length in LENGTH[:, 0].tolist()
    ]


@pytest.mark.parametrize("changed", [0, 4, 7])
def test_a_true_state_reaches_only_later_windows(row, changed):
    params, e_BLD, h_BLD = row

    def run(h):
        return _late(
            params,
            SPEC,
            e_BLD,
            h,
            LENGTH,
            START,
            window=3,
            steps=3,
            offset=jnp.int32(2),
            detach=True,
        )

    before, after = run(h_BLD), run(h_BLD.at[:, changed].add(1.0))
    moved_BU = np.abs(before.state_BUJD - after.state_BUJD).max(axis=(2, 3)) > 0
    expected_BU, inside_BU = (
        np.asarray(before.query_BUJ[:, :, 0]) > changed,
        np.asarray(before.valid_BUJ[:, :, 0]),
    )
    np.testing.assert_array_equal(
        moved_BU[inside_BU], (expected_BU & (changed < LENGTH))[inside_BU]
    )


def test_positions_are_relative(row):
    params, e_BLD, h_BLD = row
    block = BeagleBlock(SPEC).bind({"params": params})
    positions = jnp.broadcast_to(jnp.arange(13), (2, 13))

    def scores(shift):
        q, rows = (
            block.queries(e_BLD, positions + shift),
            block.keys_values(h_BLD, positions + shift),
        )
        return jnp.einsum("BKGTH,BKHS->BKGTS", q, rows.k_BKHS)

    # Angles near 100 lose two digits in float32.
    np.testing.assert_allclose(scores(0), scores(100), atol=1e-4)
    q = block.queries(e_BLD, positions + 1)
    shifted = jnp.einsum("BKGTH,BKHS->BKGTS", q, block.keys_values(h_BLD, positions).k_BKHS)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(scores(0), shifted, atol=1e-4)


def _check_dense(row, steps, shift=0):
    """With a window at every position, the windows of every offset are among them."""
    params, e_BLD, h_BLD = row

    def run(window, offset):
        return jax.device_get(
            _late(
                params,
                SPEC,
                e_BLD,
                h_BLD,
                LENGTH,
                START,
                window=window,
                steps=steps,
                offset=jnp.int32(offset),
                detach=True,
            )
        )

    dense = run(1, 0)
    assert dense.state_BUJD.shape[1:3] == (13, steps)
    for offset in range(steps):
        windows = run(steps, offset)
        for places, valid, states in zip(
            windows.query_BUJ[0],
            windows.valid_BUJ[0],
            np.moveaxis(windows.state_BUJD, 1, 0),
            strict=True,
        ):
            if valid.all():
                np.testing.assert_allclose(
                    dense.state_BUJD[:, places[0] + shift], states, atol=1e-5
                )


def test_dense_holds_the_windows_of_every_offset(row):
    _check_dense(row, 3)


def test_planted_bug_dense_windows_one_later(row):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _check_dense(row, 3, shift=-1)


@lru_cache
def _temporaries_and_flops(steps: int, detach: bool) -> tuple[int, float]:
    """Measures a compiled gradient through `steps` simulated steps, in windows of that size."""
    B, L, D = 2, 128, SPEC.hidden_size
    rows = [jax.ShapeDtypeStruct((B, L, D), jnp.float32)] * 2
    lengths = jax.ShapeDtypeStruct((B, 1), jnp.int32)

    def score(params, e_BLD, h_BLD, length_BC, offset):
        settings = dict(window=max(steps, 1), offset=offset)
        if steps == 0:
            return jnp.sum(
                jnp.square(
                    early_states(params, SPEC, e_BLD, h_BLD, length_BC, length_BC * 0, **settings)
                )
            )
        late = late_states(
            params,
            SPEC,
            e_BLD,
            h_BLD,
            length_BC,
            length_BC * 0,
            steps=steps,
            detach=detach,
            **settings,
        )
        return jnp.sum(jnp.square(late.state_BUJD))

    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in SPEC.param_shapes().items()
    }
    compiled = (
        jax.jit(jax.grad(score))
        .lower(params, *rows, lengths, jax.ShapeDtypeStruct((), jnp.int32))
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(("detach", "within"), [(True, 1.15), (False, 1.3)])
def test_memory_is_flat_in_the_steps(detach, within):
    """benchmarks/step_memory.py shows s from 1 to 8, with the loss, next to forms that grow."""
    # The first step's program is the same with and without: no predicted state is read.
    costs = [_temporaries_and_flops(steps, detach and steps > 1) for steps in (1, 5)]
    memory = [bytes_ for bytes_, _ in costs]
    assert max(memory) <= within * min(memory), memory
    early = _temporaries_and_flops(0, False)[1]
    assert max(flops for _, flops in costs) <= 1.2 * early, (costs, early)


FIRST = jnp.array([[5], [2]], jnp.int32)
ASKED = 6  # queries of each row


def _check_part_of_a_row(row, offset, first_BC=FIRST):
    """Checks that a few positions of each row give what they give in the whole row."""
    params, e_BLD, h_BLD = row
    e_BTD = jnp.stack(
        [e_LD[first : first + ASKED] for e_LD, first in zip(e_BLD, FIRST[:, 0], strict=True)]
    )
    settings = dict(window=3, offset=jnp.int32(offset))
    early = _early(params, SPEC, e_BTD, h_BLD, LENGTH, first_BC, **settings)
    simulated = jax.device_get(
        _late(params, SPEC, e_BTD, h_BLD, LENGTH, first_BC, steps=2, detach=True, **settings)
    )
    for line, first in enumerate(FIRST[:, 0].tolist()):
        # The same windows, counted from the row's start.
        whole = dict(window=3, offset=jnp.int32((first + offset) % 3))
        expected_TD = _early(params, SPEC, e_BLD, h_BLD, LENGTH, START, **whole)[line, first:]
        np.testing.assert_allclose(early[line, offset:], expected_TD[offset:ASKED], atol=1e-5)
        all_windows = jax.device_get(
            _late(params, SPEC, e_BLD, h_BLD, LENGTH, START, steps=2, detach=True, **whole)
        )
        at = {
            tuple(places): states
            for places, states in zip(
                all_windows.query_BUJ[line].tolist(), all_windows.state_BUJD[line], strict=True
            )
        }
        for places, valid, states in zip(
            simulated.query_BUJ[line],
            simulated.valid_BUJ[line],
            simulated.state_BUJD[line],
            strict=True,
        ):
            if valid.all():
                np.testing.assert_allclose(states, at[tuple((places + first).tolist())], atol=1e-5)


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_part_of_a_row_equals_the_whole(row, offset):
    _check_part_of_a_row(row, offset)


def test_planted_bug_one_start_for_all_rows(row):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _check_part_of_a_row(row, 1, first_BC=FIRST[::-1])

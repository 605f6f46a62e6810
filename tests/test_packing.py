"""Several chats per row: losses and gradients of one chat per row, and no leak between chats."""

import itertools
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY
from step_cases import CLEAN, SPEC, quick_jit

from beagle_jax.config import EarlyStage, LateStage, TestTimeStage, TrainConfig
from beagle_jax.data.loader import Batch, BatchLoader, best_fit
from beagle_jax.data.share import Share
from beagle_jax.data.target_forward import states_at, states_in_memory
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.model import masks
from beagle_jax.model.eagle import EagleSpec, init_eagle
from beagle_jax.model.packing import places, queries
from beagle_jax.training import eagle, early, late
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.kinds import OBJECTIVES
from beagle_jax.training.step import (
    add_noise,
    stage_loss,
)

EAGLE = EagleSpec.from_target(TINY, init_std=0.15)
L, T = 24, 22  # of the batches compared
STAGES = {
    "early": EarlyStage(steps=1, window=3),
    "late": LateStage(steps=1, window=4, simulation_steps=3),
    "gradients kept": LateStage(steps=1, window=3, simulation_steps=3, detach=False),
    "dense": TestTimeStage(steps=1, simulation_steps=2),
    "eagle": TestTimeStage(steps=1, simulation_steps=2),
}


def some_rows(seed: int, count: int = 7) -> list[Row]:
    """Makes chats of 4 to 12 tokens, any two of which fit in a row.

    Some have a question between two answers, some end in unsupervised tokens.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 13, count)
    supervised = [
        (np.arange(n) >= rng.integers(1, n - 2)) & (rng.random(n) < 0.8) | (np.arange(n) == n - 2)
        for n in lengths
    ]
    return [
        Row(rng.integers(0, TINY.vocab_size, n).tolist(), flags.tolist())
        for n, flags in zip(lengths, supervised, strict=True)
    ]


def loader_of(rows: list[Row], **settings) -> BatchLoader:
    """Makes a loader whose states tell chats apart."""
    rng = np.random.default_rng(len(rows))
    states = [
        rng.standard_normal((len(row.tokens), TINY.hidden_size)).astype(np.float32) for row in rows
    ]
    return BatchLoader(rows, states, **dict(batch=1, row_tokens=L, seed=0, pack=True) | settings)


def everything(loader: BatchLoader, lines: int, C: int) -> Batch:
    """Returns all rows of a loader with one row per batch.

    The shapes do not depend on the chats.
    """
    steps = [loader.batch_at(step) for step in range(loader.steps_per_epoch)]
    shape = Batch((lines, L), (lines, L, TINY.hidden_size), (lines, T), (lines, C), (lines, C))
    # One array where both are equal, and no scale of states that are not int8.
    assert all(step.targets_BLD is None and step.scale_BL is None for step in steps)
    fields = (np.concatenate(field) for field in zip(*(step[:-2] for step in steps), strict=True))
    return Batch(
        *(
            np.pad(x, [(0, n - m) for n, m in zip(size, x.shape, strict=True)])
            for x, size in zip(fields, shape[:-2], strict=True)
        )
    )


def loss_of(name: str):
    """Returns a function (params, frozen, batch, key) -> (loss, metrics) of a stage."""
    spec, objective = (
        (EAGLE, OBJECTIVES["eagle"]["test_time"])
        if name == "eagle"
        else (SPEC, OBJECTIVES["beagle"]["early" if name == "early" else "late"])
    )
    return lambda params, *rest: stage_loss(
        params, spec, CLEAN, STAGES[name], objective, *rest, ONE_DEVICE
    )


@lru_cache
def gradient_of(name: str):
    """Returns a jitted function like `loss_of` that gives ((loss, metrics), gradient)."""
    return quick_jit(jax.value_and_grad(loss_of(name), has_aux=True))


def check_same(name: str, seed: int, draft: dict, tiny_params: dict, planted=None) -> bool:
    """Compares chats packed with the same chats one per row: loss, parts, counts, gradients.

    With one offset of the windows. planted: another way to compute (loss, metrics) of the packed
    rows, without gradients. Returns whether chats fill a row to its last position.
    """
    rows, key = some_rows(seed), jax.random.key(seed)
    frozen = FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"])
    # All have one shape, so one program reads them.
    alone, packed = (everything(loader_of(rows, pack=pack), 7, 7) for pack in (False, True))
    assert (
        not alone.length_BC[:, 1:].any()
        and (packed.length_BC > 0).sum(axis=1).max() > 1
        and packed.counted_BT.sum() == alone.counted_BT.sum()
    )
    (loss, metrics), gradient = gradient_of(name)(draft, frozen, alone, key)
    (packed_loss, their), slope = (
        (planted(draft, frozen, packed, key), {})
        if planted
        else gradient_of(name)(draft, frozen, packed, key)
    )
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    for figure in ("ploss", "vloss", "objective", "supervised", "count_J", "agree_JK"):
        np.testing.assert_allclose(
            getattr(their, figure), getattr(metrics, figure), rtol=1e-5, err_msg=figure
        )
    for weight in slope:
        np.testing.assert_allclose(
            slope[weight],
            gradient[weight],
            atol=1e-5 * float(jnp.abs(gradient[weight]).max()),
            err_msg=weight,
        )
    return bool((packed.length_BC.sum(axis=1) == L).any())


@pytest.fixture(scope="module")
def drafts(tiny_draft) -> dict[str, dict]:
    return dict.fromkeys(STAGES, tiny_draft) | {"eagle": init_eagle(EAGLE, jax.random.key(1))}


@pytest.mark.parametrize("name", STAGES)
def test_packed_and_unpacked_losses_and_gradients_are_equal(drafts, tiny_params, name):
    assert any([check_same(name, seed, drafts[name], tiny_params) for seed in range(8)])


def one_chat(chat_BT, start_BT, length_BC, width, right=masks.keys_before):
    """Planted: keys of earlier chats are seen too."""
    begin_BC = jnp.cumsum(length_BC, axis=1) - length_BC
    begin_BT = jnp.take_along_axis(begin_BC, chat_BT, axis=1)
    return right(0 * chat_BT, begin_BT + start_BT, length_BC.sum(axis=1, keepdims=True), width)


def running_windows(count, length_BC, first_BC):
    """Planted: windows are counted over the row, not over each chat."""
    right = queries(count, length_BC, first_BC)
    return right._replace(place_BT=jnp.broadcast_to(jnp.arange(count), right.place_BT.shape))


def running_keys(count, size_BC):
    """Planted: keys are rotated by their position in the row, queries by that in the chat."""
    right = places(count, size_BC)
    return (
        right._replace(place_BX=jnp.broadcast_to(jnp.arange(count), right.place_BX.shape))
        if count == L
        else right
    )


BUGS = {
    "attention crosses chats": ("early", [(masks, "keys_before", one_chat)]),
    "late attention crosses chats": ("late", [(late, "keys_before", one_chat)]),
    "windows cross chats": ("early", [(masks, "queries", running_windows)]),
    "late windows cross chats": (
        "late",
        [
            (
                late,
                "window_queries",
                lambda size_BC, *rest, right=late.window_queries: right(
                    size_BC.sum(axis=1, keepdims=True), *rest
                ),
            )
        ],
    ),
    "EAGLE's attention crosses chats": ("eagle", [(eagle, "keys_before", one_chat)]),
    "positions do not restart": ("early", [(early, "places", running_keys)]),
    "late positions do not restart": ("late", [(late, "places", running_keys)]),
}


@pytest.mark.parametrize("bug", BUGS)
def test_what_crosses_chats_is_seen(drafts, tiny_params, monkeypatch, bug):
    name, plants = BUGS[bug]
    # The right program is traced before anything is planted.
    check_same(name, 0, drafts[name], tiny_params)
    for module, function, wrong in plants:
        monkeypatch.setattr(module, function, wrong)
    planted = quick_jit(loss_of(name))

    def compare():
        for seed in range(3):
            check_same(name, seed, drafts[name], tiny_params, planted)

    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare()


def test_the_drawn_examples():
    assert [x.tolist() for x in places(6, jnp.array([[3, 0, 2]]))] == [
        [[0, 0, 0, 2, 2, 2]],
        [[0, 1, 2, 0, 1, 2]],
    ]

    def seen(mask_1LL):
        return {
            query: np.flatnonzero(line).tolist()
            for query, line in enumerate(np.asarray(mask_1LL[0]))
        }

    early_mask = jax.jit(masks.early_block_mask, static_argnums=(1, 2))(
        jnp.array([[5, 3]]), 8, 3, jnp.int32(2)
    )
    assert seen(early_mask) == {
        0: [],
        1: [0],
        2: [0, 1],
        3: [0, 1],
        4: [0, 1],
        5: [],
        6: [5],
        7: [5, 6],
    }
    target_mask = masks.chats_mask(jnp.array([[2, 3]]), 6)
    assert seen(target_mask) == {0: [0], 1: [0, 1], 2: [2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 3, 4]}
    windows = jax.jit(late.window_queries, static_argnums=(1, 2, 3))(
        jnp.array([[8]]), 8, 3, 2, jnp.int32(2)
    )
    assert windows.query_BUJ.tolist() == [
        [[2, 3], [5, 6], [7, 7]]
    ] and windows.valid_BUJ.tolist() == [[[True] * 2, [True] * 2, [False] * 2]]


@pytest.mark.parametrize(("window", "steps"), [(1, 1), (2, 2), (3, 1), (4, 3), (5, 5)])
def test_every_window_of_every_chat_comes_once(window, steps):
    rng, windows_of = (
        np.random.default_rng(window),
        jax.jit(late.window_queries, static_argnums=(1, 2, 3)),
    )
    for offset in range(window):
        size_BC = rng.integers(0, 9, (40, 4))
        at = windows_of(size_BC, int(size_BC.sum(axis=1).max()), window, steps, offset)
        for sizes, chats, placed, positions, valid in zip(
            size_BC, *(np.asarray(x) for x in at), strict=True
        ):
            begin = np.cumsum(sizes) - sizes
            expected = [
                (c, i, begin[c] + i)
                for c, n in enumerate(sizes)
                for start in range(offset, n, window)
                for i in range(start, min(start + steps, n))
            ]
            listed = zip(
                np.repeat(chats, steps)[valid.ravel()], placed[valid], positions[valid], strict=True
            )
            assert [tuple(map(int, query)) for query in listed] == expected


def test_noise_is_as_wide_as_the_chat_is_short():
    length_BC = jnp.array([[150, 350], [500, 0]])
    noise_BLD = np.abs(
        add_noise(
            jnp.zeros((2, 500, 64)), length_BC, TrainConfig(noise_scale=0.2), jax.random.key(0)
        )
    )
    for part, length in ((noise_BLD[0, :150], 150), (noise_BLD[0, 150:], 350), (noise_BLD[1], 500)):
        width = 0.2 * 512 / length / 2
        assert 0.99 * width < part.max() <= width


def test_the_target_reads_each_chat_on_its_own(tiny_params, monkeypatch):
    rows = some_rows(1)
    packed, alone = everything(loader_of(rows), 4, 7), everything(loader_of(rows, pack=False), 7, 1)
    of_chat = {
        tuple(tokens[: lengths[0]]): states
        for tokens, lengths, states in zip(
            alone.tokens_BL,
            alone.length_BC,
            states_in_memory(tiny_params, TINY, alone.tokens_BL, alone.length_BC),
            strict=True,
        )
    }

    def check(states_BLD) -> int:
        chats = 0
        for tokens, lengths, states in zip(
            packed.tokens_BL, packed.length_BC, states_BLD, strict=True
        ):
            for begin, length in zip(
                np.cumsum(lengths) - lengths, lengths[lengths > 0], strict=False
            ):
                chat = tuple(tokens[begin : begin + length])
                whole = next(states for text, states in of_chat.items() if text[:length] == chat)
                # 1e-4: rows of another length are summed in another order
                np.testing.assert_allclose(
                    states[begin : begin + length], whole[:length], rtol=1e-4, atol=1e-4
                )
                chats += 1
        return chats

    assert check(states_in_memory(tiny_params, TINY, packed.tokens_BL, packed.length_BC)) == len(
        rows
    )
    monkeypatch.setattr(
        "beagle_jax.data.target_forward.chats_mask",
        lambda length_BC, width: masks.causal_mask(length_BC.sum(axis=1), width),
    )
    # The other is traced already.
    planted = jax.jit(lambda params, spec, *rest: states_at(params, spec, *rest), static_argnums=1)
    monkeypatch.setattr("beagle_jax.data.target_forward._states", planted)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(states_in_memory(tiny_params, TINY, packed.tokens_BL, packed.length_BC))


def test_chats_fit_their_rows_and_come_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        width, lengths = 100, rng.integers(1, 101, rng.integers(1, 60)).tolist()
        rows = best_fit(lengths, width)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths))) and all(
            sum(lengths[at] for at in row) <= width for row in rows
        )
        # Best fit decreasing needs at most 11/9 of the optimum.
        assert len(rows) <= 1.25 * sum(lengths) / width + 1


def test_packed_batches_hold_the_chats_whole_and_say_how_much_is_padding():
    rows = some_rows(3, count=40)
    loader, seen, live = loader_of(rows), [], 0
    of_tokens = {tuple(row.tokens): row for row in rows}
    for step in range(loader.steps_per_epoch):
        batch = loader.batch_at(step)
        for line in range(1):
            slot = query = 0
            for length, first in zip(batch.length_BC[line], batch.first_BC[line], strict=True):
                text = tuple(batch.tokens_BL[line, slot : slot + length])
                if not length:
                    continue
                seen.append(next(whole for whole in of_tokens if whole[:length] == text))
                counting = np.flatnonzero(of_tokens[seen[-1]].supervised[:-1])
                assert (first, length) == (counting[0], counting[-1] + 1)
                assert (
                    np.flatnonzero(batch.counted_BT[line, query : query + length - first]) + first
                ).tolist() == counting.tolist()
                slot, query = slot + length, query + length - first
            assert (
                not batch.tokens_BL[line, slot:].any()
                and not batch.inputs_BLI[line, slot:].any()
                and not batch.counted_BT[line, query:].any()
            )
            live += slot
    assert len(set(seen)) == len(seen) == 40
    assert loader.padding < 0.15 < 0.5 < loader.padding_unpacked
    assert loader.padding == pytest.approx(1 - live / (L * loader.steps_per_epoch))


def test_order_and_position_are_one_integer_and_processes_share_a_batch():
    rows = some_rows(4, count=60)
    loader, again = loader_of(rows, batch=4), loader_of(rows, batch=4)
    parts = [loader_of(rows, batch=4, share=Share(index, 2)) for index in range(2)]
    for step in (7, 0, 3, 2 * loader.steps_per_epoch + 1):
        batch = loader.batch_at(step)
        for name, field in batch._asdict().items():
            if field is None:  # the inputs are the targets
                continue
            np.testing.assert_array_equal(getattr(again.batch_at(step), name), field)
            np.testing.assert_array_equal(
                np.concatenate([getattr(part.batch_at(step), name) for part in parts]), field
            )
    sample = next(loader.samples(1, 10 * 24))
    assert (sample.length_BC[:, 0] > 0).all() and not sample.length_BC[
        :, 1:
    ].any()  # one chat a row


def test_packing_that_leaves_too_few_rows_is_told():
    with pytest.raises(
        UserError,
        match=r"only \d rows have an answer within train.row_tokens = 24 \(train.pack put "
        r"several chats in each\)",
    ):
        loader_of(some_rows(0), batch=5)

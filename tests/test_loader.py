"""Batches: cut, padded, aligned with their states, dealt to processes; and hot tokens."""

from collections import Counter

import numpy as np
import pytest

from beagle_jax.data.hot_tokens import hot_tokens
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.share import Share
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError


def rows_of_lengths(*lengths: int, prompt: int = 2) -> list[Row]:
    """Makes rows whose first token is their number and whose other tokens count up."""
    rng = np.random.default_rng(3)
    return [
        Row(
            [number, *rng.integers(0, 61, length - 1).tolist()],
            [position >= prompt for position in range(length)],
        )
        for number, length in enumerate(lengths)
    ]


def loader_of(rows, **settings) -> BatchLoader:
    total = sum(len(row.tokens) for row in rows)
    fake_MD = np.arange(total * 3, dtype=np.float32).reshape(total, 3) + 1
    fake = np.split(fake_MD, np.cumsum([len(row.tokens) for row in rows])[:-1])
    return BatchLoader(rows, fake, **{"batch": 2, "row_tokens": 6, "seed": 0} | settings)


def test_batches_are_cut_padded_and_aligned():
    rows = rows_of_lengths(4, 9, 6, 5)
    loader, seen = loader_of(rows), set()
    starts = np.cumsum([0, 4, 9, 6])
    for step in range(loader.steps_per_epoch):
        batch = loader.batch_at(step)
        # Supervised from position 2 on; the last position of a row never counts: 3 positions at
        # most.
        assert (
            batch.tokens_BL.shape == (2, 6)
            and batch.inputs_BLI.shape == (2, 6, 3)
            and batch.counted_BT.shape == (2, 3)
        )
        for line in range(2):
            number, length = int(batch.tokens_BL[line, 0]), int(batch.length_BC[line, 0])
            assert length == min(6, len(rows[number].tokens))
            assert batch.tokens_BL[line].tolist() == rows[number].tokens[:length] + [0] * (
                6 - length
            )
            assert batch.inputs_BLI[line, :length, 0].tolist() == [
                3 * (starts[number] + i) + 1 for i in range(length)
            ]
            assert not batch.inputs_BLI[line, length:].any()
            assert batch.first_BC[line].tolist() == [2]
            assert batch.counted_BT[line].tolist() == [
                position < length - 1 for position in (2, 3, 4)
            ]
            seen.add(number)
    assert seen == {0, 1, 2, 3}


def test_the_share_of_padding_is_that_of_the_batches():
    loader = loader_of(rows_of_lengths(4, 9, 6, 5))
    batches = [loader.batch_at(step) for step in range(loader.steps_per_epoch)]
    live = sum(int(batch.length_BC.sum()) for batch in batches)
    assert loader.padding == pytest.approx(1 - live / (4 * 6)) == 3 / 24


def first_tokens(loader, steps) -> list[int]:
    return [int(token) for step in steps for token in loader.batch_at(step).tokens_BL[:, 0]]


def test_every_row_comes_once_per_epoch_in_an_order_of_its_own():
    rows = rows_of_lengths(*[5] * 12)
    loader, again, other = loader_of(rows), loader_of(rows), loader_of(rows, seed=1)
    epochs = [first_tokens(loader, range(6 * epoch, 6 * epoch + 6)) for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert first_tokens(again, range(12, 18)) == epochs[2] != first_tokens(other, range(12, 18))


def test_left_over_rows_come_in_another_epoch():
    loader = loader_of(rows_of_lengths(*[5] * 7))
    assert loader.steps_per_epoch == 3
    assert max(Counter(first_tokens(loader, range(3))).values()) == 1
    assert set(first_tokens(loader, range(30))) == set(range(7))


def test_rows_without_an_answer_before_the_cut_are_left_out():
    rows = (
        rows_of_lengths(4, 9, 9, prompt=2)
        + rows_of_lengths(9, prompt=6)
        + rows_of_lengths(9, prompt=5)
    )
    loader = loader_of(rows, batch=3)
    assert (
        loader.steps_per_epoch == 1
        and sorted(first_tokens(loader, [0])) == [0, 1, 2]
        and loader.left_out == 2
    )


def test_too_few_rows_are_an_error():
    message = (
        "train.batch is 3, but only 2 rows have an answer within train.row_tokens = 6; lower "
        "train.batch or write more"
    )
    with pytest.raises(UserError, match=message):
        loader_of(rows_of_lengths(4, 5), batch=3)


def check_dealt(rows, count: int, **settings) -> None:
    """Checks that the lines of `count` processes together are the batch of one, in every field."""
    undivided = loader_of(rows, **settings)
    dealt = [loader_of(rows, share=Share(index, count), **settings) for index in range(count)]
    for step in range(2 * undivided.steps_per_epoch):  # two epochs
        for whole, *parts in zip(
            undivided.batch_at(step), *(loader.batch_at(step) for loader in dealt), strict=True
        ):
            if whole is None:  # no targets of their own
                assert parts == [None] * count
            else:
                np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_read_the_batch_of_one(count):
    check_dealt(rows_of_lengths(*range(4, 17)), count, batch=4)


def test_processes_with_orders_of_their_own_are_seen(monkeypatch):
    right = BatchLoader.batch_at
    monkeypatch.setattr(
        BatchLoader, "batch_at", lambda self, step: right(self, step + self._share.index)
    )
    with pytest.raises(AssertionError):
        check_dealt(rows_of_lengths(*range(4, 17)), 2, batch=4)


def test_a_batch_that_processes_do_not_divide_is_an_error():
    with pytest.raises(
        UserError,
        match=r"train.batch is 4, but there are 3 processes; set it to a multiple of 3",
    ):
        loader_of(rows_of_lengths(5, 5, 5, 5), batch=4, share=Share(0, 3))


def test_batches_without_states():
    rows = rows_of_lengths(4, 9, 6, 5)
    with_states, without = loader_of(rows), BatchLoader(rows, None, batch=2, row_tokens=6, seed=0)
    for step in range(2):
        batch = without.batch_at(step)
        assert batch.inputs_BLI is None
        np.testing.assert_array_equal(batch.tokens_BL, with_states.batch_at(step).tokens_BL)


# Hot tokens


def test_hot_tokens_are_frequent_answer_tokens_then_low_ids():
    rows = [
        Row([9, 9, 9, 5, 5, 8], [False, False, False, True, True, True]),
        Row([9, 6, 5, 6, 7, 7], [False, True, True, True, True, True]),
    ]
    # Answers: 5 three times, 6 and 7 twice, 8 once; 9 only in prompts.
    assert hot_tokens(rows, 5, 12).tolist() == [5, 6, 7, 0, 1]
    assert hot_tokens(rows, 2, 12).tolist() == [5, 6]
    assert hot_tokens(rows, 11, 12).tolist() == [5, 6, 7, 0, 1, 2, 3, 4, 8, 9, 10]
    assert hot_tokens(rows, 5, 12).dtype == np.int32


@pytest.mark.parametrize("count", [0, 12, 13])
def test_all_tokens_are_hot_when_none_or_enough_are_asked_for(count):
    assert hot_tokens(rows_of_lengths(5), count, 12) is None


def test_a_sample_comes_in_batches_of_one_shape_until_it_counts_enough():
    rows = [Row([1] * 6, [False] * 2 + [True] * 4) for _ in range(7)]  # three of each count
    loader = BatchLoader(rows, None, batch=2, row_tokens=8, seed=0)
    everything = list(loader.samples(99, 3 * 8))
    assert [batch.tokens_BL.shape for batch in everything] == [(3, 8)] * 3
    assert [batch.length_BC.ravel().tolist() for batch in everything] == [[6] * 3] * 2 + [[6, 0, 0]]
    assert sum(int(batch.counted_BT.sum()) for batch in everything) == 7 * 3
    assert len(list(loader.samples(10, 3 * 8))) == 2, "nine, then enough"

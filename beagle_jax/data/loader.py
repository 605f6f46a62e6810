"""Fixed-shape training batches from chats and their states, one or several chats per row.

The order of rows depends on (seed, epoch) only and the position in it is the step number, so
resuming needs one integer. With several processes, each reads the rows of a batch that its own
devices hold; together they read the same batches as a single process. Reader threads divide the
rows of a batch, so their number changes nothing either.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from beagle_jax.arrays import AnyArray
from beagle_jax.data.buffers import Buffers
from beagle_jax.data.prefetch import AHEAD
from beagle_jax.data.share import ALONE, Share
from beagle_jax.data.state_records import Records, streams_of
from beagle_jax.data.states import StoredStates
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.model.target import FINAL


class Batch(NamedTuple):
    """Rows of one step, right-padded to a common length L.

    Each row holds up to C chats, one after another (model/packing.py). The queries of a chat start
    at its position first_BC; the T queries of a row are those of its chats, one after another.
    """

    tokens_BL: AnyArray  # int32
    # the draft's inputs from the target, zeros in the padding: states after the final norm, or the
    # concatenated taps of the draft. None: computed inside the step
    inputs_BLI: AnyArray | None
    counted_BT: AnyArray  # bool: the query enters the loss (method.md 5.2)
    length_BC: AnyArray  # int32: tokens of each chat; 0 if the row has fewer chats
    first_BC: AnyArray  # int32: first position of the chat that enters the loss
    targets_BLD: AnyArray | None = None  # states after the final norm; None: same as inputs_BLI
    scale_BL: AnyArray | None = None  # float32: multiplies int8 inputs and targets; None: no int8

    @property
    def predicted_BLD(self) -> AnyArray | None:
        """States that the draft predicts; the target's logits are computed from them."""
        return self.inputs_BLI if self.targets_BLD is None else self.targets_BLD

    def scaled(self) -> "Batch":
        """Returns the batch with float32 in place of int8 states, on the host or inside jit."""
        if self.scale_BL is None or self.inputs_BLI is None:
            return self
        scale_BL1, targets_BLD = self.scale_BL[..., None], self.targets_BLD
        return self._replace(
            inputs_BLI=self.inputs_BLI.astype(np.float32) * scale_BL1,
            targets_BLD=None if targets_BLD is None else targets_BLD.astype(np.float32) * scale_BL1,
            scale_BL=None,
        )


class _Entry(NamedTuple):
    """A chat with at least one position that enters the loss."""

    tokens_L: np.ndarray
    states_LD: np.ndarray | StoredStates | None
    counting: np.ndarray  # positions that enter the loss, ascending
    length: int  # number of tokens that are used

    @property
    def queries(self) -> int:
        """Number of positions that the draft predicts."""
        return int(self.counting[-1] - self.counting[0]) + 1


def _entry(
    row: Row, states_LD: np.ndarray | StoredStates | None, row_tokens: int, pack: bool
) -> _Entry | None:
    """Returns a chat as the loader reads it; None if its answer lies after the cut."""
    length = min(row_tokens, len(row.tokens))
    # The last position has no next token to predict; the others enter the loss where the chat is
    # supervised.
    counting = np.flatnonzero(row.supervised[: length - 1])
    if not len(counting):
        return None
    # The loss does not depend on tokens after the last position that enters it.
    used = int(counting[-1]) + 1 if pack else length
    return _Entry(np.asarray(row.tokens[:length], np.int32), states_LD, counting, used)


class BatchLoader:
    """Endless batches of `batch` rows of `row_tokens` tokens; every row once per epoch."""

    def __init__(
        self,
        rows: Sequence[Row],
        states: Sequence[np.ndarray | StoredStates] | None,
        *,
        batch: int,
        row_tokens: int,
        seed: int,
        share: Share = ALONE,
        pack: bool = False,
        taps: tuple[int, ...] = (),
        workers: int = 1,
    ) -> None:
        """Selects the chats that enter the loss and assigns them to rows.

        states: [length, D] of each chat, as `states.target_states` returns them; None: batches have
        no states. batch: rows over all processes; this process returns batch / share.count of them.
        pack: put several chats in a row, the same ones in every epoch. taps: what the draft reads
        of the target (`DraftSpec.taps`); records hold its streams before the states. workers:
        threads that read the states of a batch (`data.workers`).

        Raises:
            UserError: there are fewer rows than `batch`, or share.count does not divide `batch`.
        """
        of_rows: Sequence[np.ndarray | StoredStates | None]
        of_rows = [None] * len(rows) if states is None else states
        entries = (
            _entry(row, states_LD, row_tokens, pack)
            for row, states_LD in zip(rows, of_rows, strict=True)
        )
        self._chats = [chat for chat in entries if chat is not None]
        # chats without a position that enters the loss
        self.left_out = len(rows) - len(self._chats)
        alone = [[index] for index in range(len(self._chats))]
        self._rows = best_fit([chat.length for chat in self._chats], row_tokens) if pack else alone
        if len(self._rows) < batch:
            raise UserError(
                f"train.batch is {batch}, but only {len(self._rows)} rows have an answer "
                "within train.row_tokens = "
                f"{row_tokens}{' (train.pack put several chats in each)' if pack else ''}; "
                "lower train.batch or write more answers (data.answer_tokens)"
            )
        if batch % share.count:
            raise UserError(
                f"train.batch is {batch}, but there are {share.count} processes; set it to a "
                f"multiple of {share.count}"
            )
        self._batch, self._width, self._seed, self._share = batch, row_tokens, seed, share
        self._taps = taps
        self._buffers = Buffers(spare=AHEAD + 2)  # batches in the step, waiting, and being read
        self._each_line = _in_order(workers)
        self._order = lru_cache(2)(self._order_of)
        self._most_chats = max(map(len, self._rows))
        self._queries = max(sum(self._chats[at].queries for at in row) for row in self._rows)

    @property
    def steps_per_epoch(self) -> int:
        """Complete batches per epoch; the rows left over differ from epoch to epoch."""
        return len(self._rows) // self._batch

    @property
    def padding(self) -> float:
        """Share of padding among the positions of all rows."""
        return self._share_left(len(self._rows))

    @property
    def padding_unpacked(self) -> float:
        """Share of padding if each chat had its own row."""
        return self._share_left(len(self._chats))

    def _share_left(self, rows: int) -> float:
        return 1 - sum(chat.length for chat in self._chats) / (self._width * rows)

    def batch_at(self, step: int) -> Batch:
        """Returns this process's rows of a step's batch. Steps count from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        lines = self._batch // self._share.count
        first = place * self._batch + self._share.index * lines
        order = self._order(epoch)
        return self._fill([self._rows[index] for index in order[first : first + lines]])

    def _order_of(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))

    @property
    def row_tokens(self) -> int:
        """Tokens of each row."""
        return self._width

    def samples(self, counting: int, at_once: int) -> Iterator[Batch]:
        """Yields chats of epoch 0, each in its own row, in batches of about `at_once` positions.

        It ends when the batches have `counting` positions that enter the loss, or after all chats.
        Batches have one shape: the last is filled up with empty rows. They are the same for every
        process. Their states are floats.
        """
        order = np.random.default_rng([self._seed, 0]).permutation(len(self._chats))
        lines, total = max(1, at_once // self._width), 0
        for first in range(0, len(order), lines):
            if total >= counting:
                return
            chats: list[list[int]] = [[index] for index in order[first : first + lines]]
            batch = self._fill(chats + [[]] * (lines - len(chats))).scaled()
            total += int(batch.counted_BT.sum())
            yield batch

    def _fill(self, lines: Sequence[Sequence[int]]) -> Batch:
        """Builds a batch from the chats of each row, given by index."""
        B, C = len(lines), self._most_chats
        tokens_BL = np.zeros((B, self._width), np.int32)
        counted_BT = np.zeros((B, self._queries), bool)
        length_BC, first_BC = np.zeros((B, C), np.int32), np.zeros((B, C), np.int32)
        for line, members in enumerate(lines):
            slot = query = 0
            for place, chat in enumerate(self._chats[index] for index in members):
                length_BC[line, place], first_BC[line, place] = chat.length, chat.counting[0]
                tokens_BL[line, slot : slot + chat.length] = chat.tokens_L[: chat.length]
                counted_BT[line, query + chat.counting - chat.counting[0]] = True
                slot, query = slot + chat.length, query + chat.queries
        return self._with_states(Batch(tokens_BL, None, counted_BT, length_BC, first_BC), lines)

    def _with_states(self, batch: Batch, lines: Sequence[Sequence[int]]) -> Batch:
        """Adds the states of each row's chats, zeros in the padding, if there are states."""
        if self._chats[0].states_LD is None:
            return batch
        B, L = batch.tokens_BL.shape
        I, dtype = self._chats[0].states_LD.shape[1], _stored_dtype(self._chats[0].states_LD)
        D = I // (len(streams_of(self._taps)) + 1)
        empty = self._buffers.empty
        states_apart = self._taps and FINAL not in self._taps
        inputs_BLI = empty((B, L, I - D if states_apart else I), dtype)
        targets_BLD = empty((B, L, D), dtype) if self._taps else None
        scale_BL = np.zeros((B, L), np.float32) if dtype == np.int8 else None

        def fill(line: int) -> None:
            slot = 0
            for chat in (self._chats[index] for index in lines[line]):
                states_LI, scale_L = _records(chat.states_LD)
                place, states_LI = slice(slot, slot + chat.length), states_LI[: chat.length]
                if targets_BLD is not None:
                    _copy(targets_BLD[line, place], states_LI[:, I - D :])
                _copy(inputs_BLI[line, place], states_LI[:, : inputs_BLI.shape[2]])
                if scale_BL is not None and scale_L is not None:
                    scale_BL[line, place] = scale_L[: chat.length]
                slot += chat.length
            for filled in (inputs_BLI, targets_BLD):
                if filled is not None:
                    filled[line, slot:] = 0

        self._each_line(fill, range(B))
        return batch._replace(inputs_BLI=inputs_BLI, targets_BLD=targets_BLD, scale_BL=scale_BL)


def _in_order(workers: int) -> Callable[[Callable[[int], None], Iterable[int]], object]:
    """Returns a function that calls another one for each number and waits for all calls."""
    if workers == 1:

        def alone(call: Callable[[int], None], numbers: Iterable[int]) -> None:
            for number in numbers:
                call(number)

        return alone
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    return lambda call, numbers: list(pool.map(call, numbers))


def _stored_dtype(states_LI: np.ndarray | StoredStates) -> np.dtype:
    return _records(states_LI).states_LI.dtype


def _records(states_LI: np.ndarray | StoredStates | None) -> Records:
    assert states_LI is not None  # all chats of a loader have states, or none has
    return states_LI.records() if isinstance(states_LI, StoredStates) else Records(states_LI)


def _copy(there_LI: np.ndarray, states_LI: np.ndarray) -> None:
    """Copies states of the same dtype, as integers: for bfloat16 numpy would hold the GIL."""
    if there_LI.dtype != states_LI.dtype:
        raise TypeError(f"states of {states_LI.dtype} among states of {there_LI.dtype}")
    number = f"u{there_LI.dtype.itemsize}"
    there_LI.view(number)[...] = states_LI.view(number)


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Assigns chats, by index, to rows of `width` tokens.

    Places the longest chats first, each in the row that then has the least free space.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # tokens left and the row, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        tightest = bisect_left(free, (lengths[index], 0))
        space, row = free.pop(tightest) if tightest < len(free) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(free, (space - lengths[index], row))
    return rows

"""Fixed-shape training batches from chats and their states: one chat a row, or as many as fit.

The order is a function of (seed, epoch) and the position is the step number: resuming needs one
integer. Of n processes each reads its own lines of every batch (those that its devices hold), so
that together they see what one alone would.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from beagle_jax.data.share import ALONE, Share
from beagle_jax.data.states import StoredStates
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError


class Batch(NamedTuple):
    """One step's rows, right-padded to a common length L; each holds up to C chats, one behind
    another (model/packing.py).

    Each chat is asked for predictions from its first_BC on; a row's T queries are those of its
    chats, one behind another.
    """

    tokens_BL: np.ndarray  # int32
    # what the draft reads of the target, zeros in the padding: its states after the final norm, or
    # the taps of the draft, concatenated. None: computed inside the step
    inputs_BLI: np.ndarray | None
    counts_BT: np.ndarray  # bool: the query enters the loss (method.md 5.2)
    length_BC: np.ndarray  # int32: tokens of each chat; 0: the row has no such chat
    first_BC: np.ndarray  # int32: the first position in the chat that counts
    targets_BLD: np.ndarray | None = None  # the states after the final norm; None: the inputs

    @property
    def predicted_BLD(self) -> np.ndarray | None:
        """The states that the draft predicts, and that give the target's logits."""
        return self.inputs_BLI if self.targets_BLD is None else self.targets_BLD


class _Entry(NamedTuple):
    """A chat that has something to learn from."""

    tokens: list[int]
    states_LD: np.ndarray | StoredStates | None
    counting: np.ndarray  # positions that enter the loss, ascending
    length: int  # tokens that are used

    @property
    def queries(self) -> int:
        """Positions that are asked for a prediction."""
        return int(self.counting[-1] - self.counting[0]) + 1


class BatchLoader:
    """Batches of `batch` rows of `row_tokens`, forever; every row once per epoch."""

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
        taps: int = 0,
    ):
        """states: of each chat [length, D], as `states.target_states` returns them; None: batches
        come without. taps: how many of the target's layers stand before its final states in them.

        batch: lines over all processes; a batch has those of this process, batch / share.count of
        them. pack: a line holds several chats; which ones go together is the same in every epoch.
        """
        self._chats: list[_Entry] = []
        for row, states_LD in zip(
            rows, [None] * len(rows) if states is None else states, strict=True
        ):
            length = min(row_tokens, len(row.tokens))
            # The last position predicts a token that is not there; the others count where the chat
            # is supervised.
            counting = np.flatnonzero(row.supervised[: length - 1])
            if len(counting):  # else its answer lies beyond the cut: there is nothing to learn from
                # Nothing sees what follows the last position that counts.
                self._chats.append(
                    _Entry(
                        row.tokens, states_LD, counting, int(counting[-1]) + 1 if pack else length
                    )
                )
        self.left_out = len(rows) - len(self._chats)  # chats that teach nothing here
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
                f"train.batch is {batch}, which {share.count} processes do not divide; make it "
                f"a multiple of {share.count}"
            )
        self._batch, self._width, self._seed, self._share = batch, row_tokens, seed, share
        self._taps = taps
        self._most_chats = max(map(len, self._rows))
        self._queries = max(sum(self._chats[at].queries for at in row) for row in self._rows)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; the few rows left over are in another epoch's order."""
        return len(self._rows) // self._batch

    @property
    def padding(self) -> float:
        """Share of the positions of all rows that is padding."""
        return self._share_left(len(self._rows))

    @property
    def padding_unpacked(self) -> float:
        """What it would be with a row for each chat."""
        return self._share_left(len(self._chats))

    def _share_left(self, rows: int) -> float:
        return 1 - sum(chat.length for chat in self._chats) / (self._width * rows)

    def batch_at(self, step: int) -> Batch:
        """This process's lines of the batch of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        lines = self._batch // self._share.count
        first = place * self._batch + self._share.index * lines
        return self._fill([self._rows[index] for index in order[first : first + lines]])

    def sample(self, count: int) -> Batch:
        """The first `count` chats of epoch 0's order, or all there are, as one batch of a row each;
        the same for every process.
        """
        order = np.random.default_rng([self._seed, 0]).permutation(len(self._chats))
        return self._fill([[index] for index in order[:count]])

    def _fill(self, lines: Sequence[Sequence[int]]) -> Batch:
        """A batch with these chats in each line."""
        B, C = len(lines), self._most_chats
        batch = Batch(
            tokens_BL=np.zeros((B, self._width), np.int32),
            inputs_BLI=None,
            counts_BT=np.zeros((B, self._queries), bool),
            length_BC=np.zeros((B, C), np.int32),
            first_BC=np.zeros((B, C), np.int32),
        )
        for line, picked in enumerate(lines):
            slot = query = 0
            for place, chat in enumerate(self._chats[index] for index in picked):
                batch.length_BC[line, place], batch.first_BC[line, place] = (
                    chat.length,
                    chat.counting[0],
                )
                batch.tokens_BL[line, slot : slot + chat.length] = chat.tokens[: chat.length]
                batch.counts_BT[line, query + chat.counting - chat.counting[0]] = True
                slot, query = slot + chat.length, query + chat.queries
        states_BLI = self._states(lines)
        if states_BLI is None or not self._taps:
            return batch._replace(inputs_BLI=states_BLI)
        final = states_BLI.shape[-1] - states_BLI.shape[-1] // (self._taps + 1)
        return batch._replace(
            inputs_BLI=states_BLI[..., :final], targets_BLD=states_BLI[..., final:]
        )

    def _states(self, lines: Sequence[Sequence[int]]) -> np.ndarray | None:
        """The states of the same."""

        def read(chat):
            return np.asarray(chat.states_LD)[: chat.length]

        if self._chats[0].states_LD is None:
            return None
        found = [np.concatenate([read(self._chats[index]) for index in picked]) for picked in lines]
        states_BLI = np.zeros((len(lines), self._width, found[0].shape[1]), found[0].dtype)
        for line, states_LD in enumerate(found):
            states_BLI[line, : len(states_LD)] = states_LD
        return states_BLI


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which chats share a row of `width` tokens, by index: longest first, each where the least
    space stays free.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # tokens left and the row, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        found = bisect_left(free, (lengths[index], 0))
        space, row = free.pop(found) if found < len(free) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(free, (space - lengths[index], row))
    return rows

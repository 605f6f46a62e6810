"""Fixed-shape training batches from rows and their states.

The order is a function of (seed, epoch) and the position is the step number: resuming needs one integer. Of n processes
each reads its own lines of every batch, so that together they see what one alone would.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from beagle_jax.data.share import ALONE, Share
from beagle_jax.data.states import StoredStates
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError


class Batch(NamedTuple):
    """One step's rows, right-padded to a common length L.

    Each row is asked for predictions at T neighbouring positions from `first_B` on, where all that count lie.
    """

    tokens_BL: np.ndarray  # int32
    states_BLD: np.ndarray | None  # the target's states, zeros in the padding; None: computed inside the step
    counts_BT: np.ndarray  # bool: position first_B + t enters the loss (method.md 5.2)
    length_B: np.ndarray  # int32: tokens that are not padding
    first_B: np.ndarray  # int32: the first position that counts


class _Entry(NamedTuple):
    """A row that has something to learn from."""

    tokens: list[int]
    states_LD: np.ndarray | StoredStates | None
    counting: np.ndarray  # positions that enter the loss, ascending


class BatchLoader:
    """Batches of `batch` rows, cut at `row_tokens`, forever; every row once per epoch."""

    def __init__(
        self,
        rows: Sequence[Row],
        states: Sequence[np.ndarray | StoredStates] | None,
        *,
        batch: int,
        row_tokens: int,
        seed: int,
        share: Share = ALONE,
    ):
        """states: of each row [length, D], as `states.target_states` returns them; None: batches come without.

        batch: lines over all processes; a batch has those of this process, batch / share.count of them.
        """
        # The last position predicts a token that is not there; the others count where the row is supervised.
        counting = [np.flatnonzero(row.supervised[: min(row_tokens, len(row.tokens)) - 1]) for row in rows]
        # A row whose answer lies beyond the cut has nothing to learn from.
        triples = zip(rows, [None] * len(rows) if states is None else states, counting, strict=True)
        self._kept = [_Entry(row.tokens, states_LD, positions) for row, states_LD, positions in triples if len(positions)]
        if len(self._kept) < batch:
            raise UserError(
                f"train.batch is {batch}, but only {len(self._kept)} rows have an answer within train.row_tokens = {row_tokens}; "
                "lower train.batch or write more answers (data.answer_tokens)"
            )
        if batch % share.count:
            raise UserError(f"train.batch is {batch}, which {share.count} processes do not divide; make it a multiple of {share.count}")
        self._batch, self._width, self._seed, self._share = batch, row_tokens, seed, share
        self._queries = max(entry.counting[-1] - entry.counting[0] + 1 for entry in self._kept)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; the few rows left over are in another epoch's order."""
        return len(self._kept) // self._batch

    @property
    def padding(self) -> float:
        """Share of the positions of all rows that is padding."""
        return 1 - sum(min(self._width, len(entry.tokens)) for entry in self._kept) / (self._width * len(self._kept))

    def batch_at(self, step: int) -> Batch:
        """This process's lines of the batch of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._kept))
        lines = self._batch // self._share.count
        first = place * self._batch + self._share.index * lines
        return self._pack([self._kept[index] for index in order[first : first + lines]])

    def sample(self, count: int) -> Batch:
        """The first `count` rows of epoch 0's order, or all there are, as one batch; the same for every process."""
        order = np.random.default_rng([self._seed, 0]).permutation(len(self._kept))
        return self._pack([self._kept[index] for index in order[:count]])

    def _pack(self, picked: Sequence[_Entry]) -> Batch:
        B, L = len(picked), self._width
        batch = Batch(
            tokens_BL=np.zeros((B, L), np.int32),
            states_BLD=None,
            counts_BT=np.zeros((B, self._queries), bool),
            length_B=np.array([min(L, len(entry.tokens)) for entry in picked], np.int32),
            first_B=np.array([entry.counting[0] for entry in picked], np.int32),
        )
        for line, entry in enumerate(picked):
            length = batch.length_B[line]
            batch.tokens_BL[line, :length] = entry.tokens[:length]
            batch.counts_BT[line, entry.counting - entry.counting[0]] = True
        if picked[0].states_LD is None:
            return batch
        states = [np.asarray(entry.states_LD)[:L] for entry in picked]
        states_BLD = np.zeros((B, L, states[0].shape[1]), states[0].dtype)
        for line, states_LD in enumerate(states):
            states_BLD[line, : len(states_LD)] = states_LD
        return batch._replace(states_BLD=states_BLD)

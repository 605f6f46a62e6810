"""Fixed-shape training batches from rows and their states.

The order is a function of (seed, epoch) and the position is the step number: resuming needs one integer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from beagle_jax.data.template import Row
from beagle_jax.errors import UserError


class Batch(NamedTuple):
    """One step's rows, right-padded to a common length L.

    Each row is asked for predictions at T neighbouring positions from `first_B` on, where all that count lie.
    """

    tokens_BL: np.ndarray  # int32
    states_BLD: np.ndarray  # the target's states, zeros in the padding
    counts_BT: np.ndarray  # bool: position first_B + t enters the loss (method.md 5.2)
    length_B: np.ndarray  # int32: tokens that are not padding
    first_B: np.ndarray  # int32: the first position that counts


class _Entry(NamedTuple):
    """A row that has something to learn from."""

    tokens: list[int]
    states_LD: np.ndarray
    counting: np.ndarray  # positions that enter the loss, ascending


class BatchLoader:
    """Batches of `batch` rows, cut at `row_tokens`, forever; every row once per epoch."""

    def __init__(self, rows: Sequence[Row], states: Sequence[np.ndarray], *, batch: int, row_tokens: int, seed: int):
        """states: the target's states [length, D] of each row, as `states.target_states` returns them."""
        # The last position predicts a token that is not there; the others count where the row is supervised.
        counting = [np.flatnonzero(row.supervised[: min(row_tokens, len(row.tokens)) - 1]) for row in rows]
        # A row whose answer lies beyond the cut has nothing to learn from.
        triples = zip(rows, states, counting, strict=True)
        self._kept = [_Entry(row.tokens, states_LD, positions) for row, states_LD, positions in triples if len(positions)]
        if len(self._kept) < batch:
            raise UserError(
                f"train.batch is {batch}, but only {len(self._kept)} rows have an answer within train.row_tokens = {row_tokens}; "
                "lower train.batch or write more answers (data.answer_tokens)"
            )
        self._batch, self._width, self._seed = batch, row_tokens, seed
        self._queries = max(entry.counting[-1] - entry.counting[0] + 1 for entry in self._kept)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; the few rows left over are in another epoch's order."""
        return len(self._kept) // self._batch

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._kept))
        return self._pack([self._kept[index] for index in order[place * self._batch : (place + 1) * self._batch]])

    def sample(self, count: int) -> Batch:
        """The first `count` rows of epoch 0's order, or all there are, as one batch."""
        order = np.random.default_rng([self._seed, 0]).permutation(len(self._kept))
        return self._pack([self._kept[index] for index in order[:count]])

    def _pack(self, picked: Sequence[_Entry]) -> Batch:
        B, L, D = len(picked), self._width, picked[0].states_LD.shape[1]
        batch = Batch(
            tokens_BL=np.zeros((B, L), np.int32),
            states_BLD=np.zeros((B, L, D), picked[0].states_LD.dtype),
            counts_BT=np.zeros((B, self._queries), bool),
            length_B=np.array([min(L, len(entry.tokens)) for entry in picked], np.int32),
            first_B=np.array([entry.counting[0] for entry in picked], np.int32),
        )
        for line, entry in enumerate(picked):
            length = batch.length_B[line]
            batch.tokens_BL[line, :length] = entry.tokens[:length]
            batch.states_BLD[line, :length] = entry.states_LD[:length]
            batch.counts_BT[line, entry.counting - entry.counting[0]] = True
        return batch

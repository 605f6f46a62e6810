"""Fixed-shape training batches from rows and their states.

The order is a function of (seed, epoch) and the position is the step number: resuming needs one integer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from beagle_jax.data.template import Row
from beagle_jax.errors import UserError


class Batch(NamedTuple):
    """One step's rows, right-padded to a common length."""

    tokens_BL: np.ndarray  # int32
    states_BLD: np.ndarray  # the target's states, zeros in the padding
    counts_BL: np.ndarray  # bool: the position enters the loss (method.md 5.2)
    length_B: np.ndarray  # int32: tokens that are not padding


class BatchLoader:
    """Batches of `batch` rows, cut at `row_tokens`, forever; every row once per epoch."""

    def __init__(self, rows: Sequence[Row], states_MD: np.ndarray, *, batch: int, row_tokens: int, seed: int):
        """states_MD: states of all rows end to end, as `states.target_states` returns them."""
        starts = np.cumsum([0, *(len(row.tokens) for row in rows)])
        # A row whose answer lies beyond the cut has nothing to learn from.
        self._kept = [
            (row, int(start)) for row, start in zip(rows, starts) if any(row.supervised[: min(row_tokens, len(row.tokens)) - 1])
        ]
        if len(self._kept) < batch:
            raise UserError(
                f"train.batch is {batch}, but only {len(self._kept)} rows have an answer within train.row_tokens = {row_tokens}; "
                "lower train.batch or write more answers (data.answer_tokens)"
            )
        self._states_MD, self._batch, self._width, self._seed = states_MD, batch, row_tokens, seed

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

    def _pack(self, picked: Sequence[tuple[Row, int]]) -> Batch:
        B, L, D = len(picked), self._width, self._states_MD.shape[1]
        batch = Batch(
            tokens_BL=np.zeros((B, L), np.int32),
            states_BLD=np.zeros((B, L, D), self._states_MD.dtype),
            counts_BL=np.zeros((B, L), bool),
            length_B=np.zeros(B, np.int32),
        )
        for line, (row, start) in enumerate(picked):
            length = min(L, len(row.tokens))
            batch.length_B[line] = length
            batch.tokens_BL[line, :length] = row.tokens[:length]
            batch.states_BLD[line, :length] = self._states_MD[start : start + length]
            # The last position predicts a token that is not there.
            batch.counts_BL[line, : length - 1] = row.supervised[: length - 1]
        return batch

"""Fixed-shape training batches from chats and their states, one or several chats per row.

The order of rows depends on (seed, epoch) only and the position in it is the step number, so
resuming needs one integer. With several processes, each reads the rows of a batch that its own
devices hold; together they read the same batches as a single process.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from beagle_jax.arrays import AnyArray
from beagle_jax.data.share import ALONE, Share
from beagle_jax.data.states import StoredStates
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError


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

    @property
    def predicted_BLD(self) -> AnyArray | None:
        """States that the draft predicts; the target's logits are computed from them."""
        return self.inputs_BLI if self.targets_BLD is None else self.targets_BLD


class _Entry(NamedTuple):
    """A chat with at least one position that enters the loss."""

    tokens: list[int]
    states_LD: np.ndarray | StoredStates | None
    counting: np.ndarray  # positions that enter the loss, ascending
    length: int  # number of tokens that are used

    @property
    def queries(self) -> int:
        """Number of positions that the draft predicts."""
        return int(self.counting[-1] - self.counting[0]) + 1


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
        taps: int = 0,
    ) -> None:
        """Selects the chats that enter the loss and assigns them to rows.

        states: [length, D] of each chat, as `states.target_states` returns them; None: batches have
        no states. batch: rows over all processes; this process returns batch / share.count of them.
        pack: put several chats in a row, the same ones in every epoch. taps: number of layers of
        the target that precede the final states in each record.

        Raises:
            UserError: there are fewer rows than `batch`, or share.count does not divide `batch`.
        """
        self._chats: list[_Entry] = []
        for row, states_LD in zip(
            rows, [None] * len(rows) if states is None else states, strict=True
        ):
            length = min(row_tokens, len(row.tokens))
            # The last position has no next token to predict; the others enter the loss where the
            # chat is supervised.
            counting = np.flatnonzero(row.supervised[: length - 1])
            if len(counting):  # else the answer lies after the cut, and the chat is skipped
                # The loss does not depend on tokens after the last position that enters it.
                self._chats.append(
                    _Entry(
                        row.tokens, states_LD, counting, int(counting[-1]) + 1 if pack else length
                    )
                )
        self.left_out = len(rows) - len(
            self._chats
        )  # chats without a position that enters the loss
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
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        lines = self._batch // self._share.count
        first = place * self._batch + self._share.index * lines
        return self._fill([self._rows[index] for index in order[first : first + lines]])

    def sample(self, count: int) -> Batch:
        """Returns the first `count` chats of epoch 0 as one batch, each in its own row.

        The batch has fewer rows if there are fewer chats. It is the same for every process.
        """
        order = np.random.default_rng([self._seed, 0]).permutation(len(self._chats))
        return self._fill([[index] for index in order[:count]])

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
                tokens_BL[line, slot : slot + chat.length] = chat.tokens[: chat.length]
                counted_BT[line, query + chat.counting - chat.counting[0]] = True
                slot, query = slot + chat.length, query + chat.queries
        batch = Batch(tokens_BL, None, counted_BT, length_BC, first_BC)
        states_BLI = self._states(lines)
        if states_BLI is None or not self._taps:
            return batch._replace(inputs_BLI=states_BLI)
        final = states_BLI.shape[-1] - states_BLI.shape[-1] // (self._taps + 1)
        return batch._replace(
            inputs_BLI=states_BLI[..., :final], targets_BLD=states_BLI[..., final:]
        )

    def _states(self, lines: Sequence[Sequence[int]]) -> np.ndarray | None:
        """Returns the states of each row's chats, zeros in the padding; None without states."""

        def read(chat: _Entry) -> np.ndarray:
            return np.asarray(chat.states_LD)[: chat.length]

        if self._chats[0].states_LD is None:
            return None
        parts = [
            np.concatenate([read(self._chats[index]) for index in members]) for members in lines
        ]
        states_BLI = np.zeros((len(lines), self._width, parts[0].shape[1]), parts[0].dtype)
        for line, states_LD in enumerate(parts):
            states_BLI[line, : len(states_LD)] = states_LD
        return states_BLI


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

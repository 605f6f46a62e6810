"""Answers many requests in the rows of one state: a finished row takes the next request.

Compiled programs depend only on the number of rows, the capacity and padded prompt lengths. An
answer does not depend on the row or on the other requests.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from beagle_jax.decoding.engine import admit, advance, begin, peek, release
from beagle_jax.decoding.requests import Answer, Codec, Finish, Piece, Request, rounds_through
from beagle_jax.decoding.round import Chunk, Round
from beagle_jax.decoding.sampling import filters_of, knobs_of
from beagle_jax.decoding.state import DecodeState, Requests, Snapshot
from beagle_jax.decoding.text import TextStream
from beagle_jax.model.cache import round_up

PROMPT_BUCKET = 64  # smallest padded length; longer lengths double. Each length compiles once
PREFILL_CHUNK = 512  # longer prompts are read in chunks of this many tokens
ADMIT_ROWS = 16  # largest number of prompts read at once
ROUNDS_PER_LOOK = 8  # rounds between two reads by the host, if it needs text before the end
_ALL_ROUNDS = 2**31 - 1


@dataclass
class _Line:
    """Host data of a row: the request that it answers."""

    index: int
    request: Request
    text: TextStream | None
    count: int = 0  # tokens taken from the row so far


@dataclass
class Session:
    """Iterator over pieces of the answers to some requests, in no fixed order of requests."""

    now: Round
    codec: Codec
    requests: Sequence[Request]
    rows: int
    capacity: int
    streaming: bool = False  # yield pieces early, not only whole answers
    prefill_seconds: float = field(default=0.0, init=False)
    decode_seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        samplings = [request.sampling for request in self.requests]
        self.now = replace(self.now, filters=filters_of(samplings))
        self._texts = [self.codec.stream(request.stop) for request in self.requests]

    def __iter__(self) -> Iterator[Piece]:
        looking = self.streaming or any(request.stop for request in self.requests)
        most = np.int32(ROUNDS_PER_LOOK if looking else _ALL_ROUNDS)
        waiting = list(range(len(self.requests)))
        lines: list[_Line | None] = [None] * self.rows
        state = begin(self.now.reading, batch=self.rows, capacity=self.capacity)
        ready: Snapshot | None = None  # taken before the rounds that are running
        while waiting or any(lines):
            state, admitted = self._refill(state, lines, waiting)
            clock = time.perf_counter()
            if looking and (admitted or ready is None):
                ready = peek(state)
            state, coming = advance(self.now, state, most, self._enough(lines, waiting))
            # The device runs the next rounds while the host decodes text of the last ones.
            snapshot = Snapshot(*jax.device_get(ready if looking else coming))
            ready = coming
            self.decode_seconds += time.perf_counter() - clock
            ended_B = np.zeros(self.rows, bool)
            for row, line in enumerate(lines):
                if line is not None:
                    yield (piece := self._piece(line, row, snapshot))
                    if piece.answer is not None:
                        lines[row], ended_B[row] = None, not snapshot.done_B[row]
            if ended_B.any() and (waiting or any(lines)):
                state = release(state, ended_B)

    def first_state(self) -> DecodeState:
        """Returns the state after the first prompts, one in each row."""
        state = begin(self.now.reading, batch=self.rows, capacity=self.capacity)
        return self._refill(state, [None] * self.rows, list(range(self.rows)))[0]

    def first_reading(self) -> jax.stages.Lowered:
        """Returns the lowered program that reads the first chunk of the first prompts."""
        width = min(ADMIT_ROWS, self.rows)
        chunk = next(self._chunks(list(range(width)), list(self.requests[:width]), width))
        state = begin(self.now.reading, batch=self.rows, capacity=self.capacity)
        return admit.lower(self.now.reading, state, chunk, first=True)

    def _enough(self, lines: list[_Line | None], waiting: list[int]) -> np.int32:
        """Returns how many rows must be done before rounds stop.

        All rows, or as many as the next requests need.
        """
        if not waiting:
            return np.int32(self.rows)
        group = min(self._width(waiting), len(waiting))
        return np.int32(min(lines.count(None) + group, self.rows))

    def _width(self, waiting: list[int]) -> int:
        """Returns how many prompts to read at once: one size at the start, one for refills.

        A half-empty prefill costs as much as a full one, and idle rows cost even more.
        """
        filled = len(waiting) < len(self.requests)
        return min(ADMIT_ROWS, max(1, self.rows // 4) if filled else self.rows)

    def _refill(
        self, state: DecodeState, lines: list[_Line | None], waiting: list[int]
    ) -> tuple[DecodeState, bool]:
        """Admits waiting requests to free rows. Also returns whether any was admitted."""
        clock, admitted = time.perf_counter(), False
        width = self._width(waiting)
        free = [row for row, line in enumerate(lines) if line is None]
        while waiting and len(free) >= min(width, len(waiting)):
            taken, waiting[:width] = waiting[:width], []
            rows, free = free[: len(taken)], free[len(taken) :]
            for row, index in zip(rows, taken, strict=True):
                lines[row] = _Line(index, self.requests[index], self._texts[index])
            requests = [self.requests[index] for index in taken]
            for number, chunk in enumerate(self._chunks(rows, requests, width)):
                state = admit(self.now.reading, state, chunk, first=number == 0)
            admitted = True
        if admitted:
            jax.block_until_ready(state.transcript.root_B)
            self.prefill_seconds += time.perf_counter() - clock
        return state, admitted

    def _chunks(self, rows: list[int], requests: list[Request], width: int) -> Iterator[Chunk]:
        """Splits the prompts of some requests into chunks.

        If there are fewer prompts than `width`, the last one is repeated, which has no effect.
        """
        requests = requests + requests[-1:] * (width - len(requests))
        row_R = np.array(rows + rows[-1:] * (width - len(rows)), np.int32)
        length_R = np.array([len(request.tokens) for request in requests], np.int32)
        token_RT = np.zeros((width, padded(max(length_R))), np.int32)
        for line, request in enumerate(requests):
            token_RT[line, : length_R[line]] = request.tokens
        arrays = self._arrays(requests, length_R)
        for start in range(0, token_RT.shape[1], PREFILL_CHUNK):
            chunk_RT = token_RT[:, start : start + PREFILL_CHUNK]
            yield Chunk(row_R, chunk_RT, np.array(start, np.int32), length_R, arrays)

    def _arrays(self, requests: list[Request], length_R: np.ndarray) -> Requests:
        most = [min(request.max_new_tokens, self.codec.context) for request in requests]
        limit_R = np.minimum(most, self.codec.context - length_R).astype(np.int32)
        seed_R = np.array([request.seed % 2**32 for request in requests], np.uint32)
        return Requests(
            limit_R,
            jax.vmap(jax.random.key)(seed_R),
            knobs_of([request.sampling for request in requests]),
        )

    def _piece(self, line: _Line, row: int, snapshot: Snapshot) -> Piece:
        """Returns the tokens and text that a row wrote since the last read."""
        count = int(snapshot.count_B[row])
        tokens = snapshot.out_BS[row, line.count : count].tolist()
        text = "" if line.text is None else line.text.add(tokens)
        line.count = count
        ended = line.text is not None and line.text.tokens_at_stop is not None
        if not (snapshot.done_B[row] or ended):
            return Piece(line.index, tokens, text, None)
        if line.text is not None:
            text += line.text.close()
        return Piece(line.index, tokens, text, self._answer(line, row, snapshot))

    def _answer(self, line: _Line, row: int, snapshot: Snapshot) -> Answer:
        tokens = snapshot.out_BS[row, : line.count].tolist()
        accepted = snapshot.accepted_BS[row, : snapshot.rounds_B[row]]
        finish: Finish = "context"
        if line.text is not None and line.text.tokens_at_stop is not None:
            tokens, finish = tokens[: line.text.tokens_at_stop], "string"
            accepted = np.array(rounds_through(accepted.tolist(), len(tokens)), np.int32)
        elif snapshot.broken_B[row]:
            finish = "error"
        elif tokens[-1] in self.codec.eos_ids:
            finish = "token"
        elif len(tokens) >= line.request.max_new_tokens:
            finish = "length"
        histogram = np.bincount(accepted, minlength=self.now.tree.depth + 1).tolist()
        text = "" if line.text is None else line.text.whole()
        return Answer(tokens, text, finish, len(accepted), histogram)


def padded(length: int) -> int:
    """Returns the padded length of a prompt in the prefill."""
    if length > PREFILL_CHUNK:
        return round_up(length, PREFILL_CHUNK)
    return max(PROMPT_BUCKET, 1 << (int(length) - 1).bit_length())

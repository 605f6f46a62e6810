"""Answers many requests in the rows of one state: a finished row takes the next request.

Programs depend on the rows, the capacity and padded prompt lengths alone. Request n is answered as
if it were alone, in whatever row it runs. Long prompts are read in chunks with rounds of the other
rows between them.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from beagle_jax.decoding.engine import (
    admit,
    advance,
    begin,
    carry,
    grow,
    peek,
    release,
)
from beagle_jax.decoding.logprobs import TokenLogProb, token_logprobs
from beagle_jax.decoding.penalties import Ends
from beagle_jax.decoding.programs import smallest
from beagle_jax.decoding.requests import (
    NOT_FINITE,
    Answer,
    Codec,
    DraftedTree,
    Finish,
    Piece,
    Request,
    rounds_through,
)
from beagle_jax.decoding.round import Chunk, Round
from beagle_jax.decoding.sampling import Filters, knobs_of
from beagle_jax.decoding.state import DecodeState, Requests, Snapshot
from beagle_jax.decoding.text import TextStream
from beagle_jax.model.cache import round_up
from beagle_jax.sharding import whole

PROMPT_BUCKET = 64  # shortest padded prompt; longer ones go up by doubling: one compile each
PREFILL_CHUNK = 512  # prompts longer than this are read in pieces of it
ADMIT_ROWS = 16  # prompts read at once
ROUNDS_PER_LOOK = 8  # rounds between two looks of the host, where it has to look
CAPACITY_BUCKET = 128  # caches have a multiple of so many slots
_ALL_ROUNDS = 2**31 - 1


@dataclass
class _Line:
    """Host data of a row: the request that it answers."""

    index: int
    request: Request
    text: TextStream | None
    began: float  # time.perf_counter
    reading: bool = True  # parts of its prompt are still to be read
    count: int = 0  # tokens taken from the row so far
    rounds: int = 0  # and rounds


@dataclass
class _Reading:
    """Prompts that are read into their rows, chunk by chunk."""

    lines: list[_Line]
    chunks: Iterator[Chunk]


@dataclass(frozen=True)
class Earlier:
    """What a session of one row goes on from: the first request begins with a text that was read.

    The earlier state is not changed.
    """

    state: DecodeState  # of one row
    start: int  # tokens of the first prompt that are not read again, at least one

    @property
    def slots(self) -> int:
        """Cache slots of the earlier state."""
        return self.state.transcript.out_BS.shape[1]


@dataclass
class Session:
    """Requests being answered. Iterate over it for their pieces, in no fixed order of requests.

    source: the requests, taken one by one as rows become free; the n-th one's pieces have index n.
    It may yield None, which means that no request waits now: the session goes on and asks again
    later. now.filters must cover all requests.
    """

    now: Round
    codec: Codec
    source: Iterable[Request | None]
    rows: int
    capacity: int  # slots at first; longer requests enlarge the caches
    streaming: bool = False  # pieces are wanted early, and not only whole answers
    rounds_per_look: int = ROUNDS_PER_LOOK  # rounds between two looks of the host
    wide_start: bool = True  # the first prompts fill all rows, and are read at once
    # Steps of rounds, each covered by the next, the last equal to now.filters. A round has the
    # first that suffice for the running requests. Without any it has those of now.filters.
    programs: Sequence[Filters] = ()
    earlier: Earlier | None = None
    prefill_seconds: float = field(default=0.0, init=False)
    decode_seconds: float = field(default=0.0, init=False)
    passes: int = field(default=0, init=False)  # rounds of the batch so far
    # On the device, after the last rounds; None before the first, and while it is donated.
    state: DecodeState | None = field(default=None, init=False)
    _cancelled: set[int] = field(default_factory=set, init=False)

    def _start(self) -> DecodeState:
        """Begins with the first request; returns rows without requests."""
        self._coming = iter(self.source)
        self._ahead: deque[tuple[int, Request]] = deque()
        self._count, self._open, self._filled = 0, True, not self.wide_start
        self._lines: list[_Line | None] = [None] * self.rows
        self._readings: deque[_Reading] = deque()
        self._looking = self.streaming
        self._started, self._start_at = False, 0
        if self.earlier is not None:
            state = carry(self.now.reading, self.earlier.state, capacity=self.capacity)
        else:
            state = begin(self.now.reading, batch=self.rows, capacity=self.capacity)
        # Weights that were put on a device stay there ("committed"), and so does every state that
        # was computed with them. The first state is of no weights: without this, jit would compile
        # the reading of prompts twice.
        embed_VD = self.now.target.params["embed_VD"]
        if self.now.mesh is None and embed_VD.committed:
            placed = embed_VD.sharding
            if isinstance(placed, NamedSharding):  # training puts the weights on a mesh
                assert isinstance(placed.mesh, Mesh)
                placed = whole(placed.mesh)
            state = jax.device_put(state, placed)
        return state

    def cancel(self, index: int) -> None:
        """Ends the request with this index, at the next look of the host: `finish="cancelled"`."""
        self._cancelled.add(index)

    def __iter__(self) -> Iterator[Piece]:
        state = self._start()
        ready: Snapshot | None = None  # of before the rounds that run
        while self._waits() or any(self._lines) or self._open:
            yield from self._unwanted()
            state, admitted = self._refill(state)
            if not any(line and not line.reading for line in self._lines):
                continue
            clock = time.perf_counter()
            looking, now = self._looking, self._rounds()
            if looking and (admitted or ready is None):
                ready = peek(state, logprobs=now.filters.logprobs is not None)
            hurried = looking or self._readings or (self._open and not self._ahead)
            most = np.int32(self.rounds_per_look if hurried else _ALL_ROUNDS)
            self.state, (state, coming) = None, advance(now, state, most, self._enough())
            self.state = state
            # The next rounds run while the host turns the last ones into text.
            if not hurried:
                _wait_for(coming)
            snapshot = Snapshot(*jax.device_get(ready if looking else coming))
            ready = coming
            self.decode_seconds += time.perf_counter() - clock
            ended_B = np.zeros(self.rows, bool)
            for row, line in enumerate(self._lines):
                if line is not None and not line.reading:
                    yield (piece := self._piece(line, row, snapshot))
                    if piece.answer is not None:
                        self._lines[row], ended_B[row] = None, not snapshot.done_B[row]
                        self._cancelled.discard(line.index)
            self.passes = int(snapshot.passes_B[0])
            if ended_B.any() and (self._waits() or any(self._lines) or self._open):
                self.state, state = None, release(state, ended_B)
                self.state = state

    def _rounds(self) -> Round:
        """The rounds that the running requests need."""
        running = [line.request for line in self._lines if line and not line.reading]
        now = self.now
        if self.programs:
            now = replace(now, filters=smallest(self.programs, running))
        return now if any(request.draft for request in running) else now.plain

    def _unwanted(self) -> Iterator[Piece]:
        """Ends requests that were cancelled while their prompts are read, by groups of prompts.

        The rows need no `release`: a row whose prompt is being read is done.
        """
        for reading in tuple(self._readings):
            lines = [line for line in reading.lines if line.reading]
            if any(line.index not in self._cancelled for line in lines):
                continue
            self._readings = deque(other for other in self._readings if other is not reading)
            for line in lines:
                self._cancelled.discard(line.index)
                row = next(row for row, other in enumerate(self._lines) if other is line)
                self._lines[row] = None
                none = Answer([], "", "cancelled", 0, [0] * (self.now.tree.depth + 1))
                yield Piece(line.index, [], "", none)

    def first_state(self) -> DecodeState:
        """Returns the state after the first prompts, one in each row."""
        state, _ = self._refill(self._start())
        while self._readings:
            state, _ = self._refill(state)
        return state

    def first_reading(self) -> jax.stages.Lowered:
        """The program that reads the first chunk of the first prompts."""
        state = self._start()
        self._pull(self._width())
        requests = [request for _, request in self._ahead]
        chunk = next(self._chunks(list(range(len(requests))), requests, self._width()))
        return admit.lower(self.now.reading, state, chunk, first=True)

    def _pull(self, count: int) -> None:
        """Takes requests from the source until `count` of them wait."""
        while self._open and len(self._ahead) < count:
            try:
                request = next(self._coming)
            except StopIteration:
                self._open = False
                return
            if request is None:
                return
            self._looking |= bool(request.stop) or request.seconds is not None
            self._ahead.append((self._count, request))
            self._count += 1

    def _waits(self) -> bool:
        """Is there a request without a row?"""
        self._pull(self._width())
        return bool(self._ahead)

    def _enough(self) -> np.int32:
        """Rows that must be done before the rounds stop: all, or those that the next requests
        need. Rows whose prompt is being read count as done.
        """
        if self._readings or not self._ahead:
            return np.int32(self.rows)
        group = min(self._width(), len(self._ahead))
        return np.int32(min(self._lines.count(None) + group, self.rows))

    def _width(self) -> int:
        """Prompts to read at once: two sizes, one for the first rows and one for refills.

        A half-empty prefill costs as much as a full one, and idle rows cost even more.
        """
        return min(ADMIT_ROWS, max(1, self.rows // 8) if self._filled else self.rows)

    def _refill(self, state: DecodeState) -> tuple[DecodeState, bool]:
        """Gives free rows to waiting requests, and reads one chunk of each group of prompts.

        Returns whether anything was read.
        """
        clock, filled = time.perf_counter(), False
        free = [row for row, line in enumerate(self._lines) if line is None]
        while self._waits() and len(free) >= min(self._width(), len(self._ahead)):
            width = self._width()
            taken = [self._ahead.popleft() for _ in range(min(width, len(self._ahead)))]
            rows, free = free[: len(taken)], free[len(taken) :]
            requests = [request for _, request in taken]
            state = self._with_room(state, requests)
            for row, (index, request) in zip(rows, taken, strict=True):
                text = self.codec.stream(request.stop, request.end_tokens(self.codec.eos_ids))
                self._lines[row] = _Line(index, request, text, clock)
            lines = [line for row in rows if (line := self._lines[row])]
            start = self._take_start()
            self._readings.append(_Reading(lines, self._chunks(rows, requests, width, start)))
            if start and state.history is not None:
                seen = list(requests[0].tokens[:start])
                prompt_BV = state.history.prompt_BV.at[0, np.array(seen)].set(True)
                state = state._replace(history=state.history._replace(prompt_BV=prompt_BV))
            filled = True
        self._filled |= filled
        groups = len(self._readings)
        for _ in range(groups):
            reading = self._readings.popleft()
            chunk = next(reading.chunks)
            follows, self._start_at = bool(self._start_at), 0
            self.state, state = (
                None,
                admit(self.now.reading, state, chunk, first=not chunk.offset, follows=follows),
            )
            self.state = state
            end = int(chunk.offset) + chunk.token_RT.shape[1]
            for line in reading.lines:
                line.reading &= len(line.request.tokens) > end
            if any(line.reading for line in reading.lines):
                self._readings.append(reading)
        if groups:
            jax.block_until_ready(state.transcript.root_B)
            self.prefill_seconds += time.perf_counter() - clock
        return state, groups > 0

    def _take_start(self) -> int:
        """Tokens of the next prompt that its row holds already: of the first prompt alone."""
        if self.earlier is None or self._started:
            return 0
        self._started, self._start_at = True, self.earlier.start
        return self.earlier.start

    def _with_room(self, state: DecodeState, requests: list[Request]) -> DecodeState:
        """A state with slots for these requests too."""
        overhang = self.now.tree.depth + 1
        need = max(slots(request, self.codec.context, overhang) for request in requests)
        if need <= self.capacity:
            return state
        self.capacity = need
        return grow(self.now.reading, state, capacity=need)

    def _chunks(
        self, rows: list[int], requests: list[Request], width: int, first: int = 0
    ) -> Iterator[Chunk]:
        """The prompts of some requests from token `first` on, in chunks. A chunk holds only prompts
        that reach it, as the others are answered already. What is missing to the width repeats the
        last one, which changes nothing.
        """
        longest = padded(max(len(request.tokens) for request in requests) - first)
        columns = min(longest, PREFILL_CHUNK)
        for start in range(first, first + longest, columns):
            # The last chunk ends where the cache ends.
            columns = min(columns, self.capacity - start)
            lines = [n for n, request in enumerate(requests) if len(request.tokens) > start]
            if not lines:
                return
            lines += lines[-1:] * (width - len(lines))
            chosen = [requests[line] for line in lines]
            token_RT = np.zeros((width, columns), np.int32)
            for line, request in enumerate(chosen):
                tokens = request.tokens[start : start + columns]
                token_RT[line, : len(tokens)] = tokens
            length_R = np.array([len(request.tokens) for request in chosen], np.int32)
            row_R = np.array([rows[line] for line in lines], np.int32)
            offset = np.array(start, np.int32)
            yield Chunk(row_R, token_RT, offset, length_R, self._arrays(chosen, length_R))

    def _arrays(self, requests: list[Request], length_R: np.ndarray) -> Requests:
        most = [min(request.max_new_tokens, self.codec.context) for request in requests]
        limit_R = np.minimum(most, self.codec.context - length_R).astype(np.int32)
        filters = self.now.filters
        knobs = knobs_of(
            [request.sampling for request in requests],
            self.codec.vocab_size if filters.bias else None,
        )
        ends = ends_of(requests, self.codec.eos_ids, filters.ends) if filters.ends else None
        drafts_R = np.array([request.draft for request in requests]) if filters.undrafted else None
        return Requests(limit_R, keys_of(requests), knobs, ends, drafts_R)

    def _piece(self, line: _Line, row: int, snapshot: Snapshot) -> Piece:
        """Returns the tokens and text that a row wrote since the last read."""
        count = int(snapshot.count_B[row])
        tokens = snapshot.out_BS[row, line.count : count].tolist()
        text = "" if line.text is None else line.text.add(tokens)
        rounds = int(snapshot.rounds_B[row])
        accepted = tuple(snapshot.accepted_BS[row, line.rounds : rounds].tolist())
        drafted = _drafted(snapshot, row) if accepted and line.request.draft else None
        line.count, line.rounds = count, rounds
        finish = self._finish(line, row, snapshot)
        logprobs = _logprobs(line.request, snapshot, row, tokens, count - len(tokens))
        if finish is None:
            return Piece(line.index, tokens, text, None, logprobs, accepted, drafted)
        if line.text is not None:
            text += line.text.close()
        answer = self._answer(line, row, snapshot, finish)
        return Piece(line.index, tokens, text, answer, logprobs, accepted, drafted)

    def _finish(self, line: _Line, row: int, snapshot: Snapshot) -> Finish | None:
        """Why a row's answer ends here; None if it goes on."""
        if line.text is not None and line.text.tokens_at_stop is not None:
            return "string"
        if snapshot.done_B[row]:
            last = snapshot.out_BS[row, line.count - 1]
            if snapshot.broken_B[row]:
                return "error"
            if last in line.request.end_tokens(self.codec.eos_ids):
                return "token"
            return "length" if line.count >= line.request.max_new_tokens else "context"
        if line.index in self._cancelled:
            return "cancelled"
        seconds = line.request.seconds
        late = seconds is not None and time.perf_counter() - line.began > seconds
        return "time" if late else None

    def _answer(self, line: _Line, row: int, snapshot: Snapshot, finish: Finish) -> Answer:
        tokens = snapshot.out_BS[row, : line.count].tolist()
        accepted = snapshot.accepted_BS[row, : snapshot.rounds_B[row]]
        if finish == "string":
            assert line.text is not None
            tokens = tokens[: line.text.tokens_at_stop]
            accepted = np.array(rounds_through(accepted.tolist(), len(tokens)), np.int32)
        histogram = np.bincount(accepted, minlength=self.now.tree.depth + 1).tolist()
        text = "" if line.text is None else line.text.whole()
        logprobs = _logprobs(line.request, snapshot, row, tokens)
        error = NOT_FINITE if finish == "error" else None
        return Answer(
            tokens, text, finish, len(accepted), histogram, logprobs=logprobs, error=error
        )


def _wait_for(snapshot: Snapshot) -> None:
    """Waits until whole answers are decoded, and notices Ctrl-C meanwhile.

    A call that waits for a device does not: this thread waits for another one, which calls it.
    """
    done = threading.Event()

    def wait() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the caller's read raises it
            jax.block_until_ready(snapshot)
        done.set()

    threading.Thread(target=wait, name="decoding", daemon=True).start()
    done.wait()


def ends_of(requests: Sequence[Request], eos_ids: tuple[int, ...], width: int) -> Ends:
    """The end tokens of some requests, as arrays of the host."""
    token_RE = np.full((len(requests), width), -1, np.int32)
    for row, request in enumerate(requests):
        tokens = request.end_tokens(eos_ids)
        token_RE[row, : len(tokens)] = tokens
    return Ends(token_RE, np.array([request.min_new_tokens for request in requests], np.int32))


def keys_of(requests: Sequence[Request]) -> jax.Array:
    """The random key [R] of each request."""
    seed_R = np.array([request.seed % 2**32 for request in requests], np.uint32)
    choice_R = np.array([request.choice for request in requests], np.uint32)
    return _keys(seed_R, choice_R)


@jax.jit
def _keys(seed_R: jax.Array, choice_R: jax.Array) -> jax.Array:
    """One program, whether or not there are several answers to a prompt."""
    key_R = jax.vmap(jax.random.key)(seed_R)
    return jnp.where(choice_R > 0, jax.vmap(jax.random.fold_in)(key_R, choice_R), key_R)


def _logprobs(
    request: Request, snapshot: Snapshot, row: int, tokens: list[int], first: int = 0
) -> list[TokenLogProb] | None:
    if request.logprobs is None:
        return None
    assert snapshot.logprobs is not None
    return token_logprobs(snapshot.logprobs, row, tokens, first, request.logprobs)


def _drafted(snapshot: Snapshot, row: int) -> DraftedTree | None:
    """The tree of a row's last round; None if it is not reported."""
    if snapshot.drafted is None:
        return None
    return DraftedTree(*(array_BW[row].tolist() for array_BW in snapshot.drafted))


def slots(request: Request, context: int, overhang: int) -> int:
    """Cache slots that a request needs, in buckets. overhang: nodes that a round may add."""
    most = min(len(request.tokens) + request.max_new_tokens, context) + overhang
    return round_up(most, CAPACITY_BUCKET)


def padded(length: int) -> int:
    """Returns the padded length of a prompt in the prefill."""
    if length > PREFILL_CHUNK:
        return round_up(length, PREFILL_CHUNK)
    return max(PROMPT_BUCKET, 1 << (int(length) - 1).bit_length())

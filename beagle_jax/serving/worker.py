"""The thread that decodes: takes waiting tickets in their order, delivers pieces.

One session of the engine answers everything. A ticket waits for nothing but a row.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tqdm import tqdm

from beagle_jax.config import ServeConfig
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.requests import Piece, Request
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.session import PREFILL_CHUNK, PROMPT_BUCKET, Session
from beagle_jax.serving.metrics import Metrics
from beagle_jax.serving.refusal import Refusal
from beagle_jax.serving.ticket import Ticket

_log = logging.getLogger(__name__)

FAILURES = 3  # sessions in a row that end in an error before the server calls itself broken
# Prompts of these lengths have all shapes that a prefill can have.
_WARM_LENGTHS = (PROMPT_BUCKET, 2 * PROMPT_BUCKET, PREFILL_CHUNK // 2, PREFILL_CHUNK + 1)


class Worker:
    """The queue of a server and the thread that empties it."""

    def __init__(self, decoder: SpeculativeDecoder, serve: ServeConfig, metrics: Metrics) -> None:
        """decoder: with a context."""
        self._decoder, self._serve, self._metrics = decoder, serve, metrics
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}  # by their index in the session
        self._session: Session | None = None  # that runs
        self._closing: float | None = None  # when running answers are cut off
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        metrics.gauges["waiting"] = lambda: len(self._waiting)
        metrics.gauges["running"] = lambda: len(self._running)

    @property
    def healthy(self) -> bool:
        """Whether new requests have a chance."""
        return self._failures < FAILURES and self._thread.is_alive() and self._closing is None

    def start(self) -> None:
        """Begins to decode."""
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Puts the answers of one call into the queue, all or none.

        Raises:
            Refusal: the queue is full, or the server is about to stop.
        """
        with self._changed:
            if self._closing is not None:
                raise Refusal(503, "the server is about to stop; ask another one", retry_after=30)
            free = max(0, self._serve.rows - len(self._running))
            if len(self._waiting) + len(tickets) > self._serve.max_waiting + free:
                raise Refusal(
                    429,
                    f"{len(self._waiting)} answers wait already, and at most "
                    f"{self._serve.max_waiting} may; try again later",
                    code="queue_full",
                    retry_after=1,
                )
            self._waiting.extend(tickets)
            self._changed.notify()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Ends answers that nobody waits for; their rows are free after the round that runs."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Takes no more requests, refuses those that wait, and ends the running ones in time."""
        with self._changed:
            self._closing = time.monotonic() + seconds
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for ticket in waiting:
            _refuse(ticket, Refusal(503, "the server is about to stop; ask another one"))

    def join(self, seconds: float) -> bool:
        """Waits for the thread, after `close`. Returns whether it ended."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def warm_up(self) -> None:
        """Compiles all programs, so that no request compiles anything. Before `start`."""
        requests = tqdm(self._each_program(), desc="compile programs", unit="program")
        ended = 0

        def coming() -> Iterator[Request | None]:
            for count, request in enumerate(requests):
                while ended < count:
                    yield None
                yield request

        for piece in self._live(coming()):
            ended += piece.answer is not None

    def _each_program(self) -> list[Request]:
        """Requests that need every program, one after the other."""
        room = self._decoder.codec.context - 1
        brief = Request([0], max_new_tokens=2)
        lengths = {min(length, room) for length in _WARM_LENGTHS}
        if self._decoder.capacity - room // PREFILL_CHUNK * PREFILL_CHUNK < PREFILL_CHUNK:
            lengths.add(room)  # the last chunk of the longest prompts has a shape of its own
        # The first one is ended by the host.
        requests = [replace(brief, max_new_tokens=room, ignore_eos=True, seconds=1e-9)]
        requests += [replace(brief, tokens=[0] * length) for length in sorted(lengths)]
        for draft in (True, False):
            plain = replace(brief, draft=draft)
            requests += [plain, replace(plain, sampling=Sampling(1.0)), replace(plain, logprobs=0)]
        return requests

    def _live(self, source: Iterator[Request | None]) -> Session:
        serve = self._serve
        return self._decoder.live(source, serve.rows, rounds_per_look=serve.rounds_per_look)

    def _run(self) -> None:
        """Decodes until the server closes; a session that failed is followed by another one."""
        while self._wait():
            try:
                self._session = self._live(self._source())
                for piece in self._session:
                    self._take(piece)
                    self._sweep()
            # Whatever fails in the engine (memory of the device, its driver) must reach those who
            # wait for answers, and the next session may succeed.
            except Exception:
                _log.exception("decoding failed; the running answers end with status 500")
                self._failures += 1
                running, self._running = list(self._running.values()), {}
                for ticket in running:
                    _refuse(ticket, Refusal(500, "decoding failed; the server's log says why"))
            finally:
                self._session = None

    def _wait(self) -> bool:
        """Waits for a ticket. False once the server closes."""
        while True:
            self._sweep()
            with self._changed:
                if self._waiting:
                    return True
                if self._closing is not None:
                    return False
                self._changed.wait()

    def _source(self) -> Iterator[Request | None]:
        """The requests in the order of the queue; ends when the server closes."""
        count = 0
        while True:
            self._sweep()
            with self._changed:
                if not self._waiting and not self._running:
                    if self._closing is not None:
                        return
                    self._changed.wait()
                    continue
                ticket = None
                if self._waiting and len(self._running) < self._serve.rows:
                    ticket = self._running[count] = self._waiting.popleft()
                    count += 1
            if ticket is None:
                yield None
                continue
            ticket.began = time.monotonic()
            self._metrics.admitted(len(ticket.request.tokens), ticket.began - ticket.arrived)
            yield ticket.request

    def _take(self, piece: Piece) -> None:
        """Counts and delivers a piece."""
        ticket = self._running[piece.index]
        now = time.monotonic()
        if piece.tokens:
            first = ticket.last is None
            since = now - (ticket.arrived if ticket.last is None else ticket.last)
            self._metrics.piece(len(piece.tokens), piece.accepted, since, first)
            ticket.last = now
        if piece.answer is not None:
            del self._running[piece.index]
            ticket.ended = True
            self._failures = 0
            self._metrics.ended(piece.answer.finish, now - ticket.arrived)
        if (piece.tokens or piece.answer is not None) and not ticket.cancelled:
            ticket.deliver(piece)

    def _sweep(self) -> None:
        """Drops tickets that nobody waits for, or that waited too long."""
        now = time.monotonic()
        if self._session is not None:
            late = self._closing is not None and now > self._closing
            for index, ticket in self._running.items():
                if ticket.cancelled or late:
                    self._session.cancel(index)
        with self._changed:
            if not self._waiting:
                return
            limit = self._serve.queue_seconds
            expired = [
                ticket
                for ticket in self._waiting
                if not ticket.cancelled and now - ticket.arrived > limit
            ]
            if expired or any(ticket.cancelled for ticket in self._waiting):
                gone = {id(ticket) for ticket in expired}
                self._waiting = deque(
                    ticket
                    for ticket in self._waiting
                    if not ticket.cancelled and id(ticket) not in gone
                )
        for ticket in expired:
            refusal = Refusal(
                429,
                f"no row became free within {limit} s; try again later",
                code="queue_timeout",
                retry_after=5,
            )
            _refuse(ticket, refusal)


def _refuse(ticket: Ticket, refusal: Refusal) -> None:
    ticket.ended = True
    if not ticket.cancelled:
        ticket.deliver(refusal)

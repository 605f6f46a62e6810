"""The thread that decodes: takes waiting tickets in their order, delivers pieces.

A session of the engine runs one of a few programs (`ticket.programs`). A ticket that needs another
one waits until the running answers have ended; so do those behind it, since the order of the queue
is kept.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tqdm import tqdm

from beagle_jax.config import ServeConfig
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.requests import Piece, Request
from beagle_jax.decoding.sampling import Filters
from beagle_jax.decoding.session import PREFILL_CHUNK, PROMPT_BUCKET, Session, filters_for
from beagle_jax.serving.metrics import Metrics
from beagle_jax.serving.refusal import Refusal
from beagle_jax.serving.ticket import Ticket, covers, programs

_log = logging.getLogger(__name__)

FAILURES = 3  # sessions in a row that end in an error before the server calls itself broken
# Prompts of these lengths have all shapes that a prefill can have.
_WARM_LENGTHS = (PROMPT_BUCKET, 2 * PROMPT_BUCKET, PREFILL_CHUNK // 2, PREFILL_CHUNK + 1)


class Worker:
    """The queue of a server and the thread that empties it."""

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        serve: ServeConfig,
        metrics: Metrics,
        defaults: Request,
    ) -> None:
        """decoder: with a context. defaults: a request that sets nothing."""
        self._decoder, self._serve, self._metrics = decoder, serve, metrics
        self._defaults = defaults
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}  # by their index in the session
        self._session: Session | None = None  # that runs
        self._programs = self._all_programs()  # by plain
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

    def ticket(
        self,
        request: Request,
        *,
        plain: bool,
        trees: bool,
        deliver: Callable[[Piece | Refusal], None],
    ) -> Ticket:
        """A ticket for `submit`. trees: pieces hold the tree of their last round."""
        plain &= self._decoder.tree.depth > 0  # else every answer is
        needs = filters_for([request], self._decoder.codec.eos_ids)
        if trees and not plain:
            needs = needs._replace(drafted=self._decoder.tree.size)
        return Ticket(request, plain, needs, deliver)

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

    def _all_programs(self) -> dict[bool, tuple[Filters, ...]]:
        tree, eos_ids = self._decoder.tree, self._decoder.codec.eos_ids
        defaults = filters_for([self._defaults], eos_ids)
        # The page shows trees, and little is copied for them: with it, every program reports them.
        shown = defaults._replace(drafted=tree.size if self._serve.page else 0)
        drafting = programs(shown, len(eos_ids), tree.size)
        return {False: drafting, True: programs(defaults, len(eos_ids), 0) if tree.depth else ()}

    def warm_up(self) -> None:
        """Compiles all programs, so that no request compiles anything. Before `start`."""
        room = self._decoder.codec.context - 1
        brief = replace(self._defaults, max_new_tokens=2, min_new_tokens=0, seconds=None)
        lengths = {min(length, room) for length in _WARM_LENGTHS}
        if self._decoder.capacity - room // PREFILL_CHUNK * PREFILL_CHUNK < PREFILL_CHUNK:
            lengths.add(room)  # the last chunk of the longest prompts has a shape of its own
        requests = [
            replace(brief, tokens=[0] * length, choice=choice)
            for length in sorted(lengths)
            for choice in range(2)
        ]
        # The last one is ended by the host.
        requests.append(
            replace(brief, tokens=[0], max_new_tokens=64, ignore_eos=True, seconds=1e-9)
        )
        kinds = [(plain, each) for plain, several in self._programs.items() for each in several]
        for plain, filters in tqdm(kinds, desc="compile programs", unit="program"):
            for _ in self._live(iter(requests), plain, filters):
                pass

    def _live(self, source: Iterator[Request | None], plain: bool, filters: Filters) -> Session:
        return self._decoder.live(
            source,
            self._serve.rows,
            filters,
            plain=plain,
            rounds_per_look=self._serve.rounds_per_look,
        )

    def _run(self) -> None:
        """One session after the other, until the server closes."""
        while self._wait():
            with self._changed:
                if not self._waiting:
                    continue
                plain = self._waiting[0].plain
                filters = self._program()
            try:
                self._answer(plain, filters)
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

    def _program(self) -> Filters:
        """The smallest program for the first ticket."""
        first = self._waiting[0]
        return next(each for each in self._programs[first.plain] if covers(each, first.needs))

    def _answer(self, plain: bool, filters: Filters) -> None:
        self._session = self._live(self._source(plain, filters), plain, filters)
        for piece in self._session:
            self._take(piece)
            self._sweep()

    def _source(self, plain: bool, filters: Filters) -> Iterator[Request | None]:
        """The requests of a session; ends where one needs another program, or nothing is left."""
        count = 0
        while True:
            self._sweep()
            with self._changed:
                if not self._waiting and not self._running:
                    if self._closing is not None:
                        return
                    self._changed.wait()
                    continue
                ticket = self._waiting[0] if self._waiting else None
                if ticket is not None and not self._suits(ticket, plain, filters):
                    return
                if ticket is not None and len(self._running) < self._serve.rows:
                    self._waiting.popleft()
                    self._running[count] = ticket
                    count += 1
                else:
                    ticket = None
            if ticket is None:
                yield None
                continue
            ticket.began = time.monotonic()
            self._metrics.admitted(len(ticket.request.tokens), ticket.began - ticket.arrived)
            yield ticket.request

    def _suits(self, ticket: Ticket, plain: bool, filters: Filters) -> bool:
        """Whether the running session is the one for this ticket."""
        if ticket.plain != plain or not covers(filters, ticket.needs):
            return False
        # An idle session gives way to a smaller program.
        return bool(self._running) or self._program() == filters

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

"""One HTTP request's answers, as the event loop sees them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from beagle_jax.decoding.requests import Piece, Request
from beagle_jax.serving.refusal import Refusal
from beagle_jax.serving.ticket import Ticket
from beagle_jax.serving.worker import Worker


class Gone(Exception):
    """The client closed its connection."""


class Call:
    """The answers to one HTTP request. Use it as a context: leaving it ends what still runs."""

    def __init__(self, worker: Worker, requests: Sequence[Request]) -> None:
        """Must be made in the event loop that reads it."""
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Piece | Refusal]] = asyncio.Queue()
        self.arrived = time.monotonic()
        self.tickets = [
            Ticket(request, self._deliver(choice)) for choice, request in enumerate(requests)
        ]

    def __enter__(self) -> "Call":
        """Submits the answers. Raises Refusal if they are not taken."""
        self._worker.submit(self.tickets)
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.cancel([ticket for ticket in self.tickets if not ticket.ended])

    def _deliver(self, choice: int) -> Callable[[Piece | Refusal], None]:
        def deliver(event: Piece | Refusal) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: the server has stopped
                self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

        return deliver

    async def pieces(
        self, receive: Callable[[], Awaitable[Any]]
    ) -> AsyncIterator[tuple[int, Piece]]:
        """Yields (choice, piece) until each answer is whole. receive: the client's messages.

        Raises:
            Refusal: an answer failed.
            Gone: the client left.
        """
        gone = asyncio.ensure_future(_left(receive))
        event: asyncio.Future[tuple[int, Piece | Refusal]] | None = None
        try:
            missing = len(self.tickets)
            while missing:
                event = asyncio.ensure_future(self._events.get())
                await asyncio.wait((event, gone), return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    raise Gone
                choice, piece = event.result()
                if isinstance(piece, Refusal):
                    raise piece
                missing -= piece.answer is not None
                yield choice, piece
        finally:
            for future in (gone, event):
                if future is not None:
                    future.cancel()


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass

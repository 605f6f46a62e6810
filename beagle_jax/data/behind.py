"""Runs consumers of streams on a thread, while the caller makes the next items."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Behind:
    """Runs consumers of streams one after another on a thread of its own.

    A context manager: its exit waits for all consumers and raises the first error. The caller goes
    on to the next stream while the consumer of the last one finishes.
    """

    def __init__(self, limit: int) -> None:
        """Starts the thread. limit: bytes of items that wait for the consumer at most."""
        self._limit, self._running = limit, deque[Future[None]]()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self.waited = 0.0  # seconds that the caller waited for consumers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while self._running:
                self._finish_first(quietly=error is not None)
        finally:
            self._thread.shutdown(cancel_futures=True)

    def run(self, call: Callable[[], None]) -> None:
        """Runs a call on the thread as soon as the one before it has ended."""
        while self._running:
            self._finish_first()
        self._running.append(self._thread.submit(call))

    def send(
        self, consume: Callable[[Iterator[T]], None], items: Iterable[T], size: Callable[[T], int]
    ) -> None:
        """Runs `consume(stream)` on the thread, and puts the items into the stream.

        Returns when the last item is in the stream. size: bytes of an item. An error of `items`
        is raised here and in the consumer; one of a consumer here, at the latest by the exit.
        """
        while len(self._running) > 1 or self._has_ended():
            self._finish_first()
        stream = _Stream[T](self._limit)
        done = self._thread.submit(lambda: consume(iter(stream)))
        done.add_done_callback(lambda _: stream.abandon())
        self._running.append(done)
        try:
            for item in items:
                clock = time.perf_counter()
                goes_on = stream.put(item, size(item))
                self.waited += time.perf_counter() - clock
                if not goes_on:  # the consumer has ended: by an error
                    break
        except BaseException as error:
            stream.close(error)
            raise
        stream.close(None)
        while self._has_ended():
            self._finish_first()

    def _has_ended(self) -> bool:
        return bool(self._running) and self._running[0].done()

    def _finish_first(self, quietly: bool = False) -> None:
        clock = time.perf_counter()
        try:
            self._running.popleft().result()
        except BaseException:
            if not quietly:
                raise
        finally:
            self.waited += time.perf_counter() - clock


class _Stream(Generic[T]):
    """Items from one thread to another."""

    def __init__(self, limit: int) -> None:
        self._items, self._limit, self._bytes = deque[tuple[T, int]](), limit, 0
        self._closed = self._abandoned = False
        self._error: BaseException | None = None
        self._changed = Condition()

    def put(self, item: T, size: int) -> bool:
        """Adds an item as soon as there is room; returns whether anyone reads it."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._abandoned or not self._items or self._bytes + size <= self._limit
            )
            self._items.append((item, size))
            self._bytes += size
            self._changed.notify_all()
            return not self._abandoned

    def close(self, error: BaseException | None) -> None:
        """Ends the stream, for its reader with an error if there is one."""
        with self._changed:
            self._closed, self._error = True, error
            self._changed.notify_all()

    def abandon(self) -> None:
        """Says that nobody reads any more."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed)
                if self._error is not None:
                    raise self._error
                if not self._items:
                    return
                item, size = self._items.popleft()
            yield item
            with self._changed:  # the item counts until it is consumed
                self._bytes -= size
                self._changed.notify_all()

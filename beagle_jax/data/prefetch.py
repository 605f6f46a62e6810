"""Reads the next batches, and copies them to the devices, while the devices compute."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import jax

T = TypeVar("T")
U = TypeVar("U")

AHEAD = 2  # batches that are ready or on their way


def read_ahead(
    batch_at: Callable[[int], T], steps: Iterable[int], place: Callable[[T], U]
) -> Iterator[U]:
    """Yields place(batch_at(step)) for every step, in order, up to AHEAD steps in advance.

    One thread reads, another one copies to the devices and waits until the copy is complete. An
    exception of either is raised at its own step.
    """
    steps = iter(steps)

    def placed(batch: Future[T]) -> U:
        return jax.block_until_ready(place(batch.result()))

    with (
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as reader,
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="copies") as copier,
    ):

        def start(count: int) -> list[Future[U]]:
            batches = [reader.submit(batch_at, step) for step in islice(steps, count)]
            return [copier.submit(placed, batch) for batch in batches]

        coming = deque(start(AHEAD))
        try:
            while coming:
                ready = coming.popleft().result()
                coming.extend(start(1))
                yield ready
                del ready  # or its memory would wait for the next batch
        finally:  # the caller stopped early
            reader.shutdown(cancel_futures=True)
            copier.shutdown(cancel_futures=True)

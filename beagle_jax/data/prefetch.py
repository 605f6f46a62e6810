"""Reads the next batches while the device computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

AHEAD = 2  # batches that are ready or being read


def read_ahead(batch_at: Callable[[int], T], steps: Iterable[int]) -> Iterator[T]:
    """Yields batch_at(step) for every step, in order; a thread reads up to AHEAD steps in advance.

    An exception of `batch_at` is raised at its own step.
    """
    steps = iter(steps)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as reader:
        coming = deque(reader.submit(batch_at, step) for step in islice(steps, AHEAD))
        try:
            while coming:
                ready = coming.popleft().result()
                coming.extend(reader.submit(batch_at, step) for step in islice(steps, 1))
                yield ready
        finally:  # the caller stopped early
            reader.shutdown(cancel_futures=True)

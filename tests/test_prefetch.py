"""Reading ahead: what is read, when, in which order, and how it ends. No clocks."""

import threading

import jax
import numpy as np
import pytest

from beagle_jax.data import prefetch
from beagle_jax.data.prefetch import AHEAD


def read_ahead(batch_at, steps, place=lambda batch: batch):
    return prefetch.read_ahead(batch_at, steps, place)


class Reader:
    """Records what is read; step `broken` raises."""

    def __init__(self, broken: int | None = None):
        self.done, self.broken = [], broken
        self._changed = threading.Condition()

    def __call__(self, step: int) -> int:
        with self._changed:
            self.done.append(step)
            self._changed.notify_all()
        if step == self.broken:
            raise ValueError(f"step {step}")
        return step * 10

    def reaches(self, count: int) -> bool:
        """Whether so many steps are read without another request."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.done) >= count, timeout=20)


def check_reads_ahead(batches, reader: Reader) -> None:
    """With step 0 delivered, the next AHEAD steps are read without a request."""
    assert next(batches) == 0
    assert reader.reaches(1 + AHEAD)


def test_the_next_batches_are_read_while_the_caller_holds_one():
    reader = Reader()
    batches = read_ahead(reader, range(9))
    check_reads_ahead(batches, reader)
    assert list(batches) == [10 * step for step in range(1, 9)] and reader.done == list(range(9))


def test_a_loader_that_waits_to_be_asked_is_seen(monkeypatch):
    reader = Reader()
    monkeypatch.setattr(reader, "reaches", lambda count: len(reader.done) >= count)
    with pytest.raises(AssertionError):
        check_reads_ahead(map(reader, range(9)), reader)


def test_it_reads_no_further_than_that():
    reader = Reader()
    batches = read_ahead(reader, range(100))
    assert [next(batches), next(batches)] == [0, 10]
    batches.close()
    assert reader.done == list(range(len(reader.done))) and len(reader.done) <= 2 + AHEAD


def test_an_error_comes_at_its_step():
    batches, seen = read_ahead(Reader(broken=2), range(9)), []
    with pytest.raises(ValueError, match="step 2"):
        seen.extend(batches)
    assert seen == [0, 10]
    assert not threads_left()


def threads_left() -> list[threading.Thread]:
    names = ("batches", "copies")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


@pytest.mark.parametrize("count", [0, 1])
def test_few_steps(count):
    assert list(read_ahead(Reader(), range(count))) == [0] * count


class Copier:
    """Copies batches to the device; the copy of batch `broken` raises."""

    def __init__(self, broken: int | None = None):
        self.broken, self.threads = broken, set()

    def __call__(self, batch: int) -> jax.Array:
        self.threads.add(threading.current_thread().name)
        if batch == self.broken:
            raise ValueError(f"batch {batch}")
        return jax.device_put(np.full(3, batch))


def check_copied_aside(copier: Copier, copied: list) -> None:
    """Checks that batches are on the device, and that the caller's thread copied none."""
    assert all(isinstance(batch, jax.Array) for batch in copied)
    assert [int(batch[0]) for batch in copied] == [10 * step for step in range(9)]
    assert copier.threads and threading.current_thread().name not in copier.threads


def test_copies_to_the_device_are_made_by_a_thread_of_their_own():
    copier = Copier()
    check_copied_aside(copier, list(read_ahead(Reader(), range(9), copier)))
    assert all(name.startswith("copies") for name in copier.threads)


def test_copies_by_the_caller_are_seen():
    copier = Copier()
    with pytest.raises(AssertionError):
        check_copied_aside(copier, list(map(copier, read_ahead(Reader(), range(9)))))


def test_an_error_of_a_copy_comes_at_its_step():
    seen = []
    with pytest.raises(ValueError, match="batch 20"):
        seen.extend(read_ahead(Reader(), range(9), Copier(broken=20)))
    assert [int(batch[0]) for batch in seen] == [0, 10] and not threads_left()

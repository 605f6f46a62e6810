"""Work behind the caller: order, bound, errors, and that the caller goes on. No clocks."""

import threading

import pytest

from beagle_jax.data.behind import Behind


class Consumer:
    """Keeps what it is sent; waits before each item until `gate` is open; item `broken` raises."""

    def __init__(self, broken: int | None = None, is_open: bool = True):
        self.items: list[int] = []
        self.threads: set[str] = set()
        self.broken, self.gate, self.reached = broken, threading.Event(), threading.Event()
        if is_open:
            self.gate.set()

    def __call__(self, stream) -> None:
        for item in stream:
            self.reached.set()
            assert self.gate.wait(20)
            self.threads.add(threading.current_thread().name)
            if item == self.broken:
                raise OSError(f"item {item}")
            self.items.append(item)
        self.items.append(-1)  # the end


def one_byte(item) -> int:
    return 1


def check_in_order(consume, consumer: Consumer) -> None:
    """Checks that all items arrive in order, streams one after another, on one other thread."""
    with Behind(limit=4) as behind:
        for first in (0, 100, 200):
            behind.send(consume, range(first, first + 10), one_byte)
    assert consumer.items == [*range(10), -1, *range(100, 110), -1, *range(200, 210), -1]
    assert len(consumer.threads) == 1 and threading.current_thread().name not in consumer.threads


def test_streams_are_consumed_in_order_on_one_thread():
    consumer = Consumer()
    check_in_order(consumer, consumer)


def test_a_lost_item_is_seen():
    consumer = Consumer()
    with pytest.raises(AssertionError):
        check_in_order(lambda stream: consumer(item for item in stream if item != 105), consumer)


def test_the_caller_goes_on_to_the_next_stream_while_the_last_one_ends():
    """The end of a file, which waits for the disk, does not hold up the next file."""
    end, second = threading.Event(), []

    def slow_end(stream):
        list(stream)
        assert end.wait(20)

    with Behind(limit=100) as behind:
        behind.send(slow_end, range(3), one_byte)
        behind.send(second.extend, range(5), one_byte)  # would hang here
        assert second == []
        end.set()
    assert second == list(range(5))


def items_that_open(gate: threading.Event, made: list[int], after: int):
    for item in range(8):
        if item == after:
            gate.set()
        made.append(item)
        yield item


def test_the_caller_waits_when_too_much_waits():
    """Of items of 10 bytes, 30 bytes may wait: one is consumed, and the fifth is held back."""
    consumer, made = Consumer(is_open=False), []
    with Behind(limit=30) as behind:
        sender = threading.Thread(
            target=behind.send,
            args=(consumer, items_that_open(consumer.gate, made, 99), lambda _: 10),
        )
        sender.start()
        assert consumer.reached.wait(20)
        sender.join(0.2)
        assert sender.is_alive() and len(made) == 4
        consumer.gate.set()
        sender.join(20)
        assert behind.waited > 0
    assert consumer.items == [*range(8), -1]


def test_nothing_is_waited_for_while_there_is_room():
    consumer, made = Consumer(is_open=False), []
    with Behind(limit=1000) as behind:
        behind.send(consumer, items_that_open(consumer.gate, made, 7), one_byte)
    assert consumer.items == [*range(8), -1]


@pytest.mark.parametrize("broken", [0, 5, 9])
def test_an_error_of_a_consumer_ends_the_caller(broken):
    def work():
        with Behind(limit=2) as behind:
            for _ in range(3):
                behind.send(Consumer(broken=broken), range(10), one_byte)

    with pytest.raises(OSError, match=f"item {broken}"):
        work()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("behind")]


def test_an_error_of_the_caller_ends_the_consumer_too():
    """A file that is written halfway is then deleted, as its writer sees the error."""
    seen = []

    def consume(stream):
        try:
            list(stream)
        except ZeroDivisionError as error:
            seen.append(error)
            raise

    def work():
        with Behind(limit=2) as behind:
            behind.send(consume, (1 // (3 - item) for item in range(5)), one_byte)

    with pytest.raises(ZeroDivisionError):
        work()
    assert len(seen) == 1


def test_calls_run_one_after_another():
    done = []
    with Behind(limit=0) as behind:
        for number in range(4):
            behind.run(lambda number=number: done.append(number))
            assert len(done) >= number  # the one before has ended
    assert done == [0, 1, 2, 3]

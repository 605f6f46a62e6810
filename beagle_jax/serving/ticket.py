"""One answer on its way through the server."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from beagle_jax.decoding.requests import Piece, Request
from beagle_jax.decoding.sampling import Filters
from beagle_jax.serving.refusal import Refusal


@dataclass(eq=False)
class Ticket:
    """A request of the engine: it waits, has a row, or has ended. Times are `time.monotonic`."""

    request: Request
    plain: bool  # decode without the draft
    needs: Filters  # of its program
    deliver: Callable[[Piece | Refusal], None]  # called by the worker's thread
    arrived: float = field(default_factory=time.monotonic)
    began: float | None = None  # when it got a row
    last: float | None = None  # when its last tokens came
    cancelled: bool = False  # nobody waits for it any more
    ended: bool = False


def covers(program: Filters, needs: Filters) -> bool:
    """Whether a program can answer a request that needs these filters."""
    return all(has >= need for has, need in zip(_sizes(program), _sizes(needs), strict=True))


def union(first: Filters, second: Filters) -> Filters:
    """The smallest program for what either needs."""
    larger = {
        name: max(getattr(first, name), getattr(second, name), key=_size)
        for name in Filters._fields
    }
    return Filters(**larger)


def weight(program: Filters) -> int:
    """How many optional steps a program has."""
    switched_on = [value for value in program[:-3] if value]
    rest = (program.ends > 0, program.logprobs is not None, program.drafted > 0)
    return len(switched_on) + sum(rest)


def _sizes(filters: Filters) -> list[int]:
    return [_size(value) for value in filters]


def _size(value: bool | int | None) -> int:
    return -1 if value is None else int(value)

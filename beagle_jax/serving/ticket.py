"""One answer on its way through the server."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from beagle_jax.decoding.requests import MOST_ENDS, MOST_LOGPROBS, Piece, Request
from beagle_jax.decoding.sampling import Filters
from beagle_jax.decoding.session import ENDS_BUCKET
from beagle_jax.model.cache import round_up
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


def programs(defaults: Filters, own_ends: int, nodes: int) -> tuple[Filters, ...]:
    """The programs of a server, each covered by the next. The last one can answer every request.

    defaults: needed by requests that set nothing. own_ends: end tokens of the target. nodes: of the
    trees that requests may ask for; 0: none. The second program can draw, with every filter.
    """
    drawing = union(defaults, Filters(drawn=True, top_k=True, top_p=True, min_p=True))
    everything = drawing._replace(
        penalties=True,
        bias=True,
        ends=round_up(own_ends + MOST_ENDS, ENDS_BUCKET),
        logprobs=MOST_LOGPROBS,
        drafted=nodes,
    )
    return tuple(dict.fromkeys((defaults, drawing, union(drawing, everything))))


def union(first: Filters, second: Filters) -> Filters:
    """The smallest program for what either needs."""
    larger = {
        name: max(getattr(first, name), getattr(second, name), key=_size)
        for name in Filters._fields
    }
    return Filters(**larger)


def _sizes(filters: Filters) -> list[int]:
    return [_size(value) for value in filters]


def _size(value: bool | int | None) -> int:
    return -1 if value is None else int(value)

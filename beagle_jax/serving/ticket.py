"""One answer on its way through the server."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from beagle_jax.decoding.requests import Piece, Request
from beagle_jax.serving.refusal import Refusal


@dataclass(eq=False)
class Ticket:
    """A request of the engine: it waits, has a row, or has ended. Times are `time.monotonic`."""

    request: Request
    deliver: Callable[[Piece | Refusal], None]  # called by the worker's thread
    arrived: float = field(default_factory=time.monotonic)
    began: float | None = None  # when it got a row
    last: float | None = None  # when its last tokens came
    cancelled: bool = False  # nobody waits for it any more
    ended: bool = False

"""Turns SIGTERM and Ctrl-C into a clean stop. Schedulers send SIGTERM before they preempt."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Context manager in which SIGTERM and Ctrl-C set a flag instead of ending the process.

    A second Ctrl-C ends it at once.
    """

    # Number of calls of `requested` over all stages. Several processes agree on one of these
    # numbers to stop at, so it is never reset.
    _calls = 0

    def __init__(self) -> None:
        self.seen = False  # a stop was requested
        self.by_hand = False  # by Ctrl-C

    def __enter__(self) -> "StopSignal":
        # With several processes JAX's preemption service handles the signal, because all of them
        # must stop after the same step.
        catches = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        names = (signal.SIGTERM, signal.SIGINT) if catches else ()
        self._before = {name: signal.signal(name, self._see) for name in names}
        return self

    def __exit__(self, *exception: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def requested(self) -> bool:
        """Returns whether to stop now.

        Every process must call it after every step; all of them get the same answer.
        """
        if jax.process_count() > 1:
            StopSignal._calls += 1
            self.seen = multihost_utils.reached_preemption_sync_point(StopSignal._calls)
        return self.seen

    def _see(self, number: int, _frame: object) -> None:
        self.seen = True
        if number == signal.SIGINT:
            self.by_hand = True
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])

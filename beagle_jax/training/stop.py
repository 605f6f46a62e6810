"""Turns SIGTERM into a clean stop. Schedulers send it before they preempt a machine."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Context manager in which SIGTERM sets a flag instead of ending the process."""

    # Number of calls of `requested` over all stages. Several processes agree on one of these
    # numbers to stop at, so it is never reset.
    _calls = 0

    def __init__(self) -> None:
        self.seen = False  # a stop was requested

    def __enter__(self) -> "StopSignal":
        # With several processes JAX's preemption service handles the signal, because all of them
        # must stop after the same step.
        catches = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGTERM, self._see) if catches else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def requested(self) -> bool:
        """Returns whether to stop now.

        Every process must call it after every step; all of them get the same answer.
        """
        if jax.process_count() > 1:
            StopSignal._calls += 1
            self.seen = multihost_utils.reached_preemption_sync_point(StopSignal._calls)
        return self.seen

    def _see(self, *_: object) -> None:
        self.seen = True

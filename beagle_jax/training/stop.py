"""SIGTERM as a wish to stop: what schedulers send before they take a machine away."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """A context manager; inside it SIGTERM sets a mark instead of ending the process."""

    # how often, over all stages: several processes agree on one of these numbers to stop at, so
    # they never begin anew
    _asked = 0

    def __init__(self) -> None:
        self.seen = False  # somebody wishes to stop

    def __enter__(self) -> "StopSignal":
        # With several processes jax's own service catches the signal: all must stop after the same
        # step.
        catches = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGTERM, self._see) if catches else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self) -> bool:
        """Whether to stop now; every process asks after every step and gets the same answer."""
        if jax.process_count() > 1:
            StopSignal._asked += 1
            self.seen = multihost_utils.reached_preemption_sync_point(StopSignal._asked)
        return self.seen

    def _see(self, *_: object) -> None:
        self.seen = True

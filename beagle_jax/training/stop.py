"""SIGTERM as a wish to stop: what schedulers send before they take a machine away."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """A context manager; inside it SIGTERM sets a mark instead of ending the process."""

    def __init__(self) -> None:
        self._seen = False

    def __enter__(self) -> "StopSignal":
        # With several processes jax's own service catches the signal: all must stop after the same step.
        catches = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGTERM, self._see) if catches else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; every process asks after every step and gets the same answer."""
        return self._seen if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    def _see(self, *_: object) -> None:
        self._seen = True

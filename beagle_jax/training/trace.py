"""Writes a profiler's trace of a few training steps (`log.profile`)."""

import logging
from typing import Any

import jax

from beagle_jax.config import Config
from beagle_jax.remote import local, publish

_log = logging.getLogger(__name__)

FIRST = 2  # steps before the traced ones: the first compiles, and fills the caches


class Trace:
    """Traces `log.profile` steps of a stage, after its first steps in this process.

    Every process writes its own trace to <train.folder>/profile/<stage>; TensorBoard's profile
    plugin and Perfetto show it.
    """

    def __init__(self, config: Config, name: str) -> None:
        """Prepares the trace of the stage `name`; without `log.profile` nothing is traced."""
        self._steps = config.log.profile
        self._folder = local(config.train.folder) / "profile" / name
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace where it is due. step: counted from 0 in this process."""
        if self._steps and step == FIRST:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, outputs: Any) -> None:
        """Ends the trace where it is due, when the step's outputs are there."""
        if self._running and step == FIRST + self._steps - 1:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is running; a stage may end before its last traced step."""
        if self._running:
            jax.profiler.stop_trace()
            publish(self._folder)
            _log.info(f"a trace of training steps is in {self._folder}")
            self._running = False

"""Rates of a stage between two log records: tokens, utilisation of the chips, waiting.

Utilisation is the model's: it counts the operations of matrix products by formula
(training/cost.py) for the tokens that are there, not for padding.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import Mesh

from beagle_jax.config import Config, StageConfig
from beagle_jax.data.loader import Batch
from beagle_jax.hardware import chip_of, memory_stats
from beagle_jax.model.draft import DraftSpec
from beagle_jax.training.cost import row_flops, target_flops
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.step import Metrics, compute_dtype, learning_rates

# Names of figures that depend on the clock; two runs of the same numbers differ in them.
CLOCKED = (
    "tokens_per_second",
    "tokens_per_second_per_device",
    "utilisation",
    "data_wait",
    "checkpoint_wait",
    "memory_peak",
)


class Rates:
    """Times the steps of one stage, and what they wait for."""

    def __init__(
        self,
        name: str,
        config: Config,
        spec: DraftSpec,
        frozen: FrozenTarget,
        mesh: Mesh,
        padding: float,
    ) -> None:
        """Starts the clock. padding: share of padding in the loader's rows."""
        self._stage: StageConfig = config.train.named_stages[name]
        self._train, self._spec, self._frozen = config.train, spec, frozen
        self._devices = mesh.size
        self._peak = peak_rate(config, mesh)
        self._rate = learning_rates(self._stage)
        self._live = round(config.train.row_tokens * (1 - padding))  # tokens of a row, on average
        self.restart()

    def restart(self) -> None:
        """Begins a new interval; what happened since the last one is not counted."""
        self._clock = time.perf_counter()
        self._data = self._checkpoints = self._tokens = self._steps = 0.0

    def fed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches and times how long each is waited for."""
        waiting = iter(batches)
        while True:
            clock = time.perf_counter()
            batch = next(waiting, None)
            self._data += time.perf_counter() - clock
            if batch is None:
                return
            yield batch

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Times how long training waits for a checkpoint; most of its writing runs beside."""
        clock = time.perf_counter()
        yield
        self._checkpoints += time.perf_counter() - clock

    def add(self, metrics: Metrics) -> None:
        """Counts one step."""
        self._tokens += float(metrics.supervised)
        self._steps += 1

    def record(self, done: int, since: list[Metrics]) -> dict[str, float]:
        """Returns the figures of an interval that ends after `done` steps, and begins another.

        since: metrics of its steps; after a resumption also of steps before it.
        """
        seconds = time.perf_counter() - self._clock
        norms = np.array([metrics.grad_norm for metrics in since], np.float64)
        batches = self._train.accumulate
        rate = self._rate((done - 1) // batches * batches, batches)
        line = {
            "learning_rate": float(f"{float(rate):.6g}"),
            "grad_norm": round(float(norms.mean()), 4),
            "grad_norm_clipped": round(float(np.minimum(norms, self._train.clip_norm).mean()), 4),
            "tokens_per_second": round(self._tokens / seconds, 1),
            "tokens_per_second_per_device": round(self._tokens / seconds / self._devices, 1),
            "data_wait": round(self._data / seconds, 4),
            "checkpoint_wait": round(self._checkpoints / seconds, 4),
        }
        if memory := memory_stats(jax.local_devices()[0]).get("peak_bytes_in_use"):
            line["memory_peak"] = memory
        if self._peak:
            line["utilisation"] = round(self._flops() / (seconds * self._peak), 4)
        self.restart()
        return line

    def _flops(self) -> float:
        """Counts the operations of the interval's matrix products, over all devices."""
        rows = self._steps * self._train.batch
        queries = round(self._tokens / rows) if rows else 0
        vocabulary = self._frozen.head_VD.shape[0]
        row = row_flops(self._spec, self._stage, vocabulary, self._live, queries)
        if self._frozen.spec is not None:
            row += target_flops(self._frozen.spec, self._live)
        return rows * row


def peak_rate(config: Config, mesh: Mesh) -> float | None:
    """Published rate of all chips of the mesh, operations/s; None if it is not known."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if chip is None:
        return None
    half = compute_dtype(config.train, mesh) == "bfloat16"
    rate = chip.bfloat16 if half else chip.float32
    return rate and rate * mesh.size

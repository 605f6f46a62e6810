"""Progress of a stage: progress bar, log records, an error for a non-finite loss."""

import logging
import math
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from beagle_jax.config import Config, StageConfig
from beagle_jax.data.loader import BatchLoader
from beagle_jax.errors import UserError
from beagle_jax.training.metrics import Log
from beagle_jax.training.rates import Rates
from beagle_jax.training.step import AGREE_WITHIN, Metrics

_log = logging.getLogger(__name__)


class Progress:
    """Progress of one stage, starting at step `first`."""

    def __init__(
        self,
        name: str,
        config: Config,
        log: Log,
        training: BatchLoader,
        first: int,
        waiting: list[dict],
        rates: Rates,
        start: int = 0,
    ) -> None:
        """Opens the progress bar.

        waiting: metrics of the steps since the last log record, as the restored checkpoint has
        them (the property `waiting`). rates: times the stage. start: batches that the stages
        before have read.
        """
        stage: StageConfig = config.train.named_stages[name]
        self._name, self._every, self._log, self._training = name, config.log.every, log, training
        self._start = start
        self._place = config.train.place_of(name)
        self._bar = tqdm(
            total=stage.steps, initial=first, desc=f"{name} stage", unit="step", smoothing=0.05
        )
        # Checkpoints of older versions have other fields.
        known = [record for record in waiting if record.keys() == set(Metrics._fields)]
        self._since = [
            Metrics._make(np.asarray(record[field]) for field in Metrics._fields)
            for record in known
        ]
        self._rates = rates
        self._pending: list[tuple[int, Metrics]] = []  # of the newest step, not fetched yet

    @property
    def waiting(self) -> list[dict]:
        """Metrics of the steps since the last log record, without rounding, as JSON values."""
        return [
            {key: np.asarray(value).tolist() for key, value in record._asdict().items()}
            for record in self._since
        ]

    def took(self, done: int, metrics: Metrics) -> None:
        """Adds the metrics of the step before this one.

        This step's own are fetched when the next one has been dispatched, or by `settle`.

        Raises:
            UserError: as `add`.
        """
        self.settle()
        self._pending = [(done, metrics)]

    def settle(self) -> None:
        """Adds the metrics of the newest step, and waits for them."""
        pending, self._pending = self._pending, []
        for done, metrics in pending:
            self.add(done, metrics)

    def add(self, done: int, metrics: Metrics) -> None:
        """Adds the metrics of one step. done: number of steps completed, this one included.

        Raises:
            UserError: the loss or the gradient norm is not finite.
        """
        metrics = jax.device_get(metrics)
        loss = float(metrics.objective) / max(float(metrics.supervised), 1.0)
        if not math.isfinite(loss) or not math.isfinite(metrics.grad_norm):
            self._bar.close()
            raise UserError(
                f"{self._name} stage, step {done}: the loss is {loss}, the norm of its gradient "
                f"{float(metrics.grad_norm)}; the last checkpoint is kept. "
                f"{self._blame(self._start + done - 1)}"
            )
        self._since.append(metrics)
        self._rates.add(metrics)
        self._bar.update(1)
        if done % self._every == 0:
            self._write(done)

    def _blame(self, step: int) -> str:
        """Says whether the states of a batch or the training made it fail.

        step: the loader's number of the batch.
        """
        batch = self._training.batch_at(step).scaled()
        epoch, place = divmod(step, self._training.steps_per_epoch)
        where = f"Its batch is number {place} of epoch {epoch}"
        if batch.inputs_BLI is None:
            return (
                f"{where}. Lower {self._place}.learning_rate. If that does not help, the target's "
                "states, which this step computes, are not finite: try target.dtype=float32"
            )
        broken = np.flatnonzero(
            ~np.isfinite(np.asarray(batch.inputs_BLI, np.float32)).all(axis=(1, 2))
        )
        if not len(broken):
            return f"{where}, and its states are finite: lower {self._place}.learning_rate"
        tokens = np.asarray(batch.tokens_BL)[broken[0]]
        return (
            f"{where}; its row {', '.join(map(str, broken))} has states that are not finite "
            f"(row {broken[0]} begins with the tokens {tokens[:8].tolist()}): delete the "
            "states in data.folder, and the next run computes them again"
        )

    def _write(self, done: int) -> None:
        line = summary(self._since) | self._rates.record(done, self._since)
        self._since = []
        self._log.write({"stage": self._name, "step": done, **line})
        agree = " ".join(f"{share:.2f}" for share in line["top1_by_offset"])
        self._bar.set_postfix_str(
            f"loss {line['loss']:.3f}, top-1 {agree}, {line['tokens_per_second']:.0f} tok/s"
        )

    def held_out(self, done: int, batches: list[Metrics]) -> dict[str, Any]:
        """Logs, prints and returns loss and agreement on held-out chats."""
        line = summary(jax.device_get(batches))
        agree = " ".join(f"{share:.3f}" for share in line["top1_by_offset"])
        self.aside(
            done, "held_out", line, f"held-out loss {line['loss']:.3f}, top-1 by offset {agree}"
        )
        return line

    def aside(self, done: int, split: str, line: dict[str, Any], text: str) -> None:
        """Logs and prints a measurement, and excludes its time from the training speed."""
        self._log.write({"stage": self._name, "step": done, "split": split, **line})
        _log.info(f"{self._name} stage, step {done}: {text}")
        self._rates.restart()

    def close(self) -> None:
        """Closes the progress bar."""
        self._bar.close()


def summary(batches: list[Metrics]) -> dict[str, Any]:
    """Averages metrics over batches: sums first, then divides once."""

    def total(field: str) -> Any:
        return np.sum([getattr(metrics, field) for metrics in batches], axis=0, dtype=np.float64)

    rows = max(float(total("count_J").sum()), 1.0)
    share_JK = total("agree_JK") / np.maximum(total("count_J"), 1)[:, None]
    return {
        "loss": round(float(total("objective") / np.maximum(total("supervised"), 1)), 5),
        "ploss": round(float(total("ploss") / rows), 5),
        "vloss": round(float(total("vloss") / rows), 6),
    } | {
        f"top{within}_by_offset": [round(float(x), 4) for x in share_J]
        for within, share_J in zip(AGREE_WITHIN, share_JK.T, strict=True)
    }

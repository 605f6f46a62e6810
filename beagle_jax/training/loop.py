"""Runs a stage: batches in, checkpoints, log lines and a progress bar out."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from beagle_jax.config import Config, StageConfig
from beagle_jax.data.loader import BatchLoader
from beagle_jax.errors import UserError
from beagle_jax.model.beagle import DraftSpec
from beagle_jax.training.checkpoint import StageCheckpoints
from beagle_jax.training.step import Metrics, make_steps


def run_stage(
    name: str,
    config: Config,
    spec: DraftSpec,
    params: dict[str, jax.Array],
    frozen: dict[str, jax.Array],
    training: BatchLoader,
    held_out: BatchLoader | None,
) -> dict[str, jax.Array]:
    """Trains one stage ('early' or 'late') from `params`, or from its newest checkpoint; returns the parameters.

    Appends one JSON line per `log.every` steps to <train.folder>/log.jsonl. Raises UserError when the loss stops
    being finite; the last checkpoint then stands.
    """
    stage: StageConfig = getattr(config.train, name)
    folder = Path(config.train.folder)
    train_step, eval_step, init = make_steps(spec, config.train, stage, late=name == "late")
    with StageCheckpoints(folder / "checkpoints" / name, _settings(name, config)) as checkpoints:
        # A copy, since the step donates its state and the caller may still hold the parameters.
        fresh = init(jax.tree.map(lambda x: x.copy(), params))
        state = checkpoints.restore(fresh) or fresh
        first = int(state.step)
        if first:
            tqdm.write(f"{name} stage: going on from step {first} of {stage.steps}")
        report = _Report(name, stage, config, folder / "log.jsonl", first)
        last_metrics: Metrics | None = None
        for step in report.steps():
            state, metrics = train_step(state, frozen, training.batch_at(step), config.train.seed)
            if last_metrics is not None:
                report.add(step, last_metrics)  # read only now, with the next step already under way
            last_metrics = metrics
            if (step + 1) % config.train.checkpoint_every == 0 or step + 1 == stage.steps:
                report.add(step + 1, last_metrics)
                last_metrics = None
                checkpoints.save(state, step + 1)
                if held_out is not None:
                    report.held_out(step + 1, [eval_step(state.params, frozen, batch) for batch in _once(held_out)])
        report.close()
    return state.params


def _settings(name: str, config: Config) -> dict[str, Any]:
    """All that decides what a stage computes. The early stage does not depend on the late one's settings."""
    free = ("folder", "checkpoint_every", "loss_rows", *(["late"] if name == "early" else []))
    made = {key: value for key, value in asdict(config.train).items() if key not in free}
    made |= {"target": config.target.source, "dtype": config.target.dtype, "data": config.data.folder}
    made |= {"answer_tokens": config.data.answer_tokens}
    made |= {key: value for key, value in asdict(config.draft).items() if key != "path"} | {"eval_rows": config.log.eval_rows}
    return json.loads(json.dumps(made))


def _once(loader: BatchLoader) -> Iterator[Any]:
    return (loader.batch_at(step) for step in range(loader.steps_per_epoch))


class _Report:
    """Progress bar and log.jsonl of one stage."""

    def __init__(self, name: str, stage: StageConfig, config: Config, path: Path, first: int):
        self._name, self._every, self._path = name, config.log.every, path
        self._vloss_weight = config.train.vloss_weight
        self._bar = tqdm(total=stage.steps, initial=first, desc=f"{name} stage", unit="step", smoothing=0.05)
        self._range = range(first, stage.steps)
        self._since: list[Metrics] = []
        self._clock = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)

    def steps(self) -> range:
        """Steps still to do, counted from 0."""
        return self._range

    def add(self, done: int, metrics: Metrics) -> None:
        """Takes the metrics of one finished step; `done` steps are finished."""
        metrics = jax.device_get(metrics)
        loss = float(metrics.objective) / max(float(metrics.supervised), 1.0)
        if not math.isfinite(loss) or not math.isfinite(metrics.grad_norm):
            self._bar.close()
            raise UserError(f"{self._name} stage, step {done}: the loss is {loss}, its gradient's norm "
                            f"{float(metrics.grad_norm)}; the last checkpoint is kept. "
                            f"Lower train.{self._name}.learning_rate, or look for broken states in data.folder")
        self._since.append(metrics)
        self._bar.update(1)
        if done % self._every == 0:
            self._write(done)

    def _write(self, done: int) -> None:
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        line = _summary(self._since)
        line["tokens_per_second"] = round(sum(float(m.supervised) for m in self._since) / seconds, 1)
        line["grad_norm"] = round(float(np.mean([m.grad_norm for m in self._since])), 4)
        self._since = []
        self._log({"stage": self._name, "step": done, **line})
        agree = " ".join(f"{share:.2f}" for share in line["top1_by_offset"])
        self._bar.set_postfix_str(f"loss {line['loss']:.3f}, top-1 {agree}, {line['tokens_per_second']:.0f} tok/s")

    def held_out(self, done: int, batches: list[Metrics]) -> None:
        """Logs and prints agreement on chats kept out of training."""
        line = _summary(jax.device_get(batches))
        self._log({"stage": self._name, "step": done, "split": "held_out", **line})
        agree = " ".join(f"{share:.3f}" for share in line["top1_by_offset"])
        tqdm.write(f"{self._name} stage, step {done}: held-out loss {line['loss']:.3f}, top-1 by offset {agree}")
        self._clock = time.perf_counter()

    def _log(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


def _summary(batches: list[Metrics]) -> dict[str, Any]:
    """Sums over batches, divided once."""
    total = lambda field: np.sum([getattr(metrics, field) for metrics in batches], axis=0, dtype=np.float64)
    rows = max(float(total("count_J").sum()), 1.0)
    return {
        "loss": round(float(total("objective") / np.maximum(total("supervised"), 1)), 5),
        "ploss": round(float(total("ploss") / rows), 5),
        "vloss": round(float(total("vloss") / rows), 6),
        "top1_by_offset": [round(float(x), 4) for x in total("agree_J") / np.maximum(total("count_J"), 1)],
    }

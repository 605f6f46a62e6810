"""Measures drafts during training, keeps the best of each stage, stops a stage early.

The best has the highest tau, or the lowest held-out loss (`eval.best_by`). Training does not decode
by itself: the caller passes the functions that measure and save a draft.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from beagle_jax.config import Config, Identity
from beagle_jax.data.share import wait_for_all
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json
from beagle_jax.processes import from_first, is_first
from beagle_jax.remote import fetch

_log = logging.getLogger(__name__)

Params = dict[str, Any]


class Best:
    """Best measurement of each stage so far, in a file so that a resumed run knows it.

    A measurement belongs to all settings that decide it: those of its stage and of the stages
    before, of `decode` and of `eval`. With other settings it is ignored, and a line says so.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        measure: Callable[[Params], dict],
        keep: Callable[[Path, Params, dict], None],
        restore: Callable[[Path], Params],
    ) -> None:
        """Reads the file at `path` if it exists.

        measure: maps parameters to a dictionary of metrics that includes "tau". keep: saves the
        draft that is now the best of its stage to a folder, with its metrics. restore: reads the
        parameters of such a folder.

        Raises:
            UserError: the file is not JSON.
        """
        self._path, self._config = path, config.eval
        self._measure, self._keep, self._restore = measure, keep, restore
        self._run_began, self._spent, self._last = time.perf_counter(), 0.0, 0.0
        self._made_with = {stage: _identity(config, stage) for stage in config.train.named_stages}
        self._default = _identity(Config(target=config.target), None)
        stored = read_json(path, "", "delete it, and tau is compared anew") if path.exists() else {}
        self._stages: dict[str, dict] = {
            stage: best
            for stage, best in (stored.get("stages") or {}).items()
            if self._comparable(stage, stored.get("made_with") or {})
        }

    @property
    def by_loss(self) -> bool:
        """Whether the held-out loss decides, and not tau."""
        return self._config.best_by == "held_out_loss"

    @property
    def folder(self) -> Path | None:
        """Folder of the best draft of all stages; None if no measured draft is kept.

        Losses of different stages are not comparable, as their weights differ: there it is the
        best of the last stage.
        """
        saved = [stage for stage in self._stages if self.folder_of(stage) is not None]
        if not saved:
            return None
        if self.by_loss:
            return self.folder_of(saved[-1])
        return self.folder_of(max(saved, key=lambda stage: self._stages[stage]["tau"]))

    def folder_of(self, stage: str) -> Path | None:
        """Folder of the best draft of a stage; None if there is none."""
        if stage not in self._stages:
            return None
        folder = fetch(self._root / stage)
        if (folder / "config.json").exists():
            return folder
        # Version 0.1.0 kept the best draft of all stages alone.
        return self._root if _older(self._root).get("best", {}).get("stage") == stage else None

    @property
    def _root(self) -> Path:
        return self._path.parent / "best"

    def due(self, done: int, steps: int) -> bool:
        """Returns whether to measure after `done` of a stage's `steps`.

        A measurement that would take more than `eval.most_time` of the run is left out, but for
        the last one of a stage.
        """
        if done == steps:
            return True
        if done % self._config.every:
            return False
        return self._config.most_time is None or self._affordable(self._config.most_time)

    def look(self, stage: str, done: int, params: Params, figures: dict | None = None) -> dict:
        """Measures the draft, keeps it if it is its stage's best, and returns its metrics.

        figures: what was measured already; None: tau is measured, with all processes, and the
        seconds that it took are returned too, with their share of the run's time.
        """
        timing: dict[str, float] = {}
        if figures is None:
            figures, timing = self._timed(params)
        key = self._config.best_by
        before, now = self._stages.get(stage, {}).get(key), figures[key]
        if before is None or (now < before if self.by_loss else now > before):
            if is_first():
                self._keep(self._root / stage, params, {"stage": stage, "step": done, **figures})
            self._stages[stage] = {"step": done, key: figures[key]}
            if is_first():
                made_with = {name: dict(self._made_with[name].values) for name in self._stages}
                written = {"made_with": made_with, "stages": self._stages}
                write_text(self._path, json.dumps(written, indent=1) + "\n")
        return figures | timing

    def _timed(self, params: Params) -> tuple[dict, dict[str, float]]:
        """Measures tau; returns its metrics, and what depends on the clock."""
        clock = time.perf_counter()
        figures = self._measure(params)
        self._last = time.perf_counter() - clock
        self._spent += self._last
        share = self._spent / (time.perf_counter() - self._run_began)
        return figures, {"seconds": round(self._last, 2), "share_of_run": round(share, 4)}

    def _affordable(self, most: float) -> bool:
        """Whether another measurement keeps to its share of the time; the first process decides."""
        whole = time.perf_counter() - self._run_began + self._last
        return bool(from_first(float(self._spent + self._last <= most * whole)))

    def exhausted(self, stage: str, done: int) -> bool:
        """Returns whether nothing has improved for `eval.patience` measurements of this stage.

        Measurements that were left out count too.
        """
        if not self._config.patience or stage not in self._stages:
            return False
        return done - self._stages[stage]["step"] >= self._config.patience * self._config.every

    def weights(self, stage: str, done: int, last: Params) -> Params:
        """Returns the best parameters of a stage, from its folder; `last` if it is not exhausted.

        last: those after `done` steps, which also give the shardings.
        """
        if not self.exhausted(stage, done):
            return last
        wait_for_all("the best draft")  # the first process writes it
        folder = self.folder_of(stage)
        if folder is None:
            _log.info(f"{stage} stage: its best draft is not there; its last one is gone on from")
            return last
        best = self._restore(folder)
        return {name: jax.device_put(best[name], last[name].sharding) for name in last}

    def _comparable(self, stage: str, made_with: Mapping[str, Any]) -> bool:
        """Whether the stored tau of a stage was measured with this run's settings."""
        if stage not in self._made_with:
            return False
        now = self._made_with[stage]
        if isinstance(made_with.get(stage), dict):
            changed = now.diff(Identity.read(made_with[stage]), self._default.values)
        else:  # version 0.1.0: the settings of `eval`, and those that the draft names
            draft = _older(self._root)
            sections = {"train": draft.get("training"), "data": draft.get("data")}
            sections |= {"draft": draft.get("draft"), "eval": _current(made_with)}
            there = Identity.read({name: value for name, value in sections.items() if value})
            known = {key: value for key, value in there.values.items() if key in now.values}
            changed = now.diff(Identity(known), now.values)
        if changed:
            listed = "; ".join(f"{key}: {a!r} there, {b!r} now" for key, (a, b) in changed.items())
            _log.info(
                f"{self._path}: the tau of stage {stage} was measured with other settings "
                f"({listed}); it is not compared, and its draft not exported"
            )
        return not changed


def _identity(config: Config, stage: str | None) -> Identity:
    """All settings that decide a tau of this stage."""
    parts = (
        Identity.of(config, "stage", stage=stage),
        Identity.of(config.eval, "tau"),
        Identity.of(config.decode, "answers"),
    )
    return Identity({key: value for part in parts for key, value in part.values.items()})


def _older(folder: Path) -> dict[str, Any]:
    """config.json of the draft that version 0.1.0 kept in `folder`, or nothing."""
    path = folder / "config.json"
    return read_json(path, "", "delete it, and tau is compared anew") if path.exists() else {}


def _current(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the setting that version 0.1.0 called `prompts` to `train_prompts`."""
    return {"train_prompts" if key == "prompts" else key: made_with[key] for key in made_with}

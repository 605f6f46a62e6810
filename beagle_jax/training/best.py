"""Measures tau during training, keeps the best draft of each stage, stops a stage early.

Training does not decode by itself: the caller passes the functions that measure and save a draft.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from beagle_jax.config import Config, Identity
from beagle_jax.data.share import wait_for_all
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json
from beagle_jax.processes import from_first, is_first

_log = logging.getLogger(__name__)

Params = dict[str, Any]


class Best:
    """Best tau of each stage so far, stored in a file so that a resumed run knows it.

    A tau belongs to all settings that decide it: those of its stage and of the stages before, of
    `decode` and of `eval`. With other settings it is ignored, and a line says so.
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
        self._made_with = {stage: _identity(config, stage) for stage in config.train.named_stages}
        self._default = _identity(Config(target=config.target), None)
        stored = read_json(path, "", "delete it, and tau is compared anew") if path.exists() else {}
        self._stages: dict[str, dict] = {
            stage: best
            for stage, best in (stored.get("stages") or {}).items()
            if self._comparable(stage, stored.get("made_with") or {})
        }

    @property
    def folder(self) -> Path | None:
        """Folder of the best draft of all stages; None if no measured draft is kept."""
        taus = {stage: best["tau"] for stage, best in self._stages.items()}
        saved = [stage for stage in taus if self.folder_of(stage) is not None]
        return self.folder_of(max(saved, key=taus.__getitem__)) if saved else None

    def folder_of(self, stage: str) -> Path | None:
        """Folder of the best draft of a stage; None if there is none."""
        if stage not in self._stages:
            return None
        folder = self._root / stage
        if (folder / "config.json").exists():
            return folder
        # Version 0.1.0 kept the best draft of all stages alone.
        return self._root if _older(self._root).get("best", {}).get("stage") == stage else None

    @property
    def _root(self) -> Path:
        return self._path.parent / "best"

    def due(self, done: int, steps: int) -> bool:
        """Returns whether to measure after `done` of a stage's `steps`."""
        return done % self._config.every == 0 or done == steps

    def look(self, stage: str, done: int, params: Params) -> dict:
        """Measures the draft, keeps it if it is its stage's best, and returns its metrics."""
        figures = self._measure(params) if is_first() else {"tau": 0.0}
        figures["tau"] = round(from_first(figures["tau"]), 4)  # broadcast as float32
        if figures["tau"] > self._stages.get(stage, {"tau": 0.0})["tau"]:
            if is_first():
                self._keep(self._root / stage, params, {"stage": stage, "step": done, **figures})
            self._stages[stage] = {"step": done, "tau": figures["tau"]}
            if is_first():
                made_with = {name: dict(self._made_with[name].values) for name in self._stages}
                written = {"made_with": made_with, "stages": self._stages}
                write_text(self._path, json.dumps(written, indent=1) + "\n")
        return figures

    def exhausted(self, stage: str, done: int) -> bool:
        """Returns whether tau has not improved for `eval.patience` measurements of this stage."""
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

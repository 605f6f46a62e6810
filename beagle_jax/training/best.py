"""Measures tau during training, keeps the draft with the best tau, stops a stage early.

Training does not decode by itself: the caller passes the functions that measure and save a draft.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beagle_jax.config import EvalConfig, Identity
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json
from beagle_jax.processes import from_first, is_first

Params = dict[str, Any]


class Best:
    """Best tau of each stage so far, stored in a file so that a resumed run knows it."""

    def __init__(
        self,
        path: Path,
        config: EvalConfig,
        measure: Callable[[Params], dict],
        keep: Callable[[Params, dict], None],
    ) -> None:
        """Reads the file at `path` if it was written with the same settings of `eval`.

        measure: maps parameters to a dictionary of metrics that includes "tau". keep: saves the
        draft that is now the best, with its metrics.

        A tau measured on other prompts is not comparable, so a file written with other settings is
        ignored.
        """
        self._path, self._config, self._measure, self._keep = path, config, measure, keep
        self._made_with = Identity.of(config, "tau")
        stored = read_json(path, "", "delete it, and tau is compared anew") if path.exists() else {}
        there = Identity.read({"eval": _current(stored.get("made_with") or {})})
        self._stages: dict[str, dict] = (
            stored["stages"] if stored and not self._made_with.diff(there) else {}
        )

    @property
    def tau(self) -> float:
        """Best tau over all stages; 0 before the first measurement."""
        return max((best["tau"] for best in self._stages.values()), default=0.0)

    def due(self, done: int, steps: int) -> bool:
        """Returns whether to measure after `done` of a stage's `steps`."""
        return done % self._config.every == 0 or done == steps

    def look(self, stage: str, done: int, params: Params) -> dict:
        """Measures the draft, saves it if it is the best so far, and returns its metrics."""
        figures = self._measure(params) if is_first() else {"tau": 0.0}
        figures["tau"] = round(from_first(figures["tau"]), 4)  # broadcast as float32
        if is_first() and figures["tau"] > self.tau:
            self._keep(params, {"stage": stage, "step": done, **figures})
        if figures["tau"] > self._stages.get(stage, {"tau": 0.0})["tau"]:
            self._stages[stage] = {"step": done, "tau": figures["tau"]}
            if is_first():
                write_text(
                    self._path,
                    json.dumps(
                        {"made_with": _by_name(self._made_with), "stages": self._stages}, indent=1
                    )
                    + "\n",
                )
        return figures

    def exhausted(self, stage: str, done: int) -> bool:
        """Returns whether tau has not improved for `eval.patience` measurements of this stage."""
        if not self._config.patience or stage not in self._stages:
            return False
        return done - self._stages[stage]["step"] >= self._config.patience * self._config.every


def _by_name(identity: Identity) -> dict[str, Any]:
    return {key.removeprefix("eval."): value for key, value in identity.values.items()}


def _current(made_with: dict[str, Any]) -> dict[str, Any]:
    """Renames the setting that version 0.1.0 called `prompts` to `train_prompts`."""
    return {"train_prompts" if key == "prompts" else key: made_with[key] for key in made_with}

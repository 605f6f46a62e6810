"""The draft that decodes best: real tau while training, the best draft kept by it, and an early
stop.

Training does not know how to decode: the caller hands over what measures and what keeps.
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
    """The best tau of each stage so far, kept in a file so that a resumed run knows it."""

    def __init__(
        self,
        path: Path,
        config: EvalConfig,
        measure: Callable[[Params], dict],
        keep: Callable[[Params, dict], None],
    ):
        """measure: parameters -> figures, "tau" among them. keep: writes the draft that is now the
        best, with its figures.

        Taus on other prompts cannot be compared: a file that was made with other settings of `eval`
        counts as none.
        """
        self._path, self._config, self._measure, self._keep = path, config, measure, keep
        self._made_with = Identity.of(config, "tau")
        found = read_json(path, "", "delete it, and tau is compared anew") if path.exists() else {}
        there = Identity.read({"eval": _current(found.get("made_with") or {})})
        self._stages: dict[str, dict] = (
            found["stages"] if found and not self._made_with.diff(there) else {}
        )

    @property
    def tau(self) -> float:
        """The best of all stages; 0 before the first measurement."""
        return max((one["tau"] for one in self._stages.values()), default=0.0)

    def due(self, done: int, steps: int) -> bool:
        """Whether to measure after `done` of a stage's `steps`."""
        return done % self._config.every == 0 or done == steps

    def look(self, stage: str, done: int, params: Params) -> dict:
        """Measures, and keeps the draft if it is better than all before; returns the figures."""
        figures = self._measure(params) if is_first() else {"tau": 0.0}
        figures["tau"] = round(from_first(figures["tau"]), 4)  # on its way it is a float32
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
        """Whether `eval.patience` measurements of this stage have passed without a better one."""
        if not self._config.patience or stage not in self._stages:
            return False
        return done - self._stages[stage]["step"] >= self._config.patience * self._config.every


def _by_name(identity: Identity) -> dict[str, Any]:
    return {key.removeprefix("eval."): value for key, value in identity.values.items()}


def _current(made_with: dict[str, Any]) -> dict[str, Any]:
    """What 0.1.0 called prompts is `eval.train_prompts`."""
    return {"train_prompts" if key == "prompts" else key: made_with[key] for key in made_with}

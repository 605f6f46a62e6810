"""Translates setting names of other projects and config formats of version 0.1.0."""

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

from beagle_jax.config.keys import field_names
from beagle_jax.config.stage import LateStage
from beagle_jax.errors import UsageError


class Alias(NamedTuple):
    """A setting name of another project."""

    key: str  # the setting of this project
    more: int = 0  # added to the value, if the other project counts from another start
    of: str = ""  # the other project, if `more` is not 0


# EAGLE's `depth` does not count the first level, which its code drafts before the loop over depth:
# depth 5 drafts six levels, with one draft step each. SGLang's num_steps counts all levels.
# num_draft_tokens and total_token count the root, as `decode.nodes` does. ttt_steps and ttt_length
# count the draft steps of training-time test.
ALIASES: dict[str, Alias] = {
    "base_model": Alias("target.source"),
    "verifier": Alias("target.source"),
    "target_model_path": Alias("target.source"),
    "decode.depth": Alias("decode.levels", 1, "EAGLE"),
    "decode.num_steps": Alias("decode.levels"),
    "decode.num_draft_tokens": Alias("decode.nodes"),
    "decode.total_token": Alias("decode.nodes"),
    "train.late.ttt_steps": Alias("train.late.simulation_steps"),
    "train.late.ttt_length": Alias("train.late.simulation_steps"),
}


def translate(key: str, value: Any) -> tuple[str, Any, str]:
    """Returns the setting and value of an alias, and a note for the user if the value changes.

    Raises:
        UsageError: a stage of the long form has a setting under two names.
    """
    alias = ALIASES.get(key)
    if alias is None:
        return key, _stages(value) if key == "train.stages" else value, ""
    if not alias.more or type(value) is not int:
        return alias.key, value, ""
    shifted = value + alias.more
    note = f"{key} {value} counts as {alias.of} does; it means {alias.key} {shifted}"
    return alias.key, shifted, note


def _stages(stages: Any) -> Any:
    """Returns the stages of the long form with this project's names."""
    prefix = "train.late."
    names = {
        old.removeprefix(prefix): new.key.removeprefix(prefix)
        for old, new in ALIASES.items()
        if old.startswith(prefix)
    }
    if not isinstance(stages, list):
        return stages
    current = []
    for number, stage in enumerate(stages):
        if isinstance(stage, Mapping):
            renamed = {names.get(name, name): value for name, value in stage.items()}
            if len(renamed) < len(stage):
                raise UsageError(
                    f"train.stages[{number}] has a setting under two names (one of "
                    f"{', '.join(names)}); leave one out"
                )
            stage = renamed
        current.append(stage)
    return current


def other_top_k(files: Mapping[str, str]) -> list[str]:
    """Returns a note if EAGLE's names stand beside `decode.top_k`, which EAGLE has too.

    files: the file of each setting, by the key that was written.
    """
    eagle = [key for key in ("decode.depth", "decode.total_token") if key in files]
    if not eagle or "decode.top_k" not in files or "decode.topk" in files:
        return []
    return [
        f"{files['decode.top_k']}: decode.top_k is the filter of sampling here; the top_k that "
        f"EAGLE has beside {eagle[0].removeprefix('decode.')} is decode.topk"
    ]


def late_word(settings: MutableMapping[str, Any], value: str) -> bool:
    """Applies a word given for `train.late`; returns whether the stage now has no steps.

    "none" skips the stage; "simulate" runs it, and removes an earlier setting of 0 steps.

    Raises:
        UsageError: it is another word.
    """
    if value == "none":
        return True
    if value == "simulate":
        steps = settings.get("train.late.steps")
        if steps is not None and steps.value == 0:
            del settings["train.late.steps"]
        return False
    raise UsageError(
        f"train.late is {value!r}; expected none, simulate or a section with the keys "
        f"{', '.join(field_names([LateStage]))}"
    )


def early_stage(settings: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Removes the settings of `train.early` that only version 0.1.0 had.

    They had a single valid value or no effect. Also returns a note for the user if a removed
    setting had an effect.

    Raises:
        UsageError: a removed setting has a value that was never valid.
    """
    current, note = dict(settings), ""
    steps = current.pop("simulation_steps", 1)
    if steps != 1:
        raise UsageError(
            f"train.early.simulation_steps is {steps}; expected 1: only the late stage simulates; "
            "leave it out"
        )
    if current.pop("dense", False) is not False:
        raise UsageError(
            f"train.early.dense is {_yaml(settings['dense'])}; only a late stage can be dense; "
            "leave it out"
        )
    if current.pop("multi_token", False) is not False:
        raise UsageError(
            f"train.early.multi_token is {_yaml(settings['multi_token'])}; the early stage always "
            "predicts its whole window, leave it out"
        )
    current.pop("detach", True)
    weights = current.pop("step_weights", None)
    if weights is not None:
        note = (
            f"train.early.step_weights is {weights}, but the early stage no longer uses it; it "
            "is ignored"
        )
    return current, note


def late_stage(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces `dense` of `train.late` with an objective; version 0.1.0 had no objectives.

    Raises:
        UsageError: `dense` contradicts the objective, or a dense stage cannot have a setting.
    """
    current = dict(settings)
    dense = current.pop("dense", None)
    if dense is None:
        current.setdefault("objective", "late")
    elif type(dense) is not bool:
        raise UsageError(f"train.late.dense is {dense!r}; expected bool")
    elif current.setdefault("objective", "test_time" if dense else "late") != (
        "test_time" if dense else "late"
    ):
        raise UsageError(
            f"train.late.dense is {_yaml(dense)}, but train.late.objective is "
            f"{current['objective']}; leave train.late.dense out"
        )
    if current["objective"] != "test_time":
        return current
    if current.pop("multi_token", False) is not False:
        raise UsageError(
            "train.late.multi_token and train.late.dense are both true, but a draft that begins at "
            "every position has no window to predict the rest of; set one of them to false"
        )
    current.pop("window", None)  # version 0.1.0 accepted it and did not read it
    return current


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)

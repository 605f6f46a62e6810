"""Names of other projects, and forms of version 0.1.0, as the settings that they mean."""

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

from beagle_jax.config.keys import field_names
from beagle_jax.config.stage import LateStage
from beagle_jax.errors import UsageError


class Alias(NamedTuple):
    """A name that users of another project type."""

    key: str  # the setting
    more: int = 0  # added to its value: how far apart the two projects count
    of: str = ""  # the project, where its value is counted differently


# EAGLE's `depth` counts the levels below the first, which its code drafts before the loop over
# depth: depth 5 drafts six levels (a real draft step each). SGLang's num_steps counts all levels;
# num_draft_tokens and total_token count the root as `decode.nodes` does; ttt_steps and ttt_length
# count draft steps of training-time test.
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
    """The setting and value that an alias means, and a line for the user if its value changes."""
    alias = ALIASES.get(key)
    if alias is None:
        return key, value, ""
    if not alias.more or type(value) is not int:
        return alias.key, value, ""
    shifted = value + alias.more
    told = f"{key} {value} is {alias.of}'s, and means {alias.key} {shifted}"
    return alias.key, shifted, told


def late_word(settings: MutableMapping[str, Any], value: str) -> bool:
    """`train.late` may be a word, which speaks of its steps. Whether the steps are 0 from here on.

    Raises UsageError for another word.
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
    """Keys of `train.early` without those that 0.1.0 had there and that had one value or no use,
    and a line for the user if one of them had a use.

    Raises UsageError for a value that they could not have.
    """
    kept, told = dict(settings), ""
    steps = kept.pop("simulation_steps", 1)
    if steps != 1:
        raise UsageError(
            f"train.early.simulation_steps is {steps}, expected 1; simulation belongs to the late "
            "stage"
        )
    if kept.pop("dense", False) is not False:
        raise UsageError(
            f"train.early.dense is {_yaml(settings['dense'])}; only the late stage has a dense form"
        )
    if kept.pop("multi_token", False) is not False:
        raise UsageError(
            f"train.early.multi_token is {_yaml(settings['multi_token'])}; the early stage always "
            "predicts its whole window, leave it out"
        )
    kept.pop("detach", True)
    weights = kept.pop("step_weights", None)
    if weights is not None:
        told = (
            f"train.early.step_weights is {weights}, which the early stage has no use for any "
            "more; it is ignored"
        )
    return kept, told


def late_stage(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of `train.late`, whose `dense` says the objective, as 0.1.0 has it.

    Raises UsageError for settings that a dense stage cannot have.
    """
    kept = dict(settings)
    dense = kept.pop("dense", None)
    if dense is None:
        kept.setdefault("objective", "late")
    elif type(dense) is not bool:
        raise UsageError(f"train.late.dense is {dense!r}; expected bool")
    elif kept.setdefault("objective", "test_time" if dense else "late") != (
        "test_time" if dense else "late"
    ):
        raise UsageError(
            f"train.late.dense is {_yaml(dense)}, but train.late.objective is "
            f"{kept['objective']}; leave train.late.dense out"
        )
    if kept["objective"] != "test_time":
        return kept
    if kept.pop("multi_token", False) is not False:
        raise UsageError(
            "train.late.multi_token and train.late.dense are both true, but a draft that begins at "
            "every position has no window to predict the rest of; set one of them to false"
        )
    kept.pop("window", None)  # 0.1.0 took one there, and did not read it
    return kept


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)

"""Defaults of training that depend on the kind of draft.

They stand in place of settings that a config leaves out, before it is checked, so that every other
part of the package sees values and not kinds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from beagle_jax.config.section import Section

# EAGLE-3's loss has no term on states, and nobody adds noise to its streams (method.md 14).
_TRAIN: dict[str, dict[str, Any]] = {"eagle3": {"noise": "none", "vloss_weight": 0.0}}
_TEST_TIME: dict[str, dict[str, Any]] = {
    "eagle3": {"simulation_steps": 7, "step_decay": 0.8, "detach": False}
}


def with_defaults(config: Any) -> Any:
    """Returns the settings of a config, completed with the defaults of its `draft.kind`.

    config: sections by name, each a mapping or a `Section`. What is neither is left to be refused.
    """
    if not isinstance(config, Mapping):
        return config
    kind, train = _given(config.get("draft")).get("kind"), config.get("train", {})
    if kind not in _TRAIN or not isinstance(train, (Mapping, Section)):
        return config
    own = {**_TRAIN[kind], **_given(train)}
    if "late" in own:
        own["late"] = _stage(own["late"], kind)
    if isinstance(own.get("stages"), Sequence):
        own["stages"] = [_stage(stage, kind) for stage in own["stages"]]
    return {**config, "train": own}


def _stage(stage: Any, kind: str) -> Any:
    """Returns a stage, completed if it is of objective test_time."""
    objective = stage.objective if hasattr(stage, "objective") else _given(stage).get("objective")
    if objective != "test_time":
        return stage
    given, own = _given(stage), dict(_TEST_TIME[kind])
    weights = given.get("step_weights")
    if weights is not None:
        own["step_decay"] = None
        own["simulation_steps"] = len(weights) if isinstance(weights, Sequence) else 1
    return {**own, "objective": objective, **given}


def _given(section: Any) -> dict[str, Any]:
    """Returns the settings that are set in a section; {} for what is none."""
    if isinstance(section, Section):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return dict(section) if isinstance(section, Mapping) else {}

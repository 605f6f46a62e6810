"""Settings that decide a result, and how two configs differ in them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from beagle_jax.config import paths
from beagle_jax.config.section import Result, Section, extra_of
from beagle_jax.config.stage import STAGES
from beagle_jax.config.train import TrainConfig
from beagle_jax.config.whole import Config

# What a result was made with that does not name the setting, if that is not today's default: the
# setting did not exist yet, and the program did this.
_BEFORE: Mapping[str, Any] = {"train.noise_shortest": 1}


class Identity(NamedTuple):
    """The settings that decide a result, as JSON values by dotted key.

    Each field declares the results that it decides (`affects`).
    """

    values: Mapping[str, Any]

    @classmethod
    def of(cls, config: Section, result: Result, *, stage: str | None = None) -> "Identity":
        """Collects the settings that decide a result.

        Args:
            config: a whole config, or one section of it.
            result: the kind of result.
            stage: a key of `TrainConfig.named_stages`; later stages are left out.
        """
        if isinstance(config, Config):
            sections = {name: getattr(config, name) for name in Config.model_fields}
        else:
            sections = {_name_of(config): config}
        values = {
            key: value
            for name, section in sections.items()
            for key, value in _deciding(section, name, result, stage)
        }
        return cls(json.loads(json.dumps(values)))

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Identity":
        """Reads the settings that are stored with a result on disk.

        Args:
            record: settings, nested or by dotted key, as this version or version 0.1.0 writes them.
        """
        return cls(_current_stages(dict(_dotted(record, ""))))

    def diff(
        self, other: "Identity", defaults: Mapping[str, Any] | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """Returns the settings that differ, as {dotted key: (value in `other`, value in `self`)}.

        Keys are sorted. Settings that only `other` has are ignored, except those of stages: a
        result of additional stages is a different result.

        Args:
            other: settings of the result on disk.
            defaults: values of settings that `other` does not have, because it was written before
                they existed.
        """
        before = {**(defaults or {}), **_BEFORE, **other.values}
        stages = {key for key in other.values if key.count(".") > 1 and key.startswith("train.")}
        return {
            key: (before.get(key), self.values.get(key))
            for key in sorted({*self.values, *stages})
            if not _same(key, before.get(key), self.values.get(key))
        }


def _name_of(section: Section) -> str:
    for name, field in Config.model_fields.items():
        if field.annotation is type(section):
            return name
    raise TypeError(f"{type(section).__name__} is no section of a config")


def _deciding(
    section: Section, name: str, result: Result, last: str | None
) -> Iterator[tuple[str, Any]]:
    for field in type(section).model_fields:
        if name == "train" and field in ("early", "late", "stages"):
            continue
        if result in extra_of(type(section), field).get("affects", ()):
            yield f"{name}.{field}", section.model_dump(include={field})[field]
    if not isinstance(section, TrainConfig):
        return
    for stage_name, stage in section.named_stages.items():
        yield from _deciding(stage, f"{name}.{stage_name}", result, None)
        if stage_name == last:
            return


def _dotted(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _current_stages(values: dict[str, Any]) -> dict[str, Any]:
    """Translates stages as version 0.1.0 wrote them.

    There every stage had all settings, and a test-time stage was a late one with `dense`.
    """
    for name in ("early", "late"):
        prefix = f"train.{name}."
        if f"{prefix}steps" not in values or f"{prefix}objective" in values:
            continue
        dense = values.get(f"{prefix}dense", False)
        objective = "early" if name == "early" else "test_time" if dense else "late"
        known = STAGES[objective].model_fields
        values = {
            key: value
            for key, value in values.items()
            if not key.startswith(prefix)
            or key.removeprefix(prefix) in known
            # the only removed setting that had an effect, in the early stage of EAGLE
            or (key == "train.early.step_weights" and value is not None)
        }
        values[f"{prefix}objective"] = objective
    return values


def _same(key: str, there: Any, now: Any) -> bool:
    section, _, name = key.partition(".")
    field = Config.model_fields.get(section)
    model = field.annotation if field else None
    is_path = (
        isinstance(model, type)
        and issubclass(model, Section)
        and name in model.model_fields
        and "path" in extra_of(model, name)
    )
    return paths.same(there, now) if is_path else there == now

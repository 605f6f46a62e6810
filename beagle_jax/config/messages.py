"""Turns errors of pydantic into messages with the key, its value and the expected values."""

import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from beagle_jax.config.keys import field_names, section_at, unknown
from beagle_jax.config.section import Section
from beagle_jax.errors import UsageError

# Of several errors, those of these types are reported first: they explain the others.
_FIRST = ("extra_forbidden", "missing")
_RANGES = (
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
)
_TYPES = {
    "int": "int",
    "float": "float",
    "string": "str",
    "bool": "bool",
    "tuple": "a list",
}


def explain(error: ValidationError, whole: type[Section]) -> tuple[str, UsageError]:
    """Returns the dotted key of the wrong setting and an error that explains it."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] not in _FIRST)
    return _explain(problems[0], whole)


def _explain(problem: ErrorDetails, whole: type[Section]) -> tuple[str, UsageError]:
    place = _Place(whole, problem["loc"])
    kind, value = problem["type"], problem["input"]
    if kind == "rule":
        template = problem["ctx"]["template"]
        at = f"{place.key}." if place.key else ""
        return place.key, UsageError(template.format(at=at, key=place.key))
    if kind == "extra_forbidden":
        return place.key, unknown(place.key, place.prefix, place.name, field_names(place.models))
    if kind == "missing":
        model = place.models[0].__name__
        return place.key, UsageError(f"{place.key} is missing; {model} needs it")
    if kind.startswith(("model_", "union_tag_")):
        expected = f"a stage with an objective: {', '.join(_tags(place))}"
    elif kind == "literal_error":
        expected = f"one of {', '.join(map(str, _literals(place.annotation)))}"
    elif kind in _RANGES and place.field is not None:
        expected = _range(place.field)
        value = _as_float(value) if _is_float(place.annotation) else value
    else:
        expected = _TYPES.get(kind.partition("_")[0], problem["msg"])
    return place.key, UsageError(f"{place.key} is {value!r}; expected {expected}")


class _Place:
    """The dotted key and the field at the location of an error."""

    def __init__(self, whole: type[Section], location: Sequence[int | str]) -> None:
        self.models: list[type[Section]] = [whole]
        self.key = self.prefix = self.name = ""
        self.field: FieldInfo | None = None
        self.annotation: Any = None
        below: list[type[Section]] = [whole]
        for part in location:
            if isinstance(part, int):
                self.key += f"[{part}]"
                self.annotation = _item(self.annotation)
                below = _models(self.annotation) or below
                continue
            tagged = [
                model
                for model in below
                if "objective" in model.model_fields
                and model.model_fields["objective"].default == part
            ]
            if tagged and self.models is not below:  # the tag of a union is not part of the key
                below = tagged
                continue
            self.models, self.name = below, part
            self.prefix = f"{self.key}." if self.key else ""
            self.key = self.prefix + part
            self.field = next(
                (model.model_fields[part] for model in below if part in model.model_fields), None
            )
            self.annotation = self.field.annotation if self.field else None
            below = section_at(below, part) or _models(_item(self.annotation))


def _models(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []  # type: ignore[list-item]
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def _item(annotation: Any) -> Any:
    """Returns the type of a list's items, also of an optional or annotated list; else None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return arguments[0]
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return next((item for item in map(_item, arguments) if item is not None), None)
    return None


def _literals(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [value for part in typing.get_args(annotation) for value in _literals(part)]


def _is_float(annotation: Any) -> bool:
    return annotation is float or any(map(_is_float, typing.get_args(annotation)))


def _tags(place: _Place) -> list[str]:
    models = _models(place.annotation)
    return [str(model.model_fields["objective"].default) for model in models]


def _as_float(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _range(field: FieldInfo) -> str:
    """Returns the bounds of a field in words."""
    bounds = {
        name: getattr(item, name)
        for item in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(item, name, None) is not None
    }
    words = {
        "ge": lambda bound: f"{bound} or more" if bound == 0 else f"at least {bound}",
        "gt": lambda bound: f"more than {bound}",
        "le": lambda bound: f"at most {bound}",
        "lt": lambda bound: f"less than {bound}",
    }
    parts = [words[name](bounds[name]) for name in words if name in bounds]
    return ", and ".join(parts) if "ge" in bounds else " and ".join(parts) or "a number"

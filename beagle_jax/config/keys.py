"""Dotted keys of a config, and the error for an unknown key, which suggests a known one."""

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from beagle_jax.config.section import Section
from beagle_jax.errors import UsageError


def sections_of(annotation: Any) -> list[type[Section]]:
    """Returns the section models that a field of this type may hold; none for a plain value."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (tuple, list):
        return []
    return [model for argument in arguments for model in sections_of(argument)]


def field_names(models: Sequence[type[BaseModel]]) -> list[str]:
    """Returns the settings of a section that may be one of several models."""
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def section_at(models: Sequence[type[Section]], name: str) -> list[type[Section]]:
    """Returns the models of the subsection `name`; none if it is a plain value."""
    fields = [model.model_fields[name] for model in models if name in model.model_fields]
    return [section for field in fields for section in sections_of(field.annotation)]


def flatten(
    tree: Mapping[Any, Any], models: Sequence[type[Section]], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of a nested mapping; values that are not sections stay whole."""
    for key, value in tree.items():
        sections = section_at(models, key)
        if sections and isinstance(value, Mapping):
            yield from flatten(value, sections, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested mapping of dotted keys.

    Raises:
        UsageError: a key is below a plain value.
    """
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UsageError(f"{key}: {section} is not a section")
        node[last] = value
    return tree


def check_names(tree: Any, models: Sequence[type[Section]], prefix: str = "") -> None:
    """Raises UsageError for an unknown key, and for a plain value in place of a section."""
    names = field_names(models)
    if not isinstance(tree, Mapping):
        raise UsageError(f"{prefix.rstrip('.')} must be a section with the keys {', '.join(names)}")
    for key in tree:
        if key not in names:
            raise unknown(f"{prefix}{key}", prefix, str(key), names)
    for key, value in tree.items():
        if sections := section_at(models, key):
            check_names(value, sections, f"{prefix}{key}.")


def unknown(place: str, prefix: str, name: str, names: Sequence[str]) -> UsageError:
    """Returns the error for an unknown key; it names the nearest setting, or all of them."""
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"valid keys: {', '.join(names)}"
    return UsageError(f"unknown key {place}; {hint}")

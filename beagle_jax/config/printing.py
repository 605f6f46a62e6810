"""Prints a whole config as YAML, with the origin of each value."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from beagle_jax.config.reading import Resolved


def describe(resolved: Resolved) -> str:
    """Returns YAML of all settings, each with a comment on the origin of its value.

    A file with this text loads as the same config.
    """
    tree = resolved.config.model_dump()
    dropped = ("early", "late") if tree["train"]["stages"] is not None else ("stages",)
    for name in dropped:
        del tree["train"][name]
    return "\n".join(_lines(tree, resolved.origins, "", 0))


def _lines(
    tree: Mapping[str, Any], origins: Mapping[str, str], prefix: str, depth: int
) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield f"{'  ' * depth}{name}:"
            yield from _lines(value, origins, f"{key}.", depth + 1)
        else:
            yield f"{'  ' * depth}{name}: {_value(value)}  # {origins.get(key, 'default')}"


def _value(value: Any) -> str:
    plain = _lists(value)
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _lists(value: Any) -> Any:
    """Replaces tuples with lists, as YAML has no tuples."""
    if isinstance(value, (list, tuple)):
        return [_lists(item) for item in value]
    return value

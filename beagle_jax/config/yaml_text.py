"""Parses YAML, and refuses a mapping that has a key twice."""

from typing import Any

import yaml

from beagle_jax.errors import UsageError


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice; yaml.SafeLoader silently takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} appears twice", problem_mark=key.start_mark
                )
            seen.append(key.value)
        return node


def parse_yaml(text: str) -> Any:
    """Parses YAML. Raises yaml.YAMLError for invalid text or a key that is there twice."""
    return yaml.load(text, _Loader)


def parse_override(override: str) -> tuple[str, Any]:
    """Splits `section.key=value` into key and value.

    Raises:
        UsageError: the text has another form, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"override {override!r}: expected section.key=value")
    try:
        return key.strip(), parse_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"override {override!r}: the value is not valid YAML: {error}") from error

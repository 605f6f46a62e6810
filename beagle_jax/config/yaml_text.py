"""YAML that refuses a key that stands twice."""

from typing import Any

import yaml

from beagle_jax.errors import UsageError


class _Loader(yaml.SafeLoader):
    """Of two equal keys of a mapping YAML's own would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands there twice", problem_mark=key.start_mark
                )
            seen.append(key.value)
        return node


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError also for a key that stands twice in one mapping."""
    return yaml.load(text, _Loader)


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `section.key=value`. Raises UsageError for anything else."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"override {override!r}: expected section.key=value")
    try:
        return key.strip(), parse_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"override {override!r}: the value is not valid YAML: {error}") from error

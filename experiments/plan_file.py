"""Reads the YAML of a file of experiments, with the file that it extends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from beagle_jax.config import parse_yaml
from beagle_jax.errors import UsageError

# Keys of a file: what a plan is made of (plan.py), and how its claims are judged.
KEYS = (
    *("extends", "base", "folder", "results", "short", "runs", "evaluations", "figures", "claims"),
    *("title", "seeds", "pilot", "times", "fresh", "interval", "registered", "effects", "beside"),
)


def read_tree(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns the keys of a file on top of those of the file that it `extends`.

    Runs, evaluations, figures, effects and short settings are joined by name, and so are the keys
    of one entry and the settings under its `set`. Claims are joined by what they say; new ones come
    last. Every other key replaces the one of the file below.

    Raises:
        UsageError: a file cannot be read, is not YAML, extends itself, or has a key that no plan
            has.
    """
    if path.resolve() in above:
        raise UsageError(f"{path}: extends itself")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path}: not a file of experiments ({error!r}); experiments/paper.yaml is one"
        ) from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: not a file of experiments; experiments/paper.yaml is one")
    for key in tree:
        if key not in KEYS:
            raise UsageError(f"{path}: unknown key {key!r}; expected one of {', '.join(KEYS)}")
    if "extends" not in tree:
        return tree
    below = read_tree(Path(tree.pop("extends")), (*above, path.resolve()))
    return below | {
        key: _joined(below[key], value)
        if key in ("runs", "evaluations", "figures", "effects", "short") and key in below
        else _claims(below[key], value)
        if key == "claims" and key in below
        else value
        for key, value in tree.items()
    }


def _joined(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(below)
    for name, entry in above.items():
        both = isinstance(entry, Mapping) and isinstance(made.get(name), Mapping)
        made[name] = _joined(made[name], entry) if both else entry
    return made


def _claims(below: list[dict[str, Any]], above: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_name = [{claim["says"]: claim for claim in claims} for claims in (below, above)]
    return list(_joined(*by_name).values())

"""Files of results, one per finished part, and the settings a call may continue with.

An interrupted write leaves no partial file.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from beagle_jax.errors import UserError
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json

_SETTINGS = "settings.json"


class Settings(NamedTuple):
    """Settings that determine the results; a folder of results continues with the same only."""

    config: str
    overrides: list[str]
    toy: bool
    prompts: str | None  # prompts that the target answers; None: those of data.source
    text: str  # folder with more text to train on
    suites: list[str] | None  # to evaluate on; None: held_out and those whose files exist
    limit: int | None  # prompts per suite at most


def claim(out: Path, settings: Settings) -> None:
    """Stores the settings in the folder of results, or refuses a folder with other settings.

    Raises: UserError for other settings.
    """
    path = out / _SETTINGS
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings._asdict(), indent=1) + "\n")
        return
    there = read_settings(out)
    different = [
        f"{key} {getattr(there, key)!r} there, {value!r} now"
        for key, value in settings._asdict().items()
        if getattr(there, key) != value
    ]
    if different:
        raise UserError(
            f"{out} holds results of other settings ({'; '.join(different)}); "
            "name another --out, or delete it"
        )


def read_settings(out: Path) -> Settings:
    """Reads the settings of a folder of results."""
    return Settings(**read_json(out / _SETTINGS, "the first call writes it", "delete the folder"))


def finish(out: Path, name: str, figures: dict[str, Any]) -> None:
    """Writes the results of a part."""
    (out / "parts").mkdir(parents=True, exist_ok=True)
    write_text(out / "parts" / f"{name}.json", json.dumps(figures, indent=1) + "\n")


def read_parts(out: Path) -> dict[str, dict[str, Any]]:
    """Reads all results so far, by name."""
    paths = sorted((out / "parts").glob("*.json"))
    return {
        path.stem: read_json(path, "a part writes it", "delete it to have it measured again")
        for path in paths
    }


def is_finished(figures: dict[str, Any] | None) -> bool:
    """Whether the part has its results; a failed part is tried again."""
    return figures is not None and "error" not in figures and figures.get("finished", True)

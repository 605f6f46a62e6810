"""`data.folder`: the training text in parts, each with the target's states, and what they were made
with.

    settings.json            what made the text; a folder of other settings, or for another target,
    is refused
    part-0000.jsonl, ..      one line per row: tokens, and which of them are supervised
    part-0000.states, ..     the target's states of the part's rows (data/states.py),
    part-0000.states.json their index
    all, all-1, ..           the source had no more for process 0, 1, ..

A part appears whole or not at all. Of n processes that fill a folder, process i writes the parts i,
i + n, i + 2n, ..
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beagle_jax.config import DataConfig, Identity
from beagle_jax.config.paths import same
from beagle_jax.data.share import Share
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json

_HASHES = {
    "target_sha256": "another target: its weights differ",
    "tokenizer_sha256": "another tokenizer",
    "template_sha256": "another chat template",
}


def claim(config: DataConfig, made_for: Mapping[str, str], share: Share) -> None:
    """Makes `data.folder` ours, or refuses one that other settings or another target filled.

    made_for: "target", its source, and its hashes (data/fingerprint.py).
    """
    folder = Path(config.folder)
    path = folder / "settings.json"
    wanted = json.loads(json.dumps({**made_for, **config.model_dump()}))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = (
            folder / f"settings-{share.index}.json"
        )  # several processes may come here at once, with the same text
        write_text(own, json.dumps({**wanted, "processes": share.count}, indent=1))
        os.replace(own, path)
        return
    found = _settings(folder)
    for key in _HASHES.keys() & wanted.keys():
        # a hash that was not kept cannot be checked
        if found.get(key, wanted[key]) != wanted[key]:
            raise UserError(
                f"{folder} was made for {_HASHES[key]} ({key} {found[key]:.12} there, "
                f"{wanted[key]:.12} now); delete it or set another data.folder"
            )
    # A setting that did not exist when the folder was made had its default.
    there = Identity.read({"data": found})
    changed = Identity.of(config, "text").diff(there, Identity.of(DataConfig(), "text").values)
    if "target" in wanted and not same(found.get("target"), wanted["target"]):
        changed = {"target": (found.get("target"), wanted["target"])} | changed
    if changed:
        listed = ", ".join(
            f"{key.removeprefix('data.')} {old!r} there, {new!r} now"
            for key, (old, new) in changed.items()
        )
        raise UserError(
            f"{folder} holds text written with other settings ({listed}); delete it or set "
            "another data.folder"
        )


def is_claimed(folder: str | Path) -> bool:
    """Somebody has begun to write text there."""
    return (Path(folder) / "settings.json").exists()


def filled_by(folder: str | Path) -> int:
    """How many processes share the writing of a claimed folder's text."""
    return _settings(folder).get("processes", 1)


def _settings(folder: str | Path) -> dict[str, Any]:
    return read_json(
        Path(folder) / "settings.json", "prepare writes it", "delete data.folder, or set another"
    )


def states_path(folder: str | Path, part: int) -> Path:
    """Where the states of a part lie."""
    return Path(folder) / f"part-{part:04d}.states"


def exhausted_path(folder: str | Path, index: int) -> Path:
    """The file that says that the source has no more for this process."""
    return Path(folder) / (f"all-{index}" if index else "all")


def write_part(folder: str | Path, part: int, rows: Sequence[Row]) -> None:
    """Writes the text of a part."""
    lines = (
        json.dumps({"tokens": row.tokens, "supervised": [int(flag) for flag in row.supervised]})
        for row in rows
    )
    write_text(Path(folder) / f"part-{part:04d}.jsonl", "\n".join(lines) + "\n")


def read_parts(folder: str | Path) -> dict[int, list[Row]]:
    """The text of every part, by number."""
    paths = sorted(
        Path(folder).glob("part-*.jsonl"), key=lambda path: int(path.stem.removeprefix("part-"))
    )
    return {int(path.stem.removeprefix("part-")): _read_part(path) for path in paths}


def _read_part(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line.decode("utf-8"))
            rows.append(_row(record["tokens"], record["supervised"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not a row of training text ({error!r}); delete {path} to "
                "write it anew"
            ) from error
    return rows


def _row(tokens: list[int], supervised: list[int]) -> Row:
    if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        raise ValueError("tokens are not a list of ids")
    if len(supervised) != len(tokens) or not set(supervised) <= {0, 1}:
        raise ValueError(f"supervised is not a 0 or 1 for each of {len(tokens)} tokens")
    return Row(tokens, [bool(flag) for flag in supervised])

"""`data.folder`: training text in parts, the target's states, and the settings of both.

    settings.json            settings and target that made the text; others are refused
    part-0000.jsonl, ..      one record per row: tokens, and which of them are supervised
    part-0000.states, ..     the target's states of the part's rows (data/states.py)
    part-0000.states.json    index of these states
    all, all-1, ..           the source has no more chats for process 0, 1, ..

Each part is written atomically. If n processes fill a folder, process i writes the parts i, i + n,
i + 2n, ..
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
from beagle_jax.errors import BadFile, UserError
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json

_HASHES = {
    "target_sha256": "another target: its weights differ",
    "tokenizer_sha256": "another tokenizer",
    "template_sha256": "another chat template",
}


def claim(config: DataConfig, made_for: Mapping[str, str], share: Share) -> None:
    """Claims `data.folder` for these settings.

    made_for: "target" (the target's source) and the hashes of data/fingerprint.py.

    Raises:
        UserError: another target or other settings filled the folder.
    """
    folder = Path(config.folder)
    path = folder / "settings.json"
    wanted = json.loads(json.dumps({**made_for, **config.model_dump()}))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may write the same text at once, so each uses its own file.
        own = folder / f"settings-{share.index}.json"
        write_text(own, json.dumps({**wanted, "processes": share.count}, indent=1))
        os.replace(own, path)
        return
    stored = _settings(folder)
    for key in _HASHES.keys() & wanted.keys():
        # a hash that the folder does not have cannot be checked
        if stored.get(key, wanted[key]) != wanted[key]:
            raise UserError(
                f"{folder} was made for {_HASHES[key]} ({key} {stored[key]:.12} there, "
                f"{wanted[key]:.12} now); delete it or set another data.folder"
            )
    # A setting that did not exist when the folder was made counts as its default.
    there = Identity.read({"data": stored})
    changed = Identity.of(config, "text").diff(there, Identity.of(DataConfig(), "text").values)
    if "target" in wanted and not same(stored.get("target"), wanted["target"]):
        changed = {"target": (stored.get("target"), wanted["target"])} | changed
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
    """Returns whether the folder has been claimed, so that text is being written to it."""
    return (Path(folder) / "settings.json").exists()


def filled_by(folder: str | Path) -> int:
    """Returns the number of processes that write the text of a claimed folder."""
    return _settings(folder).get("processes", 1)


def _settings(folder: str | Path) -> dict[str, Any]:
    return read_json(
        Path(folder) / "settings.json", "prepare writes it", "delete data.folder, or set another"
    )


def states_path(folder: str | Path, part: int) -> Path:
    """Returns the file that holds the states of a part."""
    return Path(folder) / f"part-{part:04d}.states"


def exhausted_path(folder: str | Path, index: int) -> Path:
    """Returns the file that marks that the source has no more chats for a process."""
    return Path(folder) / (f"all-{index}" if index else "all")


def write_part(folder: str | Path, part: int, rows: Sequence[Row]) -> None:
    """Writes the text of a part."""
    lines = (
        json.dumps({"tokens": row.tokens, "supervised": [int(flag) for flag in row.supervised]})
        for row in rows
    )
    write_text(Path(folder) / f"part-{part:04d}.jsonl", "\n".join(lines) + "\n")


def read_parts(folder: str | Path) -> dict[int, list[Row]]:
    """Reads the rows of every part, by part number.

    Raises:
        UserError: naming file and line of a record that is not a row.
    """
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
            raise BadFile(
                path,
                f"not a row of training text ({error!r}); delete {path} to write it again",
                where=f":{number}",
            ) from error
    return rows


def _row(tokens: list[int], supervised: list[int]) -> Row:
    if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        raise ValueError("tokens are not a list of ids")
    if len(supervised) != len(tokens) or not set(supervised) <= {0, 1}:
        raise ValueError(f"supervised is not a 0 or 1 for each of {len(tokens)} tokens")
    return Row(tokens, [bool(flag) for flag in supervised])

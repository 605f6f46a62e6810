"""`data.folder`: training text in parts, the target's states, and the settings of both.

    settings.json            settings, target and source that made the text; others are refused
    part-0000.rows, ..       the text: token rows (data/rows_file.py)
    part-0000.states, ..     the target's states of the part's rows (data/states.py)
    part-0000.states.json    index of these states
    wave-0000.json, ..       how many items of the source each part has (`Wave`)
    prompts-0001.rows, ..    prompts that the target made up (`data.source: self`)
    all                      the source has no more chats

Each file is written once, as a whole or not at all. Parts are consecutive pieces of the source, and
which process writes a part changes nothing of it. Parts of version 0.1.0 are `part-0000.jsonl`, a
JSON object per row.
"""

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beagle_jax.config import DataConfig, Identity
from beagle_jax.config.paths import same
from beagle_jax.data.content import Content, content_of
from beagle_jax.data.rows_file import SUFFIX, Header, open_rows, write_rows
from beagle_jax.data.share import Share, wait_for_all
from beagle_jax.data.template import Row
from beagle_jax.errors import BadFile, UserError
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json
from beagle_jax.remote import fetch, local

_HASHES = {
    "target_sha256": "another target: its weights differ",
    "tokenizer_sha256": "another tokenizer",
    "template_sha256": "another chat template",
}
_ANEW = "delete it or set another data.folder"


class Wave(NamedTuple):
    """Parts that may be written at the same time."""

    first: int  # number of the first part
    items: list[int]  # chats or prompts of the source in each part

    @property
    def end(self) -> int:
        """Number of the part after the last one."""
        return self.first + len(self.items)


def claim(config: DataConfig, made_for: Mapping[str, str], share: Share) -> list[Content]:
    """Claims `data.folder` for these settings; returns the sources of its text.

    made_for: "target" (the target's source) and the hashes of data/fingerprint.py.

    Raises:
        UserError: another target, other settings or another content of the source filled the
            folder, or another process does not see it.
    """
    folder = fetched(config.folder)
    path, sources = folder / "settings.json", content_of(config)
    wanted = json.loads(json.dumps({**made_for, **config.model_dump()}))
    if not path.exists() and (share.index == 0 or not share.together):
        folder.mkdir(parents=True, exist_ok=True)
        _write_shared(path, json.dumps({**wanted, "sources": sources}, indent=1), share)
    wait_for_all("data.folder is claimed")
    fetched(config.folder)  # the first process may be another machine
    if not path.exists():
        raise UserError(not_shared(folder))
    stored = _settings(folder)
    _check_hashes(folder, stored, wanted)
    _check_settings(config, stored, wanted)
    _check_content(folder, stored.get("sources"), sources)
    return stored.get("sources", sources)


def fetched(folder: str | Path) -> Path:
    """Brings the copy of a folder under a URL up to date, but for states; returns its path."""
    return fetch(folder, skip=("*.states",))


def not_shared(folder: str | Path) -> str:
    """Returns the message for a folder that other processes do not see."""
    return (
        f"data.folder: {folder} lacks files that other processes wrote; set a folder on a file "
        "system that all processes share"
    )


def _check_hashes(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in _HASHES.keys() & wanted.keys():
        # a hash that the folder does not have cannot be checked
        if stored.get(key, wanted[key]) != wanted[key]:
            raise UserError(
                f"{folder} was made for {_HASHES[key]} ({key} {stored[key]:.12} there, "
                f"{wanted[key]:.12} now); {_ANEW}"
            )


def _check_settings(
    config: DataConfig, stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
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
            f"{config.folder} holds text written with other settings ({listed}); {_ANEW}"
        )
    if of_old_shares(config.folder):
        raise UserError(
            f"{config.folder} was filled by {stored['processes']} processes of version 0.1.0, in "
            "an order that this version does not have; write its rows to a file with python -m "
            f"beagle_jax.prepare --export text{SUFFIX} and the same settings, then set "
            f"data.source: text{SUFFIX} and another data.folder"
        )


def _check_content(folder: Path, there: Sequence[Content] | None, now: Sequence[Content]) -> None:
    """Compares the content of the source with what it was; either may not be known."""
    for old, new in zip(there or (), now, strict=False):
        if old["sha256"] != new["sha256"]:
            raise UserError(
                f"{folder} holds text of another content of {old['name']} (sha256 "
                f"{old['sha256']:.12} there, {new['sha256']:.12} now): the file was edited, "
                f"reordered or replaced; put it back, or {_ANEW}"
            )


def is_claimed(folder: str | Path) -> bool:
    """Returns whether the folder has been claimed, so that text is being written to it."""
    return (fetched(folder) / "settings.json").exists()


def of_old_shares(folder: str | Path) -> bool:
    """Returns whether several processes of version 0.1.0 divided the text of a folder."""
    return is_claimed(folder) and _settings(local(folder)).get("processes", 1) > 1


def source_revision(folder: str | Path) -> str | None:
    """Returns the commit of the dataset that a claimed folder holds text of; None if unknown."""
    return next(
        (source["revision"] for source in _settings(local(folder)).get("sources", ())), None
    )


def text_header(folder: str | Path) -> Header:
    """Returns what the text of a claimed folder was made for, and from."""
    stored = _settings(local(folder))
    made_for = {key: stored[key] for key in ("target", *_HASHES) if key in stored}
    return Header(made_for, stored.get("sources", ()))


def answer_tokens_of(folder: str | Path) -> int | None:
    """Returns the `data.answer_tokens` that a claimed folder was begun with; None if unknown."""
    return _settings(local(folder)).get("answer_tokens")


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(
        folder / "settings.json", "prepare writes it", "delete data.folder, or set another"
    )


def states_path(folder: str | Path, part: int) -> Path:
    """Returns the file that holds the states of a part."""
    return local(folder) / f"part-{part:04d}.states"


def part_path(folder: str | Path, part: int) -> Path:
    """Returns the file that holds the rows of a part."""
    return local(folder) / f"part-{part:04d}{SUFFIX}"


def prompts_path(folder: str | Path, number: int) -> Path:
    """Returns the file that holds a round of prompts that the target made up."""
    return local(folder) / f"prompts-{number:04d}{SUFFIX}"


def exhausted_path(folder: str | Path) -> Path:
    """Returns the file that marks that the source has no more chats."""
    return local(folder) / "all"


def write_part(
    folder: str | Path, part: int, rows: Sequence[Row], header: Header | None = None
) -> None:
    """Writes the text of a part."""
    write_rows(part_path(folder, part), rows, header or Header(items=len(rows)))


def read_parts(folder: str | Path) -> dict[int, list[Row]]:
    """Reads the rows of every part, by part number.

    Raises:
        UserError: naming file and line of a record that is not a row, or a damaged file.
    """
    fetched(folder)
    return {number: _read_part(path) for number, path in part_files(folder).items()}


def part_files(folder: str | Path) -> dict[int, Path]:
    """Returns the file of every part, by part number, ascending."""
    paths = [*local(folder).glob("part-*.jsonl"), *local(folder).glob(f"part-*{SUFFIX}")]
    return dict(sorted((int(path.stem.removeprefix("part-")), path) for path in paths))


def old_parts(folder: str | Path) -> list[int]:
    """Returns the numbers of the parts that version 0.1.0 wrote."""
    return [number for number, path in part_files(folder).items() if path.suffix != SUFFIX]


def items_before(folder: str | Path, part: int) -> int:
    """Returns how many items of the source became the rows of the parts before `part`."""
    return sum(_items(path) for number, path in part_files(folder).items() if number < part)


def _items(path: Path) -> int:
    if path.suffix == SUFFIX:
        opened = open_rows(path)
        return len(opened) if opened.header.items is None else opened.header.items
    return len(_read_part(path))


def missing_parts(folder: str | Path, parts: Container[int]) -> list[int]:
    """Returns the numbers of planned parts that are not among `parts`."""
    planned = (n for wave in read_waves(folder) for n in range(wave.first, wave.end))
    return [number for number in planned if number not in parts]


def check_gaps(folder: str | Path, parts: Mapping[int, Any]) -> None:
    """Checks that no part is missing but those that a wave has still to write.

    Raises:
        UserError: a part was deleted whose place in the source is not known.
    """
    absent = sorted({*range(max(parts, default=-1))} - {*parts, *missing_parts(folder, parts)})
    if absent:
        raise UserError(
            f"{part_path(folder, absent[0])} is missing, and later parts are there; put it back, "
            f"or {_ANEW}"
        )


def prompt_rounds(folder: str | Path) -> list[int]:
    """Returns the numbers of the rounds of prompts that the target made up, ascending."""
    paths = fetched(folder).glob(f"prompts-*{SUFFIX}")
    return sorted(int(path.stem.removeprefix("prompts-")) for path in paths)


def write_wave(folder: str | Path, number: int, wave: Wave, share: Share) -> None:
    """Writes the plan of a wave."""
    _write_shared(_wave_path(folder, number), json.dumps(wave._asdict()), share)


def _write_shared(path: Path, text: str, share: Share) -> None:
    """Writes a file that shares of `prepare --part` may write at once, with the same text."""
    write_text(path, text, f"-of-{share.index}")


def read_waves(folder: str | Path) -> list[Wave]:
    """Reads the plans of all waves."""
    waves: list[Wave] = []
    while (path := _wave_path(folder, len(waves))).exists():
        record = read_json(path, "", "delete data.folder, or set another")
        waves.append(Wave(int(record["first"]), list(map(int, record["items"]))))
    return waves


def _wave_path(folder: str | Path, number: int) -> Path:
    return local(folder) / f"wave-{number:04d}.json"


def _read_part(path: Path) -> list[Row]:
    if path.suffix == SUFFIX:
        return list(open_rows(path))
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

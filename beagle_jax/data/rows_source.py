"""Token rows as `data.source`: .rows files of this or another machine (data/rows_file.py)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.data.fingerprint import text_hashes
from beagle_jax.data.rows_file import SUFFIX, RowsFile, open_rows
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.remote import fetch

_log = logging.getLogger(__name__)

_HASHES = {"tokenizer_sha256": "tokenizer", "template_sha256": "chat template"}


def rows_files(source: str) -> list[Path]:
    """Returns the .rows files of a source: the file itself, or those of a folder; else none.

    Of a folder that is a `data.folder`, these are the parts of its text.
    """
    if source == "self" or source.startswith(("hf:", "openai:")):
        return []
    path = fetch(source)
    if path.suffix == SUFFIX:
        return [path]
    if not path.is_dir() or any(path.glob("*.jsonl*")):
        return []
    files = [file for file in path.glob(f"*{SUFFIX}") if not file.name.startswith((".", "prompts"))]
    return sorted(files, key=lambda file: (len(file.name), file.name))


def stored_rows(
    config: DataConfig,
    files: Sequence[Path],
    made_for: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[tuple[Row, str]]:
    """Yields the rows of files, each with its place.

    made_for: hashes of the target that is to be trained for.

    Raises:
        UserError: a file is damaged, or was written with another tokenizer or chat template, or
            `data.answers` is `regenerate`, which needs chats.
    """
    if config.answers == "regenerate":
        raise UserError(
            f"data.answers: regenerate needs chats, and {files[0]} holds token rows; set "
            "data.answers: keep"
        )
    wanted = text_hashes(tokenizer) | dict(made_for)
    for path in files:
        opened = open_rows(path)
        _check(opened, wanted)
        yield from ((row, f"{path}, row {number}") for number, row in enumerate(opened))


def _check(opened: RowsFile, wanted: Mapping[str, str]) -> None:
    there = opened.header.made_for
    for key, name in _HASHES.items():
        if there.get(key, wanted[key]) != wanted[key]:
            raise UserError(
                f"{opened.path}: its rows are of another {name} ({key} {there[key]:.12} there, "
                f"{wanted[key]:.12} here); tokens mean something else to this target: get text "
                "that was written for it"
            )
    if unknown := [name for key, name in _HASHES.items() if key not in there]:
        _log.info(
            f"{opened.path} does not say which {' and '.join(unknown)} its rows are of; look at "
            "them with prepare --preview"
        )
    target = "target_sha256"
    if target in wanted and there.get(target, wanted[target]) != wanted[target]:
        _log.info(
            f"{opened.path}: its answers are of another target, {there.get('target')}, with the "
            "same tokenizer; a draft learns best from answers of its own target"
        )

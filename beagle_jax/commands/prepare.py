"""`prepare`: training text and target states on disk, or a preview of the rows."""

import sys
from itertools import islice
from pathlib import Path

from beagle_jax.config import Config, DataConfig
from beagle_jax.corpus.fill import fill_folder
from beagle_jax.corpus.text import is_complete, within_budget
from beagle_jax.data.chats import own_prompts
from beagle_jax.data.folder import of_old_shares, read_parts, text_header
from beagle_jax.data.preview import preview
from beagle_jax.data.rows_file import write_rows
from beagle_jax.data.share import Share, this_process
from beagle_jax.data.source import check_source, source_chats, source_rows
from beagle_jax.data.states import stored_dtype
from beagle_jax.data.template import supervised_tokens
from beagle_jax.errors import UserError
from beagle_jax.processes import is_first
from beagle_jax.remote import local, url_of
from beagle_jax.sharding import make_mesh, own_part
from beagle_jax.terminal import listen
from beagle_jax.weights.chat_template import choose_template
from beagle_jax.weights.shape import check_shape
from beagle_jax.weights.target import configured_target, open_source


def prepare_share(
    config: Config, part: tuple[int, int] | None, export: str | None = None
) -> tuple[str, dict]:
    """Writes the share `part` (None: this process's) of text and states.

    export: a file that then gets the rows of the whole text. Returns a one-line summary and its
    figures.

    Raises:
        UserError: a file is to be written and other shares have not written their text yet.
    """
    listen()
    if export is not None:
        local(export)  # raises UserError for a URL that cannot be written
    if export is not None and of_old_shares(config.data.folder):
        return _export_old(config.data.folder, local(export))
    check_source(config.data)
    target = configured_target(config.target, own_part(make_mesh(config.mesh)), decoding=False)
    check_shape(config.target, target.spec)
    share = Share(*part) if part else this_process()
    parts = fill_folder(config, target, share)
    rows = [row for number in parts if number % share.count == share.index for row in parts[number]]
    figures = {
        "folder": config.data.folder,
        "rows": len(rows),
        "tokens": sum(len(row.tokens) for row in rows),
        "answer_tokens": supervised_tokens(rows),
        "states_dtype": None
        if config.data.states == "online"
        else stored_dtype(target.params, config.data.states_dtype),
    }
    if export is not None:
        export_text(config.data, local(export))
    whose = f"share {share.index} of {share.count}: " if share.count > 1 else ""
    return (
        f"{whose}{figures['rows']:,} rows, {figures['tokens']:,} tokens ready in "
        f"{config.data.folder}",
        figures,
    )


def export_text(config: DataConfig, path: Path) -> None:
    """Writes the text of `data.folder` to one file of token rows.

    Raises:
        UserError: the text is not complete.
    """
    parts = read_parts(config.folder)
    if not is_complete(config, parts):
        raise UserError(
            f"--export: the text in {config.folder} is not complete; let the other shares write "
            "theirs first"
        )
    if not is_first():
        return
    rows = [row for part in within_budget(config, parts).values() for row in part]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows, text_header(config.folder))
    name = url_of(path) or path
    print(f"{len(rows):,} rows written to {name}; data.source={name} reads them")


def _export_old(folder: str, path: Path) -> tuple[str, dict]:
    """Writes the text that several processes of version 0.1.0 divided, whether complete or not."""
    rows = [row for part in read_parts(folder).values() for row in part]
    write_rows(path, rows, text_header(folder))
    return f"{len(rows):,} rows of {folder} written to {path}", {"rows": len(rows)}


def preview_rows(config: Config, count: int) -> tuple[str, list[dict]]:
    """Returns the first rows of the source as training would see them, as text and figures.

    Loads no weights.
    """
    listen()
    settings = config.target
    opened = open_source(settings.source, Path(settings.cache_dir).expanduser())
    tokenizer = choose_template(
        opened.tokenizer(),
        settings.chat_template,
        dict(settings.template_variables),
        settings.source,
    )
    chats = own_prompts("train") if config.data.source == "self" else source_chats(config.data)
    rows = list(islice(source_rows(config.data, chats, tokenizer, opened.eos_ids()), count))
    figures = [
        {"tokens": row.tokens, "supervised": [int(flag) for flag in row.supervised]} for row in rows
    ]
    assert sys.__stdout__ is not None  # the command's own, as nothing else is printed
    return preview(rows, tokenizer, sys.__stdout__), figures

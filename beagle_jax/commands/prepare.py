"""`prepare`: training text and target states on disk, or a preview of the rows."""

import sys
from itertools import islice
from pathlib import Path

from beagle_jax.config import Config
from beagle_jax.corpus.fill import fill_folder
from beagle_jax.data.chats import own_prompts
from beagle_jax.data.preview import preview
from beagle_jax.data.share import Share, this_process
from beagle_jax.data.source import check_source, source_chats, source_rows
from beagle_jax.data.states import stored_dtype
from beagle_jax.data.template import supervised_tokens
from beagle_jax.terminal import listen
from beagle_jax.weights.chat_template import choose_template
from beagle_jax.weights.shape import check_shape
from beagle_jax.weights.target import configured_target, open_source


def prepare_share(config: Config, part: tuple[int, int] | None) -> tuple[str, dict]:
    """Writes the share `part` (None: this process's) of text and states.

    Returns a one-line summary and its figures.
    """
    listen()
    check_source(config.data)
    target = configured_target(config.target, decoding=False)
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
    whose = f"share {share.index} of {share.count}: " if share.count > 1 else ""
    return (
        f"{whose}{figures['rows']:,} rows, {figures['tokens']:,} tokens ready in "
        f"{config.data.folder}",
        figures,
    )


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

"""From a config to training text and target states on disk; `train` does the same first."""

import shutil
import sys
from itertools import islice
from pathlib import Path

from beagle_jax.config import Config
from beagle_jax.data.answers import (
    check_source,
    expected_tokens,
    is_complete,
    source_chats,
    source_rows,
    training_rows,
)
from beagle_jax.data.chats import own_prompts
from beagle_jax.data.fingerprint import fingerprints
from beagle_jax.data.folder import read_parts, states_path
from beagle_jax.data.preview import preview
from beagle_jax.data.share import Share, this_process, wait_for_all
from beagle_jax.data.states import (
    StoredStates,
    is_stored,
    record_bytes,
    states_bytes,
    stored_dtype,
    target_states,
)
from beagle_jax.data.template import Row
from beagle_jax.decoding.batch import answer_writer
from beagle_jax.errors import UserError
from beagle_jax.terminal import size
from beagle_jax.weights.shape import check_shape
from beagle_jax.weights.target import Target, configured_target, open_source

_LESS_DISK = (
    "lower data.answer_tokens, set data.states_dtype: int8 or data.states: online, or "
    "data.folder on a larger disk"
)


def prepare_share(config: Config, part: tuple[int, int] | None) -> tuple[str, dict]:
    """Writes the share `part` (this process's if None) of text and states; returns a line about it
    and its figures.
    """
    check_source(config.data)
    target = configured_target(config.target, decoding=False)
    check_shape(config.target, target.spec)
    share = Share(*part) if part else this_process()
    parts = write_text_and_states(config, target, share)
    rows = [row for number in parts if number % share.count == share.index for row in parts[number]]
    figures = {
        "folder": config.data.folder,
        "rows": len(rows),
        "tokens": sum(len(row.tokens) for row in rows),
        "answer_tokens": sum(sum(row.supervised) for row in rows),
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
    """The first rows of the source as they would be trained on, and the same as figures. Loads no
    weights.
    """
    opened = open_source(config.target.source, Path(config.target.cache_dir).expanduser())
    tokenizer = opened.tokenizer()
    chats = own_prompts("train") if config.data.source == "self" else source_chats(config.data)
    rows = list(islice(source_rows(config.data, chats, tokenizer, opened.eos_ids()), count))
    figures = [
        {"tokens": row.tokens, "supervised": [int(flag) for flag in row.supervised]} for row in rows
    ]
    return preview(rows, tokenizer, sys.__stdout__), figures


def rows_and_states(config: Config, target: Target) -> tuple[list[Row], list[StoredStates] | None]:
    """All rows to train on and the target's states of each, None with data.states: online; what is
    missing is written first.
    """
    share = this_process()
    parts = write_text_and_states(config, target, share)
    if share.count > 1:
        wait_for_all("training text and states")
        parts = read_parts(config.data.folder)
        if not is_complete(config.data, parts):
            raise UserError(
                f"data.folder: {config.data.folder} lacks what other processes wrote; it must "
                "be a folder that all of them see"
            )
    rows = [row for part in parts.values() for row in part]
    if config.data.states == "online":
        return rows, None
    return rows, [
        states for number in parts for states in _states_of(config, target, parts, number)
    ]


def write_text_and_states(config: Config, target: Target, share: Share) -> dict[int, list[Row]]:
    """Writes what is missing of a share: text, then states. Says how much disk they take before it
    is taken.
    """
    answers = answer_writer(
        target.params, target.spec, target.eos_ids, config.data.batch, config.data.top_k
    )
    announced = config.data.states == "online"

    def write(prompts, **settings):
        """Only here is it certain that the target writes; answers bring their states along."""
        nonlocal announced
        if not announced:
            _announce_writing(config, target)
        announced = True
        return answers(prompts, **settings)

    made_for = {"target": config.target.source, **fingerprints(target.params, target.tokenizer)}
    parts = training_rows(config.data, made_for, target.tokenizer, target.eos_ids, write, share)
    if config.data.states == "disk":
        _announce_states(config, target, parts)
        for number in parts:
            if number % share.count == share.index:
                _states_of(config, target, parts, number)
    return parts


def _states_of(
    config: Config, target: Target, parts: dict[int, list[Row]], number: int
) -> list[StoredStates]:
    path = states_path(config.data.folder, number)
    return target_states(target.params, target.spec, parts[number], path, config.data.states_dtype)


def _announce_writing(config: Config, target: Target) -> None:
    """The size of the states before the target writes the text that they belong to: known from
    below, guessed from above.

    Of a source that may end before the budget of answer tokens is met, nothing is known from below.
    """
    data, endless = config.data, config.data.source == "self"
    there = read_parts(data.folder)
    tokens = max(
        data.answer_tokens - sum(sum(row.supervised) for rows in there.values() for row in rows), 0
    )
    record = record_bytes(target.spec.hidden_size, stored_dtype(target.params, data.states_dtype))
    with_prompts = expected_tokens(data, tokens)
    free = shutil.disk_usage(_existing(data.folder)).free
    print(
        f"target states of {'' if endless else 'up to '}{tokens:,} answer tokens to be "
        f"written: {size(tokens * record)}, with their prompts at most about "
        f"{size(with_prompts * record)}; {size(free)} are free in {data.folder}"
    )
    if endless and tokens * record > free:
        raise UserError(
            f"data.folder: {data.folder} has {size(free)} free, the target's states need more than "
            f"{size(tokens * record)}; {_LESS_DISK}"
        )


def _announce_states(config: Config, target: Target, parts: dict[int, list[Row]]) -> None:
    """The exact size of all states, and whether what is missing fits."""
    folder, width = config.data.folder, target.spec.hidden_size
    dtype = stored_dtype(target.params, config.data.states_dtype)
    total = {number: states_bytes(rows, width, dtype) for number, rows in parts.items()}
    missing = sum(
        total[number]
        for number, rows in parts.items()
        if not is_stored(states_path(folder, number), rows, width, dtype)
    )
    tokens = sum(len(row.tokens) for rows in parts.values() for row in rows)
    free = shutil.disk_usage(folder).free
    print(
        f"target states: {tokens:,} tokens x {width} in {dtype}, {size(sum(total.values()))} "
        f"in {len(parts)} part{'s' * (len(parts) > 1)}; {size(missing)} to write, {size(free)} "
        f"free in {folder}"
    )
    if missing > free:
        raise UserError(
            f"data.folder: {folder} has {size(free)} free, the target's states need "
            f"{size(missing)} more; {_LESS_DISK}"
        )


def _existing(folder: str) -> Path:
    """The folder, or the nearest above it that exists."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return path

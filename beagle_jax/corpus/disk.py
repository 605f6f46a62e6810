"""Announces the disk space of the target's states and refuses a disk that is too small."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from beagle_jax.config import Config
from beagle_jax.corpus.text import expected_tokens
from beagle_jax.data.folder import read_parts, states_path
from beagle_jax.data.state_records import record_bytes
from beagle_jax.data.states import is_stored, record_width, states_bytes, stored_dtype
from beagle_jax.data.template import Row, supervised_tokens
from beagle_jax.errors import UserError
from beagle_jax.model.kinds import new_spec
from beagle_jax.remote import local
from beagle_jax.terminal import size
from beagle_jax.weights.target import Target

_log = logging.getLogger(__name__)

_LESS_DISK = (
    "lower data.answer_tokens, set data.states_dtype: int8 or data.states: online, or "
    "data.folder on a larger disk"
)


def announce_writing(config: Config, target: Target) -> None:
    """Announces the size of the states before the target generates their text.

    The size is bounded from below by the missing answer tokens and estimated from above. A source
    that can end before the budget of answer tokens is met has no lower bound.

    Raises: UserError if the lower bound exceeds the free space.
    """
    data, endless = config.data, config.data.source == "self"
    written = sum(map(supervised_tokens, read_parts(data.folder).values()))
    tokens = max(data.answer_tokens - written, 0)
    width = record_width(target.spec, taps_of(config, target))
    record = record_bytes(width, stored_dtype(target.params, data.states_dtype))
    with_prompts = expected_tokens(data, tokens)
    free = shutil.disk_usage(_existing(data.folder)).free
    _log.info(
        f"target states of {'' if endless else 'up to '}{tokens:,} answer tokens to be "
        f"written: {size(tokens * record)}, with their prompts at most about "
        f"{size(with_prompts * record)}; {size(free)} are free in {data.folder}"
    )
    if endless and tokens * record > free:
        raise UserError(
            f"data.folder: {data.folder} has {size(free)} free, the target's states need more than "
            f"{size(tokens * record)}; {_LESS_DISK}"
        )


def announce_states(config: Config, target: Target, parts: Mapping[int, list[Row]]) -> None:
    """Announces the exact size of all states.

    Raises: UserError if the missing states exceed the free space.
    """
    folder, taps = config.data.folder, taps_of(config, target)
    width = record_width(target.spec, taps)
    dtype = stored_dtype(target.params, config.data.states_dtype)
    total = {number: states_bytes(rows, width, dtype) for number, rows in parts.items()}
    missing = sum(
        total[number]
        for number, rows in parts.items()
        if rows and not is_stored(states_path(folder, number), rows, width, dtype, taps)
    )
    tokens = sum(len(row.tokens) for rows in parts.values() for row in rows)
    free = shutil.disk_usage(_existing(folder)).free
    _log.info(
        f"target states: {tokens:,} tokens x {width} in {dtype}, {size(sum(total.values()))} "
        f"in {len(parts)} part{'s' * (len(parts) > 1)}; {size(missing)} to write, {size(free)} "
        f"free in {folder}"
    )
    if missing > free:
        raise UserError(
            f"data.folder: {folder} has {size(free)} free, the target's states need "
            f"{size(missing)} more; {_LESS_DISK}"
        )


def taps_of(config: Config, target: Target) -> tuple[int, ...]:
    """Layers whose outputs the draft of this run reads (`DraftSpec.taps`)."""
    return new_spec(config.draft, target.spec).taps


def _existing(folder: str) -> Path:
    """Returns the folder, or its nearest parent that exists."""
    path = local(folder).absolute()
    while not path.exists():
        path = path.parent
    return path

"""Fills `data.folder` with text and the target's states, and reads both back for training."""

from functools import partial

from beagle_jax.config import Config
from beagle_jax.corpus.disk import announce_states, announce_writing, taps_of
from beagle_jax.corpus.text import is_complete, training_rows, within_budget
from beagle_jax.corpus.writer import TargetWriter
from beagle_jax.data.fingerprint import fingerprints
from beagle_jax.data.folder import not_shared, read_parts, states_path
from beagle_jax.data.share import Share, this_process, wait_for_all
from beagle_jax.data.states import StoredStates, store_states, target_states
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.remote import fetch
from beagle_jax.weights.target import Target


def rows_and_states(config: Config, target: Target) -> tuple[list[Row], list[StoredStates] | None]:
    """Returns all rows to train on and the target's states of each.

    Writes what is missing first. States are None with data.states: online.
    """
    share = this_process()
    parts = fill_folder(config, target, share)
    if share.count > 1:
        wait_for_all("training text and states")
        parts = read_parts(config.data.folder)
        if not is_complete(config.data, parts):
            raise UserError(not_shared(config.data.folder))
        parts = within_budget(config.data, parts)
    rows = [row for part in parts.values() for row in part]
    if config.data.states == "online":
        return rows, None
    fetch(config.data.folder)  # of a URL, all states at once
    return rows, [
        states for number in parts for states in _states_of(config, target, parts, number)
    ]


def fill_folder(config: Config, target: Target, share: Share) -> dict[int, list[Row]]:
    """Writes what is missing of a share, text first, then states.

    Announces their disk space before it writes them. Returns the rows by part.
    """
    keeps_states = config.data.states == "disk"
    announce = partial(announce_writing, config, target) if keeps_states else (lambda: None)
    write = TargetWriter(target, config.data, announce)
    made_for = {"target": config.target.source, **fingerprints(target.params, target.tokenizer)}
    parts = training_rows(
        config.data,
        made_for,
        target.tokenizer,
        target.eos_ids,
        write,
        share,
        target.spec.vocab_size,
        # The writer gives states after the final norm alone.
        keeps_states=keeps_states and not taps_of(config, target),
    )
    if keeps_states:
        announce_states(config, target, parts)
        own = [
            (states_path(config.data.folder, number), rows)
            for number, rows in parts.items()
            if rows and number % share.count == share.index
        ]
        data, taps = config.data, taps_of(config, target)
        store_states(target.params, target.spec, own, data.states_dtype, taps, data.states_tokens)
    return parts


def _states_of(
    config: Config, target: Target, parts: dict[int, list[Row]], number: int
) -> list[StoredStates]:
    if not parts[number]:  # every chat of the part was left out
        return []
    path, taps = states_path(config.data.folder, number), taps_of(config, target)
    return target_states(
        target.params, target.spec, parts[number], path, config.data.states_dtype, taps
    )

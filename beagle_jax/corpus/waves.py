"""Divides the items of a source, its chats and prompts, into parts of `data.folder`.

A wave is planned from what the folder holds and from the source alone, and its plan is a file.
Whoever continues writes the parts of that plan, so the text does not depend on the number of
processes, on the batch size or on interruptions.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from beagle_jax.config import DataConfig
from beagle_jax.data.folder import Wave
from beagle_jax.data.template import Row, supervised_tokens

PART_ROWS, _LEAST_ROWS = 1024, 64  # items of one part, and of one of several in a wave
SERVER_ROWS = 128  # of a part that a server answers: an interruption loses what it answered of it
# Parts of a wave: bounds memory.
WAVE_PARTS, FIRST_WAVE_PARTS = 64, 8


class Planned(NamedTuple):
    """A wave, the items of this process's parts by part number, and whether the source ended."""

    wave: Wave
    own: dict[int, list[Row]]
    ended: bool


def answer_length(config: DataConfig, parts: Mapping[int, Sequence[Row]]) -> float:
    """Returns the mean answer tokens of a row that was written; without rows, the limit.

    So the first wave writes no more than the budget, and the next one what it lacks.
    """
    rows = [row for part in parts.values() for row in part]
    return supervised_tokens(rows) / len(rows) if rows else config.max_answer_tokens


def part_rows(items: float) -> int:
    """Returns the items of each part, where a wave is expected to have so many.

    A small wave has two, four or eight parts, so that as many processes have work.
    """
    parts = min(FIRST_WAVE_PARTS, max(1, int(items) // _LEAST_ROWS))
    return min(PART_ROWS, math.ceil(items / 2 ** (parts.bit_length() - 1)))


def plan(
    items: Iterator[Row],
    first: int,
    missing: int,
    length: float,
    is_own: Callable[[int], bool],
    by_server: bool = False,
) -> Planned:
    """Plans the parts that are expected to give the missing answer tokens.

    items: of the source, from the first one that no part holds. first: number of the first part.
    length: answer tokens of an item without an answer. is_own: whether this process writes a part;
    items of other parts are not kept. by_server: a server answers the items.
    """
    rows = part_rows(missing / length)
    if by_server:
        rows = min(rows, SERVER_ROWS)
    most = FIRST_WAVE_PARTS if first == 0 else WAVE_PARTS
    sizes: list[int] = []
    own: dict[int, list[Row]] = {}
    expected, ended = 0.0, False
    while expected < missing and len(sizes) < most:
        group, tokens = _group(items, missing - expected, length, rows)
        expected += tokens
        ended = expected < missing and len(group) < rows
        if group:
            if is_own(first + len(sizes)):
                own[first + len(sizes)] = group
            sizes.append(len(group))
        if ended:
            break
    return Planned(Wave(first, sizes), own, ended)


def follow(items: Iterator[Row], wave: Wave, is_own: Callable[[int], bool]) -> dict[int, list[Row]]:
    """Returns the items of this process's parts of a planned wave, by part number."""
    own = {}
    for part, count in enumerate(wave.items, wave.first):
        group = list(islice(items, count))
        if is_own(part):
            own[part] = group
    return own


def _group(
    items: Iterator[Row], missing: float, length: float, most: int
) -> tuple[list[Row], float]:
    """Returns the items of one part and the answer tokens that they are expected to give."""
    group: list[Row] = []
    expected = 0.0
    for row in islice(items, most):
        group.append(row)
        expected += sum(row.supervised) or length * row.answers
        if expected >= missing:
            break
    return group, expected

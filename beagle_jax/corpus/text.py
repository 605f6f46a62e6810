"""The training text of `data.folder`: reads it, or writes this process's share of it.

Each chat of the source that has something to learn becomes one row, in the source's order. An
interrupted run therefore continues at the number of rows already written. data/folder.py describes
the files.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.corpus.prompts import self_written_prompts
from beagle_jax.corpus.writer import Answer, Writer
from beagle_jax.data.folder import (
    claim,
    exhausted_path,
    filled_by,
    read_parts,
    states_path,
    write_part,
)
from beagle_jax.data.share import ALONE, Share
from beagle_jax.data.source import source_chats, source_rows
from beagle_jax.data.states import keep_states
from beagle_jax.data.template import Row, supervised_tokens
from beagle_jax.errors import UserError

_log = logging.getLogger(__name__)

PART_ROWS = 1024  # rows of one part


def training_rows(
    config: DataConfig,
    made_for: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    write: Writer,
    share: Share = ALONE,
) -> dict[int, list[Row]]:
    """Returns the rows to train on, by part.

    Reads `data.folder` if it is complete, otherwise first writes this process's share. If the
    folder has more text than `data.answer_tokens`, only the first parts with that many answer
    tokens are used. With several processes, the result contains what the others have written so
    far. made_for: the target's source and hashes.

    Raises: UserError if the text was written for another target or divided among another number of
    processes, or if the source yields no row.
    """
    folder = Path(config.folder)
    claim(config, made_for, share)
    parts = read_parts(folder)
    if not is_complete(config, parts):
        if filled_by(folder) != share.count:
            raise UserError(
                f"{folder}: its text is not complete and divided among {filled_by(folder)} "
                f"processes, but this run has {share.count}; finish it with python -m "
                f"beagle_jax.prepare and {filled_by(folder)} processes, or delete it"
            )
        if not _share_complete(config, parts, share):
            _write_share(config, folder, parts, tokenizer, eos_ids, write, share)
            parts = read_parts(folder)
    if not parts and share.count == 1:
        raise UserError(f"data.source: {config.source!r} gave no row to train on")
    return _within_budget(config, parts)


def _within_budget(config: DataConfig, parts: Mapping[int, list[Row]]) -> dict[int, list[Row]]:
    """Selects each process's parts up to its part of the budget, to the end of a part.

    This is the text that a new folder would have.
    """
    selected: dict[int, list[Row]] = {}
    have: Counter[int] = Counter()  # answer tokens by process
    processes = filled_by(config.folder)
    for number, rows in sorted(parts.items()):
        share = Share(number % processes, processes)
        if have[share.index] < _budget(config, share):
            selected[number] = rows
            have[share.index] += supervised_tokens(rows)
    return selected


def _mine(parts: Mapping[int, list[Row]], share: Share) -> list[list[Row]]:
    return [rows for number, rows in parts.items() if number % share.count == share.index]


def _budget(config: DataConfig, share: Share) -> int:
    return -(-config.answer_tokens // share.count)


def is_complete(config: DataConfig, parts: Mapping[int, list[Row]]) -> bool:
    """Whether every process has met its part of the budget or reached the end of the source."""
    processes = filled_by(config.folder)
    return all(
        _share_complete(config, parts, Share(index, processes)) for index in range(processes)
    )


def _share_complete(config: DataConfig, parts: Mapping[int, list[Row]], share: Share) -> bool:
    written = sum(map(supervised_tokens, _mine(parts, share)))
    return written >= _budget(config, share) or exhausted_path(config.folder, share.index).exists()


def expected_tokens(config: DataConfig, answer_tokens: int) -> int:
    """Upper estimate of the tokens of a text with this many answer tokens.

    Assumes prompts at their limit and half-length answers.
    """
    return round(answer_tokens * (1 + 2 * config.max_prompt_tokens / config.max_answer_tokens))


def _in_groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while group := list(islice(rows, PART_ROWS)):
        yield group


def _write_share(
    config: DataConfig,
    folder: Path,
    parts: Mapping[int, list[Row]],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    write: Writer,
    share: Share,
) -> None:
    """Writes this process's parts until its budget is met or the source ends."""
    mine = _mine(parts, share)
    budget, have = _budget(config, share), sum(map(supervised_tokens, mine))
    if config.source == "self":
        groups = self_written_prompts(
            config, tokenizer, eos_ids, write, mine, share, PART_ROWS, lambda: budget - have
        )
    else:
        chats = islice(source_chats(config), share.index, None, share.count)
        from_source = source_rows(config, chats, tokenizer, eos_ids)
        groups = _in_groups(islice(from_source, sum(map(len, mine)), None))
    part = share.index + share.count * len(mine)
    waiting: list[Row] = []
    with tqdm(total=budget, initial=have, desc="training text", unit="tok", smoothing=0.05) as bar:
        while have < budget:
            waiting = waiting or next(groups, [])
            if not waiting:
                exhausted_path(folder, share.index).touch()
                return
            count = _enough(config, waiting, budget - have)
            group, waiting = waiting[:count], waiting[count:]
            rows = _write_group(config, folder, part, group, write, bar)
            part, have = part + share.count, have + supervised_tokens(rows)
        # The last answers slightly exceed the budget; tqdm would then drop the total from the bar.
        bar.total = bar.n
    if config.source != "self":
        _log.info(
            f"data.answer_tokens = {config.answer_tokens:,} is reached; the rest of "
            f"{config.source} is not used"
        )


def _enough(config: DataConfig, rows: Sequence[Row], tokens: int) -> int:
    """Returns how many of the rows form a part that yields `tokens` answer tokens.

    A row without an answer counts as a half-length answer.
    """
    expected = 0.0
    for count, row in enumerate(rows[:PART_ROWS], 1):
        expected += sum(row.supervised) or config.max_answer_tokens / 2
        if expected >= tokens:
            return count
    return min(len(rows), PART_ROWS)


def _write_group(
    config: DataConfig, folder: Path, part: int, group: Sequence[Row], write: Writer, bar: tqdm
) -> list[Row]:
    """Answers the rows that have no answer and writes the part.

    Stores the target's states if every row was answered now.
    """
    given = [row for row in group if any(row.supervised)]
    prompts = [row.tokens for row in group if not any(row.supervised)]
    bar.update(supervised_tokens(given))
    written: list[Answer] = []
    if prompts:
        written = list(
            write(
                prompts,
                max_new=config.max_answer_tokens,
                temperature=config.temperature,
                seed=config.seed + part,
                on_tokens=bar.update,
            )
        )
    rows = given + [_row(prompts[answer.index], answer.tokens) for answer in written]
    if written and not given and config.states == "disk":
        keep_states(
            states_path(folder, part),
            rows,
            [answer.states_LD for answer in written],
            config.states_dtype,
        )
    write_part(folder, part, rows)
    return rows


def _row(prompt: list[int], answer: list[int]) -> Row:
    return Row(prompt + answer, [False] * len(prompt) + [True] * len(answer))

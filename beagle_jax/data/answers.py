"""The training text: chats as given, or prompts that the target answers; kept on disk so that a
second run skips it.

Each chat of the source that can teach something becomes one row, in the source's order, so the
number of rows that are there is also the place where an interrupted run goes on. data/folder.py
knows the files. How answers are sampled is the caller's: `write` is passed in (see
decoding/batch.py).
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.data.chats import Chat, local_source, own_prompts, read_chats
from beagle_jax.data.folder import (
    claim,
    exhausted_path,
    filled_by,
    is_claimed,
    read_parts,
    states_path,
    write_part,
)
from beagle_jax.data.hub import hub_chats
from beagle_jax.data.share import ALONE, Share
from beagle_jax.data.states import keep_states
from beagle_jax.data.template import Row, chat_row, prompt_tokens, user_header
from beagle_jax.errors import UserError

PART_ROWS = 1024  # rows of one part
# Prompts that the target makes up: sampled hot for variety, kept only if it ended them itself.
_MADE_UP_TEMPERATURE = 1.0
_MADE_UP_TOKENS = 48
_MADE_UP_WORDS = 3  # shorter ones are noise
_MADE_UP_AT_LEAST = 64  # asked for at once: of a few, none might be usable


class Answer(Protocol):
    """What the target wrote after one prompt: decoding/batch.py's `Answer`."""

    index: int
    tokens: list[int]
    states_LD: np.ndarray


class Writer(Protocol):
    """Samples continuations of token prompts and yields them in any order."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new: int,
        temperature: float,
        seed: int,
        on_tokens: Callable[[int], object],
    ) -> Iterator[Answer]: ...


def training_rows(
    config: DataConfig,
    made_for: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    write: Writer,
    share: Share = ALONE,
) -> dict[int, list[Row]]:
    """Rows to train on, by part: read from `data.folder` if it is complete, else this process's
    share is written first.

    Of a folder with more text than `data.answer_tokens`, the first parts that have so many. With
    several processes the result holds what the others have written so far. made_for: the target's
    source and hashes; text written for another target is refused.
    """
    folder = Path(config.folder)
    claim(config, made_for, share)
    parts = read_parts(folder)
    if not is_complete(config, parts):
        if filled_by(folder) != share.count:
            raise UserError(
                f"{folder}: its text is divided among {filled_by(folder)} processes and not "
                f"complete, {share.count} work now; finish it with python -m "
                f"beagle_jax.prepare and {filled_by(folder)} processes, or delete it"
            )
        if not _share_complete(config, parts, share):
            _write_share(config, folder, parts, tokenizer, eos_ids, write, share)
            parts = read_parts(folder)
    if not parts and share.count == 1:
        raise UserError(f"data.source: {config.source!r} gave no row to train on")
    return _asked_for(config, parts)


def _asked_for(config: DataConfig, parts: Mapping[int, list[Row]]) -> dict[int, list[Row]]:
    """Each process's parts up to its part of the budget: the text that a new folder would have, to
    the end of a part.
    """
    kept, have, processes = {}, Counter(), filled_by(config.folder)
    for number, rows in sorted(parts.items()):
        share = Share(number % processes, processes)
        if have[share.index] < _budget(config, share):
            kept[number] = rows
            have[share.index] += _answer_tokens(rows)
    return kept


def _mine(parts: Mapping[int, list[Row]], share: Share) -> list[list[Row]]:
    return [rows for number, rows in parts.items() if number % share.count == share.index]


def _budget(config: DataConfig, share: Share) -> int:
    return -(-config.answer_tokens // share.count)


def is_complete(config: DataConfig, parts: Mapping[int, list[Row]]) -> bool:
    """Every process has met its part of the budget, or the end of the source."""
    processes = filled_by(config.folder)
    return all(
        _share_complete(config, parts, Share(index, processes)) for index in range(processes)
    )


def _share_complete(config: DataConfig, parts: Mapping[int, list[Row]], share: Share) -> bool:
    written = sum(map(_answer_tokens, _mine(parts, share)))
    return written >= _budget(config, share) or exhausted_path(config.folder, share.index).exists()


def source_chats(config: DataConfig) -> Iterable[Chat]:
    """The chats of `data.source`, whatever it is but the target itself. Raises UserError for one
    that cannot be read.
    """
    if config.source.startswith("hf:"):
        return hub_chats(config.source.removeprefix("hf:"), config.split, config.streaming)
    return read_chats(config.source)


def check_source(config: DataConfig) -> None:
    """Raises UserError for a text that is neither there nor written already: asked before a target
    is loaded for it, which takes long.
    """
    if (
        config.source != "self"
        and not config.source.startswith("hf:")
        and not is_claimed(config.folder)
    ):
        local_source(config.source)


def source_rows(
    config: DataConfig,
    chats: Iterable[Chat],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
) -> Iterator[Row]:
    """One row of each chat that can teach something; a row without supervised tokens waits for the
    target's answer.

    Says what it leaves out: prompts that are too long, and chats without an answer before the cut.
    """
    prompts = too_long = given = unanswered = 0
    for chat in chats:
        if chat.waits_for_answer or config.answers == "regenerate":
            prompts += 1
            messages = chat.messages if config.answers == "keep" else chat.question
            tokens = prompt_tokens(tokenizer, messages, chat.where)
            if len(tokens) <= config.max_prompt_tokens:
                yield Row(tokens, [False] * len(tokens))
            else:
                too_long += 1
        else:
            given += 1
            row = chat_row(tokenizer, chat, eos_ids)
            row = Row(
                row.tokens[: config.max_chat_tokens], row.supervised[: config.max_chat_tokens]
            )
            if any(row.supervised[:-1]):  # the last position predicts nothing
                yield row
            else:
                unanswered += 1
    if too_long:
        tqdm.write(
            f"left out {too_long} of {prompts} prompts longer than {config.max_prompt_tokens} "
            "tokens"
        )
    if unanswered:
        tqdm.write(
            f"left out {unanswered} of {given} chats without an answer in their first "
            f"{config.max_chat_tokens} tokens"
        )
    if prompts and too_long == prompts and not given:
        raise UserError(
            f"data.max_prompt_tokens is {config.max_prompt_tokens}, but every prompt is "
            "longer; raise it"
        )
    if given and unanswered == given and not prompts:
        raise UserError(
            f"data.max_chat_tokens is {config.max_chat_tokens}, but every answer begins later; "
            "raise it"
        )


def _self_written_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    write: Writer,
    mine: Sequence[Sequence[Row]],
    share: Share,
    missing: Callable[[], int],
) -> Iterator[list[Row]]:
    """Our own prompts first, then group after group that the target makes up after its user header;
    none twice.

    missing: how many answer tokens are still to be written. A group is as large as they need, at
    half-length answers: few large ones keep the writer's rows busy.
    """
    chats = own_prompts("train")
    random.Random(config.seed).shuffle(chats)
    own = [prompt_tokens(tokenizer, chat.messages) for chat in chats[share.index :: share.count]]
    answered = {_prompt(row) for rows in mine for row in rows}
    known = answered | set(map(tuple, own))
    if fresh := [prompt for prompt in own if tuple(prompt) not in answered]:
        yield _short_enough(fresh, config.max_prompt_tokens)
    header = user_header(tokenizer)
    # A part holds prompts of one round at most, so no run draws with the seed of an earlier one.
    for round_number in range(max(len(mine), 1), 1_000_000):
        wanted = min(max(2 * missing() // config.max_answer_tokens, _MADE_UP_AT_LEAST), PART_ROWS)
        with tqdm(desc="making up prompts", unit="tok", leave=False) as bar:
            made = write(
                [header] * wanted,
                max_new=_MADE_UP_TOKENS,
                temperature=_MADE_UP_TEMPERATURE,
                seed=config.seed * 1_000_003 + round_number * share.count + share.index,
                on_tokens=bar.update,
            )
            texts = [
                tokenizer.decode(one.tokens[:-1]).strip()
                for one in made
                if one.tokens[-1] in eos_ids
            ]
        whole = sorted({text for text in texts if len(text.split()) >= _MADE_UP_WORDS})
        prompts = [prompt_tokens(tokenizer, [{"role": "user", "content": text}]) for text in whole]
        fresh = [prompt for prompt in prompts if tuple(prompt) not in known]
        if not fresh:
            raise UserError(
                "data.source: self: the target made up no usable prompt; give prompts with "
                "data.source: file.jsonl"
            )
        known.update(map(tuple, fresh))
        yield _short_enough(fresh, config.max_prompt_tokens)


def expected_tokens(config: DataConfig, answer_tokens: int) -> int:
    """Tokens of the text in which the target writes so many, from above: prompts at their limit,
    half-length answers.
    """
    return round(answer_tokens * (1 + 2 * config.max_prompt_tokens / config.max_answer_tokens))


def _short_enough(prompts: list[list[int]], limit: int) -> list[Row]:
    kept = [Row(prompt, [False] * len(prompt)) for prompt in prompts if len(prompt) <= limit]
    if len(kept) < len(prompts):
        tqdm.write(
            f"left out {len(prompts) - len(kept)} of {len(prompts)} prompts longer than "
            f"{limit} tokens"
        )
    if not kept:
        raise UserError(f"data.max_prompt_tokens is {limit}, but every prompt is longer; raise it")
    return kept


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
    """Writes part after part of this process until its budget is met or the source has no more."""
    mine = _mine(parts, share)
    budget, have = _budget(config, share), sum(map(_answer_tokens, mine))
    if config.source == "self":
        groups = _self_written_prompts(
            config, tokenizer, eos_ids, write, mine, share, lambda: budget - have
        )
    else:
        chats = islice(source_chats(config), share.index, None, share.count)
        rows = source_rows(config, chats, tokenizer, eos_ids)
        groups = _in_groups(islice(rows, sum(map(len, mine)), None))
    part, waiting = share.index + share.count * len(mine), []
    with tqdm(total=budget, initial=have, desc="training text", unit="tok", smoothing=0.05) as bar:
        while have < budget:
            waiting = waiting or next(groups, [])
            if not waiting:
                exhausted_path(folder, share.index).touch()
                return
            count = _enough(config, waiting, budget - have)
            group, waiting = waiting[:count], waiting[count:]
            rows = _write_group(config, folder, part, group, write, bar)
            part, have = part + share.count, have + _answer_tokens(rows)
        # the last answers go a little beyond the budget, and tqdm would show that as a share of
        # nothing
        bar.total = bar.n
    if config.source != "self":
        tqdm.write(
            f"data.answer_tokens = {config.answer_tokens:,} is reached; the rest of "
            f"{config.source} is not used"
        )


def _enough(config: DataConfig, rows: Sequence[Row], tokens: int) -> int:
    """How many of the rows make a part: what so many answer tokens may need, at half-length answers
    where there is none yet.
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
    """Answers the rows that wait for it and writes the part. States that came with every row are
    kept.
    """
    given = [row for row in group if any(row.supervised)]
    prompts = [row.tokens for row in group if not any(row.supervised)]
    bar.update(_answer_tokens(given))
    written: list[Answer] = []
    if prompts:
        settings = dict(
            max_new=config.max_answer_tokens,
            temperature=config.temperature,
            seed=config.seed + part,
        )
        written = list(write(prompts, **settings, on_tokens=bar.update))
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


def _prompt(row: Row) -> tuple[int, ...]:
    return tuple(row.tokens[: row.supervised.index(True)])


def _answer_tokens(rows: Sequence[Row]) -> int:
    return sum(sum(row.supervised) for row in rows)

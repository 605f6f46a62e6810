"""The training text: chats as given, or prompts that the target answers; kept on disk so that a second run skips it.

`data.folder` holds `settings.json` (what made the text), `part-0000.jsonl`, .. (one line per row: prompt and answer
tokens) and the target's states of each part (data/states.py). A part appears whole or not at all, so an interrupted
run goes on after its last part. How answers are sampled is the caller's: `write` is passed in (see decoding/batch.py).
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.data.chats import own_prompts, read_chats
from beagle_jax.data.states import keep_states
from beagle_jax.data.template import Row, chat_row, prompt_tokens, user_header
from beagle_jax.errors import UserError
from beagle_jax.files import write_text

PART_PROMPTS = 1024  # prompts answered between two files
# Prompts that the target makes up: sampled hot for variety, kept only if it ended them itself.
_MADE_UP_TEMPERATURE = 1.0
_MADE_UP_TOKENS = 48
_MADE_UP_WORDS = 3  # shorter ones are noise
_MADE_UP_BATCH = 256  # asked for at once


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
    config: DataConfig, source_name: str, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], write: Writer
) -> list[list[Row]]:
    """Rows to train on, part by part: read from `data.folder` if it is complete, else written there first.

    source_name: the target's source; text written by another target is refused.
    """
    folder = Path(config.folder)
    _claim(folder, config, source_name)
    parts = [_read_part(path) for path in sorted(folder.glob("part-*.jsonl"))]
    if sum(map(_answer_tokens, parts)) >= config.answer_tokens or (folder / "all").exists():
        return parts
    if config.source == "self":
        answered = {_prompt(row) for part in parts for row in part}
        groups = _self_written_prompts(config, tokenizer, eos_ids, write, answered, len(parts))
    else:
        chats = read_chats(config.source)
        finished = [chat_row(tokenizer, chat, eos_ids) for chat in chats if not chat.waits_for_answer]
        if finished and not parts:
            _write_part(folder, 0, finished)
            parts = [finished]
        waiting = [prompt_tokens(tokenizer, chat.messages, chat.where) for chat in chats if chat.waits_for_answer]
        # One row for each that was answered, in this order.
        groups = _in_parts(_short_enough(waiting, config.max_prompt_tokens), sum(map(len, parts)) - len(finished))
    parts += _answer(config, groups, folder, len(parts), sum(map(_answer_tokens, parts)), write)
    if not parts:
        raise UserError(f"data.source: {config.source!r} gave no row to train on")
    if sum(map(_answer_tokens, parts)) < config.answer_tokens:
        (folder / "all").touch()  # the source has no more
    return parts


def _claim(folder: Path, config: DataConfig, source_name: str) -> None:
    """Makes the folder ours, or refuses one that other settings filled."""
    settings = json.loads(json.dumps({"target": source_name, **asdict(config)}))
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=1))
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    free = ("folder", "batch", "answer_tokens")  # a larger budget adds to what is there
    different = [key for key in settings if found.get(key) != settings[key] and key not in free]
    if different:
        listed = ", ".join(f"{key} {found.get(key)!r} there, {settings[key]!r} now" for key in different)
        raise UserError(f"{folder} holds text written with other settings ({listed}); delete it or set another data.folder")


def _self_written_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    write: Writer,
    answered: set[tuple[int, ...]],
    parts_done: int,
) -> Iterator[list[list[int]]]:
    """Our own prompts first, then group after group that the target makes up after its user header; none twice."""
    chats = own_prompts("train")
    random.Random(config.seed).shuffle(chats)
    own = _short_enough([prompt_tokens(tokenizer, chat.messages) for chat in chats], config.max_prompt_tokens)
    known = answered | set(map(tuple, own))
    if fresh := [prompt for prompt in own if tuple(prompt) not in answered]:
        yield fresh
    header = user_header(tokenizer)
    for round_number in range(max(parts_done, 1), 1_000_000):
        with tqdm(desc="making up prompts", unit="tok", leave=False) as bar:
            made = write(
                [header] * _MADE_UP_BATCH,
                max_new=_MADE_UP_TOKENS,
                temperature=_MADE_UP_TEMPERATURE,
                seed=config.seed * 1_000_003 + round_number,
                on_tokens=bar.update,
            )
            texts = [tokenizer.decode(one.tokens[:-1]).strip() for one in made if one.tokens[-1] in eos_ids]
        whole = sorted({text for text in texts if len(text.split()) >= _MADE_UP_WORDS})
        prompts = [prompt_tokens(tokenizer, [{"role": "user", "content": text}]) for text in whole]
        fresh = [prompt for prompt in prompts if tuple(prompt) not in known]
        if not fresh:
            raise UserError("data.source: self: the target made up no usable prompt; give prompts with data.source: file.jsonl")
        known.update(map(tuple, fresh))
        yield _short_enough(fresh, config.max_prompt_tokens)


def _short_enough(prompts: list[list[int]], limit: int) -> list[list[int]]:
    kept = [prompt for prompt in prompts if len(prompt) <= limit]
    if len(kept) < len(prompts):
        tqdm.write(f"left out {len(prompts) - len(kept)} of {len(prompts)} prompts longer than {limit} tokens")
    if prompts and not kept:
        raise UserError(f"data.max_prompt_tokens is {limit}, but every prompt is longer; raise it")
    return kept


def _in_parts(prompts: list[list[int]], answered: int) -> Iterator[list[list[int]]]:
    for start in range(answered, len(prompts), PART_PROMPTS):
        yield prompts[start : start + PART_PROMPTS]


def _answer(
    config: DataConfig, groups: Iterator[list[list[int]]], folder: Path, part: int, have: int, write: Writer
) -> list[list[Row]]:
    """Answers group after group until the token budget is met; each group becomes one part."""
    parts: list[list[Row]] = []
    with tqdm(total=config.answer_tokens, initial=have, desc="writing answers", unit="tok", smoothing=0.05) as bar:
        while have < config.answer_tokens and (prompts := next(groups, None)) is not None:
            # The last group only as large as the budget may need, at half-length answers.
            needed = -(-2 * (config.answer_tokens - have) // config.max_answer_tokens)
            prompts = prompts[:needed]
            settings = dict(max_new=config.max_answer_tokens, temperature=config.temperature, seed=config.seed + part)
            written = list(write(prompts, **settings, on_tokens=bar.update))
            rows = [_row(prompts[answer.index], answer.tokens) for answer in written]
            keep_states(states_path(folder, part), rows, [answer.states_LD for answer in written])
            _write_part(folder, part, rows)
            part, have, parts = part + 1, have + _answer_tokens(rows), [*parts, rows]
    return parts


def states_path(folder: str | Path, part: int) -> Path:
    """Where the states of a part lie."""
    return Path(folder) / f"part-{part:04d}.states"


def _row(prompt: list[int], answer: list[int]) -> Row:
    return Row(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def _prompt(row: Row) -> tuple[int, ...]:
    return tuple(row.tokens[: row.supervised.index(True)])


def _answer_tokens(rows: Sequence[Row]) -> int:
    return sum(sum(row.supervised) for row in rows)


def _write_part(folder: Path, part: int, rows: Sequence[Row]) -> None:
    lines = (json.dumps({"tokens": row.tokens, "supervised": [int(flag) for flag in row.supervised]}) for row in rows)
    write_text(folder / f"part-{part:04d}.jsonl", "\n".join(lines) + "\n")


def _read_part(path: Path) -> list[Row]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Row(record["tokens"], [bool(flag) for flag in record["supervised"]]) for record in records]

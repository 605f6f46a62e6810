"""`data.source: self`: the package's own prompts, then prompts that the target generates."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.corpus.waves import WAVE_PARTS, part_rows
from beagle_jax.corpus.writer import Writer
from beagle_jax.data.chats import own_prompts
from beagle_jax.data.folder import old_parts, prompt_rounds, prompts_path
from beagle_jax.data.rows_file import Header, open_rows, write_rows
from beagle_jax.data.share import Share, wait_for_all
from beagle_jax.data.source import Lengths
from beagle_jax.data.template import Row, decoded, prompt_tokens, user_header
from beagle_jax.errors import UserError

_log = logging.getLogger(__name__)

# Generated prompts: sampled at high temperature for variety, kept only if they end in a stop token.
_MADE_UP_TEMPERATURE = 1.0
_MADE_UP_TOKENS = 48
_MADE_UP_WORDS = 3  # shorter ones are noise
_MADE_UP_AT_LEAST = 64  # prompts per call: of very few, none may be usable


class SelfWritten:
    """The prompts of a folder in a fixed order: the package's own, then the target's; none twice.

    The target generates prompts in rounds by continuing its user header. Each round is a file of
    the folder, so that all processes and a resumed run read the same prompts.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        write: Writer,
        share: Share,
        header: Header,
    ):
        """Raises UserError if `data.max_prompt_tokens` is less than each own prompt has."""
        self._config, self._tokenizer, self._eos_ids = config, tokenizer, eos_ids
        self._write, self._share, self._header = write, share, header
        chats = own_prompts("train")
        random.Random(config.seed).shuffle(chats)
        own = [prompt_tokens(tokenizer, chat.messages) for chat in chats]
        self._own = _fitting(config, own)

    def items(self, parts: Mapping[int, Sequence[Row]]) -> list[Row]:
        """Returns the prompts that no row of these parts answers."""
        known = {_prompt(row) for rows in parts.values() for row in rows if any(row.supervised)}
        fresh = []
        for row in self._all():
            if tuple(row.tokens) not in known:
                known.add(tuple(row.tokens))
                fresh.append(row)
        return fresh

    def grow(self, parts: Mapping[int, Sequence[Row]], wanted: int) -> list[Row]:
        """Lets the target generate about `wanted` prompts; returns those that are new.

        Few large rounds keep the writer's batch full.

        Raises:
            UserError: none is usable.
        """
        wanted = max(wanted, _MADE_UP_AT_LEAST)
        rows = part_rows(wanted)
        rounds = min(-(-wanted // rows), WAVE_PARTS)
        # Version 0.1.0 kept no files of its rounds, at most one for each part but the first.
        first = max([0, *prompt_rounds(self._config.folder), *old_parts(self._config.folder)])
        for number in range(first + 1, first + 1 + rounds):
            if not self._share.together or number % self._share.count == self._share.index:
                self._make(number, rows)
        wait_for_all("prompts are made up")
        fresh = self.items(parts)
        if not fresh:
            raise UserError(
                "data.source: self: the target wrote no usable prompt; give prompts with "
                "data.source: file.jsonl"
            )
        return fresh

    def _all(self) -> Iterator[Row]:
        limit = self._config.max_prompt_tokens
        yield from self._own
        for number in prompt_rounds(self._config.folder):
            rows = open_rows(prompts_path(self._config.folder, number))
            yield from (row for row in rows if len(row.tokens) <= limit)

    def _make(self, number: int, count: int) -> None:
        """Writes one round of prompts."""
        header = user_header(self._tokenizer)
        with tqdm(desc="writing prompts", unit="tok", leave=False) as bar:
            made = self._write(
                [header] * count,
                max_new=_MADE_UP_TOKENS,
                temperature=_MADE_UP_TEMPERATURE,
                seed=self._config.seed * 1_000_003 + number,
                on_tokens=bar.update,
            )
            texts = [
                decoded(self._tokenizer, answer.tokens[:-1]).strip()
                for answer in made
                if answer.tokens[-1] in self._eos_ids
            ]
        usable = sorted({text for text in texts if len(text.split()) >= _MADE_UP_WORDS})
        prompts = [
            prompt_tokens(self._tokenizer, [{"role": "user", "content": text}]) for text in usable
        ]
        rows = [Row(prompt, [False] * len(prompt)) for prompt in prompts]
        write_rows(prompts_path(self._config.folder, number), rows, self._header)
        long = sum(len(prompt) > self._config.max_prompt_tokens for prompt in prompts)
        if long:
            _log.info(
                f"left out {long} of {len(prompts)} prompts longer than "
                f"{self._config.max_prompt_tokens} tokens"
            )


def _fitting(config: DataConfig, prompts: list[list[int]]) -> list[Row]:
    lengths = Lengths(config)
    rows = list(lengths.fitting(Row(prompt, [False] * len(prompt)) for prompt in prompts))
    lengths.tell()
    return rows


def _prompt(row: Row) -> tuple[int, ...]:
    return tuple(row.tokens[: row.supervised.index(True)])

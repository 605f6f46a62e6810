"""The training text of `data.folder`: reads it, or writes what is missing of it.

Each item of the source, a chat or a prompt, becomes rows in the source's order. Processes write
different parts of the same plan (corpus/waves.py). data/folder.py describes the files.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.corpus.answers import Answerer, answerer_of
from beagle_jax.corpus.prompts import SelfWritten
from beagle_jax.corpus.waves import answer_length, follow, plan
from beagle_jax.corpus.writer import Writer
from beagle_jax.data.behind import Behind
from beagle_jax.data.folder import (
    answer_tokens_of,
    check_gaps,
    claim,
    exhausted_path,
    items_before,
    missing_parts,
    read_parts,
    read_waves,
    states_path,
    write_part,
    write_wave,
)
from beagle_jax.data.rows_file import Header
from beagle_jax.data.share import ALONE, Share, wait_for_all
from beagle_jax.data.source import SERVER, pinned, source_chats, source_rows
from beagle_jax.data.states import keep_states
from beagle_jax.data.template import Row, supervised_tokens
from beagle_jax.data.vocabulary import check_ids
from beagle_jax.errors import UserError
from beagle_jax.files import write_text

_log = logging.getLogger(__name__)


def training_rows(
    config: DataConfig,
    made_for: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    write: Writer,
    share: Share = ALONE,
    vocab_size: int | None = None,
    *,
    keeps_states: bool = True,
) -> dict[int, list[Row]]:
    """Returns the rows to train on, by part.

    Reads `data.folder` if it is complete, otherwise first writes this process's parts. If the
    folder has more text than `data.answer_tokens`, only the first parts with that many answer
    tokens are used. The result is the same for any number of processes; of shares that do not run
    together (`prepare --part`), it has what the others have written so far.

    made_for: the target's source and hashes. vocab_size: rows of the target's embedding; None if
    ids need no check. keeps_states: with `data.states: disk`, store the states that the target
    computes while it writes; False if the draft reads other streams.

    Raises: UserError if the text was written for another target or from another content of the
    source, if the source yields no row, or if a token has no embedding.
    """
    sources = claim(config, made_for, share)
    header = Header({key: str(value) for key, value in made_for.items()}, sources)
    keeps = keeps_states and config.states == "disk"
    text = _Text(config, header, tokenizer, eos_ids, write, share, vocab_size, keeps)
    text.fill()
    missing = missing_parts(config.folder, text.parts)
    parts = text.parts if missing else within_budget(config, text.parts)
    if not missing and not any(parts.values()):
        raise UserError(f"data.source: {config.source!r} gave no row to train on")
    for number, rows in parts.items():
        check_ids(rows, vocab_size, f"{config.folder}, part {number}")
    return parts


def within_budget(config: DataConfig, parts: Mapping[int, list[Row]]) -> dict[int, list[Row]]:
    """Selects the first parts that have `data.answer_tokens` answer tokens together."""
    selected: dict[int, list[Row]] = {}
    have = 0
    for number in range(len(parts)):
        if number not in parts or have >= config.answer_tokens:
            break
        selected[number] = parts[number]
        have += supervised_tokens(parts[number])
    return selected


def is_complete(config: DataConfig, parts: Mapping[int, list[Row]]) -> bool:
    """Whether the text has `data.answer_tokens` answer tokens, or all that the source gives."""
    have = sum(map(supervised_tokens, within_budget(config, parts).values()))
    ended = exhausted_path(config.folder).exists() and not missing_parts(config.folder, parts)
    return have >= config.answer_tokens or ended


def expected_tokens(config: DataConfig, answer_tokens: int) -> int:
    """Upper estimate of the tokens of a text with this many answer tokens.

    Assumes prompts at their limit and half-length answers.
    """
    return round(answer_tokens * (1 + 2 * config.max_prompt_tokens / config.max_answer_tokens))


class _Text:
    """The text of a claimed folder, and what this process writes of it."""

    def __init__(
        self,
        config: DataConfig,
        header: Header,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        write: Writer,
        share: Share,
        vocab_size: int | None,
        keeps_states: bool,
    ):
        self._config, self._header, self._share = config, header, share
        self._tokenizer, self._eos_ids, self._write = tokenizer, eos_ids, write
        self._vocab_size, self._keeps_states = vocab_size, keeps_states
        self._own_prompts: SelfWritten | None = None
        self._items: Iterator[Row] = iter(())
        self._place = -1  # number of the next item of `_items`; -1: not opened
        self._answerer: Answerer | None = None
        self.parts: dict[int, list[Row]] = {}

    def fill(self) -> None:
        """Writes this process's parts until the text is complete.

        Shares that do not run together stop earlier, at a wave that others have to finish.
        """
        folder, writes = self._config.folder, False
        while True:
            self.parts = read_parts(folder)
            check_gaps(folder, self.parts)
            complete = is_complete(self._config, self.parts)
            wait_for_all("the text is read")  # nobody plans while another process still reads
            if complete:
                break
            missing = missing_parts(folder, self.parts)
            if missing and not self._share.together and not any(map(self._is_own, missing)):
                _log.info(
                    f"{folder}: {len(missing)} parts are left to the other shares; run these, and "
                    "then this one again"
                )
                break
            if not writes:
                self._announce()
            writes = True
            self._write_parts(self._next_wave(missing))
            wait_for_all("a wave of text is written")
        if writes and complete:
            self._tell_rest()

    def _tell_rest(self) -> None:
        config = self._config
        if config.source != "self" and not exhausted_path(config.folder).exists():
            _log.info(
                f"data.answer_tokens = {config.answer_tokens:,} is reached; the rest of "
                f"{config.source} is not used"
            )

    def _announce(self) -> None:
        """Reports a budget that was raised since the folder was begun."""
        before, now = answer_tokens_of(self._config.folder), self._config.answer_tokens
        if self.parts and before is not None and now > before:
            rows = sum(map(len, self.parts.values()))
            _log.info(
                f"{self._config.folder} was begun with data.answer_tokens = {before:,}, it is "
                f"{now:,} now; new rows follow the {rows:,} that are there"
            )

    def _is_own(self, part: int) -> bool:
        return part % self._share.count == self._share.index

    def _next_wave(self, missing: Sequence[int]) -> dict[int, list[Row]]:
        """Returns the items of this process's parts in the next wave, by part number.

        missing: parts of an interrupted wave, which is then finished first.
        """
        folder, waves = self._config.folder, read_waves(self._config.folder)
        if missing:
            wave = next(wave for wave in waves if wave.first <= missing[0] < wave.end)
            own = follow(self._items_from(wave.first), wave, self._is_own)
            self._place += sum(wave.items)
            return {part: group for part, group in own.items() if part in missing}
        first = len(self.parts)
        wanted = self._config.answer_tokens - sum(map(supervised_tokens, self.parts.values()))
        length = answer_length(self._config, self.parts)
        items = self._items_from(first, round(wanted / length))
        # Every process computes the same plan.
        by_server = self._config.source.startswith(SERVER)
        planned = plan(items, first, wanted, length, self._is_own, by_server)
        self._place += sum(planned.wave.items)
        wait_for_all("the text is planned")
        if self._share.index == 0 or not self._share.together:
            if planned.wave.items:
                write_wave(folder, len(waves), planned.wave, self._share)
            if planned.ended and self._config.source != "self":
                write_text(exhausted_path(folder), "", f"-of-{self._share.index}")
        return planned.own

    def _items_from(self, part: int, wanted: int = 0) -> Iterator[Row]:
        """Yields the items of the source from the first one of a part.

        wanted: prompts to generate if `data.source: self` has none left.
        """
        config = self._config
        if config.source == "self":
            parts = {number: rows for number, rows in self.parts.items() if number < part}
            if self._own_prompts is None:
                self._own_prompts = SelfWritten(
                    config,
                    self._tokenizer,
                    self._eos_ids,
                    self._write,
                    self._share,
                    self._header,
                )
            fresh = self._own_prompts.items(parts) or self._own_prompts.grow(parts, wanted)
            check_ids(fresh, self._vocab_size, "data.source: self", self._tokenizer)
            return iter(fresh)
        start = items_before(config.folder, part)
        if self._place < 0 or self._place > start:
            self._items, self._place = self._rows(), 0
        self._items = islice(self._items, start - self._place, None)
        self._place = start
        return self._items

    def _rows(self) -> Iterator[Row]:
        """Yields the rows of the source from its beginning."""
        config = pinned(self._config)
        return source_rows(
            config,
            source_chats(config),
            self._tokenizer,
            self._eos_ids,
            self._vocab_size,
            self._header.made_for,
        )

    def _write_parts(self, own: Mapping[int, list[Row]]) -> None:
        config = self._config
        if self._answerer is None:
            self._answerer = answerer_of(config, self._tokenizer, self._eos_ids, self._write)
        with (
            Behind(limit=0) as behind,  # one part is written while the next one is answered
            tqdm(
                total=config.answer_tokens,
                initial=sum(map(supervised_tokens, self.parts.values())),
                desc="training text",
                unit="tok",
                smoothing=0.05,
            ) as bar,
        ):
            for part, group in own.items():
                rows, states = self._answerer.answered(group, config.seed + part, bar.update)
                behind.run(partial(self._store, part, len(group), rows, states))
            # The last answers slightly exceed the budget; tqdm would then drop the total.
            bar.total = max(bar.n, bar.total)

    def _store(
        self, part: int, items: int, rows: list[Row], states: list[np.ndarray] | None
    ) -> None:
        """Writes a part. items: of the source that became its rows."""
        config = self._config
        if states and self._keeps_states:
            keep_states(states_path(config.folder, part), rows, states, config.states_dtype)
        write_part(
            config.folder, part, rows, Header(self._header.made_for, self._header.sources, items)
        )

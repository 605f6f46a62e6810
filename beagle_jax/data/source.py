"""`data.source` as rows of tokens: chats with answers, and prompts without an answer."""

import logging
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.data.chats import BadRecord, Chat, LeftOut, local_source, read_chats
from beagle_jax.data.folder import is_claimed
from beagle_jax.data.hub import hub_chats
from beagle_jax.data.template import (
    Row,
    TemplateRefusal,
    chat_rows,
    prompt_tokens,
    template_reads,
)
from beagle_jax.errors import UserError

_log = logging.getLogger(__name__)


def source_chats(config: DataConfig) -> Iterable[Chat]:
    """Returns the chats of `data.source`, which must not be `self`.

    Raises:
        UserError: the source cannot be read.
    """
    if config.source.startswith("hf:"):
        return hub_chats(
            config.source.removeprefix("hf:"), config.split, config.streaming, config.max_bad_share
        )
    return read_chats(config.source, config.max_bad_share)


def check_source(config: DataConfig) -> None:
    """Checks that the text of `data.source` exists, or has been written to `data.folder`.

    Call it before the target is loaded, which takes long.

    Raises:
        UserError: the source does not exist.
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
    """Yields the training rows of chats, in order.

    The target answers the rows that have no supervised tokens. Reports skipped chats, and message
    fields that the chat template does not read.

    Raises:
        UserError: more than `data.max_bad_share` of the chats were skipped, or all of them are too
            long.
    """
    left_out = LeftOut(config.source, config.max_bad_share, _log.info)
    unread = _Unread(tokenizer)
    length = Lengths(config)
    try:
        for chat in chats:
            left_out.seen += 1
            unread.look(chat)
            try:
                rows = _rows_of(config, chat, tokenizer, eos_ids)
            except BadRecord as error:
                left_out.add(str(error), chat.where)
            except TemplateRefusal as error:
                left_out.add(error.reason, chat.where)
            else:
                yield from length.fitting(rows)
        left_out.check()
    finally:
        left_out.tell()
    length.tell()


def _rows_of(
    config: DataConfig, chat: Chat, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]
) -> list[Row]:
    """Returns the rows of one chat, whatever their length."""
    if not chat.waits_for_answer and config.answers == "keep":
        return chat_rows(tokenizer, chat, eos_ids)
    messages = chat.messages if config.answers == "keep" else chat.question
    tokens = prompt_tokens(tokenizer, messages, chat.where, chat.variables)
    return [Row(tokens, [False] * len(tokens))]


class _Unread:
    """Reports, once, each field of messages that the chat template does not read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._reads = template_reads(tokenizer) | {"role", "content"}
        self._named: set[str] = set()

    def look(self, chat: Chat) -> None:
        fields = {*chat.variables, *(field for message in chat.messages for field in message)}
        if new := fields - self._reads - self._named:
            self._named |= new
            _log.info(
                f"{chat.where}: the target's chat template does not use {', '.join(sorted(new))}; "
                "the training text does not contain it"
            )


class Lengths:
    """Skips prompts that are too long, truncates chats, and counts both."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._prompts = self._too_long = self._given = self._unanswered = 0

    def fitting(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yields prompts that are short enough, and chats cut at `data.max_chat_tokens`."""
        limit = self._config.max_chat_tokens
        for row in rows:
            if not any(row.supervised):
                self._prompts += 1
                if len(row.tokens) <= self._config.max_prompt_tokens:
                    yield row
                else:
                    self._too_long += 1
                continue
            self._given += 1
            row = Row(row.tokens[:limit], row.supervised[:limit])
            if any(row.supervised[:-1]):  # the last position predicts nothing
                yield row
            else:
                self._unanswered += 1

    def tell(self) -> None:
        """Reports what was skipped. Raises UserError if that was everything."""
        longest, cut = self._config.max_prompt_tokens, self._config.max_chat_tokens
        if self._too_long:
            _log.info(
                f"left out {self._too_long} of {self._prompts} prompts longer than {longest} tokens"
            )
        if self._unanswered:
            _log.info(
                f"left out {self._unanswered} of {self._given} chats without an answer in their "
                f"first {cut} tokens"
            )
        if self._prompts and self._too_long == self._prompts and not self._given:
            raise UserError(
                f"data.max_prompt_tokens is {longest}, but every prompt is longer; raise it"
            )
        if self._given and self._unanswered == self._given and not self._prompts:
            raise UserError(
                f"data.max_chat_tokens is {cut}, but every answer begins later; raise it"
            )

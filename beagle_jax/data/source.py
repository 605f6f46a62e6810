"""`data.source` as rows of tokens: chats with answers, and prompts without an answer."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.data.chats import (
    BadRecord,
    Chat,
    LeftOut,
    local_source,
    own_prompts,
    read_chats,
)
from beagle_jax.data.folder import is_claimed, source_revision
from beagle_jax.data.hub import hub_chats
from beagle_jax.data.rows_source import rows_files, stored_rows
from beagle_jax.data.template import (
    Row,
    TemplateRefusal,
    chat_rows,
    prompt_tokens,
    template_reads,
)
from beagle_jax.data.vocabulary import check_ids
from beagle_jax.errors import UserError

_log = logging.getLogger(__name__)

SERVER = "openai:"


def pinned(config: DataConfig) -> DataConfig:
    """Returns the config with the commit of the dataset that `data.folder` holds text of."""
    key = "prompts" if config.source.startswith(SERVER) else "source"
    name = getattr(config, key) or ""
    if not name.startswith("hf:") or "@" in name:
        return config
    revision = source_revision(config.folder)
    return config.changed(**{key: f"{name}@{revision}"}) if revision else config


def server_of(source: str) -> tuple[str, str]:
    """Returns URL and model of an `openai:` source.

    Raises:
        UserError: one of them is missing.
    """
    url, _, model = source.removeprefix(SERVER).partition("#")
    if not url.startswith(("http://", "https://")) or not model:
        raise UserError(
            f"data.source: {source!r} is not openai:URL#MODEL; expected, for example, "
            "openai:http://127.0.0.1:8000/v1#org/name"
        )
    return url, model


def _prompts_of(config: DataConfig) -> DataConfig | None:
    """Returns a config whose source is the prompts of a server; None: the package's own."""
    if config.prompts is None:
        return None
    return config.changed(source=config.prompts, prompts=None)


def source_chats(config: DataConfig) -> Iterable[Chat]:
    """Returns the chats of `data.source`, which must not be `self`; token rows have none.

    Raises:
        UserError: the source cannot be read.
    """
    if rows_files(config.source):
        return ()
    if config.source.startswith(SERVER):
        prompts = _prompts_of(config)
        return own_prompts("train") if prompts is None else source_chats(prompts)
    if config.source.startswith("hf:"):
        return hub_chats(
            config.source.removeprefix("hf:"),
            config.split,
            config.streaming,
            config.max_bad_share,
            config.unread,
        )
    return read_chats(config.source, config.max_bad_share, config.unread)


def check_source(config: DataConfig) -> None:
    """Checks that the text of `data.source` exists, or has been written to `data.folder`.

    Call it before the target is loaded, which takes long.

    Raises:
        UserError: the source does not exist.
    """
    if is_claimed(config.folder) or config.source == "self":
        return
    if config.source.startswith(SERVER):
        server_of(config.source)
        prompts = _prompts_of(config)
        if prompts is not None and rows_files(prompts.source):
            raise UserError(
                f"data.prompts: {config.prompts} holds token rows, and a server answers chats; "
                "give a .jsonl file"
            )
        if prompts is not None:
            check_source(prompts)
    elif not config.source.startswith("hf:"):
        local_source(config.source)


def source_rows(
    config: DataConfig,
    chats: Iterable[Chat],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    vocab_size: int | None = None,
    made_for: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Yields the training rows of chats, or of a source of token rows, in order.

    The target answers the rows that have no supervised tokens. Reports skipped chats, and message
    fields that the chat template does not read.

    vocab_size: rows of the target's embedding; None: ids are not checked. made_for: the target's
    source and hashes, for token rows.

    Raises:
        UserError: more than `data.max_bad_share` of the chats were skipped, or all of them are too
            long, or a token has no embedding.
    """
    length = Lengths(config)
    if files := rows_files(config.source):
        for row, where in stored_rows(config, files, made_for or {}, tokenizer):
            check_ids([row], vocab_size, where, tokenizer)
            yield from length.fitting([row])
        length.tell()
        return
    left_out = LeftOut(config.source, config.max_bad_share, _log.info)
    unread = _Unread(tokenizer, config.unread)
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
                check_ids(rows, vocab_size, chat.where, tokenizer)
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
    if config.answers == "keep":  # the answers that are there are context of the next one
        chat = replace(chat, untrained=frozenset(range(len(chat.messages))))
    if not chat.contexts:
        raise BadRecord("no answer of the chat can be written anew")
    tokens = prompt_tokens(tokenizer, chat.contexts[0], chat.where, chat.variables)
    by_turns = len(chat.contexts) > 1 or config.source.startswith(SERVER)
    return [Row(tokens, [False] * len(tokens), chat if by_turns else None)]


class _Unread:
    """Reports, once, or refuses each field that the chat template does not read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, unread: str) -> None:
        self._reads = template_reads(tokenizer) | {"role", "content"}
        self._refuses = unread == "refuse"
        self._named: set[str] = set()

    def look(self, chat: Chat) -> None:
        fields = {*chat.variables, *(field for message in chat.messages for field in message)}
        if new := fields - self._reads - self._named:
            self._named |= new
            listed = ", ".join(sorted(new))
            if self._refuses:
                raise UserError(
                    f"{chat.where}: the target's chat template does not read {listed}; take it "
                    "out of the file, choose another target.chat_template, or set data.unread: "
                    "ignore"
                )
            _log.info(
                f"{chat.where}: the target's chat template does not use {listed}; the training "
                "text does not contain it"
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

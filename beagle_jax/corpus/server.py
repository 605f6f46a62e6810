"""An OpenAI-compatible server as the writer of answers (`data.source: openai:URL#MODEL`).

Only this module imports the `openai` client, and only when it is used. The key is that of the
environment variable OPENAI_API_KEY; servers of one's own need none.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.data.chats import BadRecord, Chat, LeftOut, Message
from beagle_jax.data.source import server_of
from beagle_jax.data.template import Row, TemplateRefusal, chat_rows, supervised_tokens
from beagle_jax.errors import UserError

_log = logging.getLogger(__name__)

_ROWS = 1009  # more than a part has, so that each chat has a seed of its own
_SEEDS = 2**31  # servers take seeds below it
_NO_KEY = "none"  # the client wants a key, and most servers read none


class ServerAnswers:
    """Asks the server for each answer of a chat in turn, `data.batch` chats at once."""

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]
    ):
        """Connects to nothing yet.

        Raises:
            UserError: the `openai` client is not installed, or the source has no URL or model.
        """
        self._config, self._tokenizer, self._eos_ids = config, tokenizer, eos_ids
        self._url, self._model = server_of(config.source)
        self._openai = client_library()
        key = os.environ.get("OPENAI_API_KEY", _NO_KEY)
        self._client = self._openai.OpenAI(base_url=self._url, api_key=key)

    def answered(
        self, items: Sequence[Row], seed: int, on_tokens: Callable[[int], object]
    ) -> tuple[list[Row], list[np.ndarray] | None]:
        """Returns the rows of the items, in order, and no states (see `Answerer`).

        An answer that teaches nothing is left out and counted.

        Raises:
            UserError: the server cannot be reached or refuses a request, or more than
                `data.max_bad_share` of the answers were left out.
        """
        left_out = LeftOut(self._config.source, self._config.max_bad_share, _log.info)

        def rows_of(number: int) -> list[Row] | str:
            row = items[number]
            if any(row.supervised):
                return [row]
            assert row.chat is not None
            try:
                return self._rows(*self._dialog(row.chat, (seed * _ROWS + number) % _SEEDS))
            except (BadRecord, TemplateRefusal) as error:
                return str(error)

        rows: list[Row] = []
        with ThreadPoolExecutor(self._config.batch, thread_name_prefix="answers") as pool:
            try:
                for row, made in zip(items, pool.map(rows_of, range(len(items))), strict=True):
                    left_out.seen += 1
                    if isinstance(made, str):
                        left_out.add(made, row.chat.where if row.chat else self._config.source)
                        continue
                    on_tokens(supervised_tokens(made))
                    rows += made
            finally:  # after an error, no more questions
                pool.shutdown(cancel_futures=True)
        left_out.check()
        left_out.tell()
        return rows, None

    def _dialog(self, chat: Chat, seed: int) -> tuple[Chat, bool]:
        """Asks for the answers of a chat; returns it with them, and whether the last was cut."""
        messages: list[Message] = []
        written: set[int] = set()
        was_cut = False
        for context in chat.contexts:
            messages += context
            answer, was_cut = self._ask(messages, chat.variables, seed)
            written.add(len(messages))
            messages.append(answer)
            if was_cut:
                break
        untrained = frozenset(range(len(messages))) - written
        return replace(chat, messages=tuple(messages), untrained=untrained), was_cut

    def _ask(self, messages: Sequence[Message], variables: Any, seed: int) -> tuple[Message, bool]:
        """Returns the server's answer, and whether it was cut at `data.max_answer_tokens`."""
        config = self._config
        more: dict[str, Any] = {key: value for key, value in variables.items() if key != "tools"}
        if config.temperature > 0:
            more["top_k"] = config.top_k  # of vLLM, SGLang and llama.cpp, not of OpenAI
        settings = {"tools": variables["tools"]} if "tools" in variables else {}
        try:
            reply = self._client.chat.completions.create(
                model=self._model,
                messages=list(messages),
                max_tokens=config.max_answer_tokens,
                temperature=config.temperature,
                seed=seed,
                extra_body=more or None,
                **settings,
            )
        except self._openai.OpenAIError as error:
            raise UserError(
                f"data.source: {self._url} gave no answer of {self._model} ({error}); the parts "
                "that are written are kept: run again to go on"
            ) from error
        if not reply.choices or reply.choices[0].message is None:
            raise BadRecord("the server's reply has no answer")
        choice = reply.choices[0]
        message: Message = {"role": "assistant", "content": choice.message.content or ""}
        thought = (choice.message.model_extra or {}).get("reasoning_content")
        if thought:
            message["reasoning_content"] = thought
        elif not message["content"].strip():
            raise BadRecord("the server's answer is empty")
        return message, choice.finish_reason == "length"

    def _rows(self, chat: Chat, was_cut: bool) -> list[Row]:
        limit = self._config.max_chat_tokens
        rows = chat_rows(self._tokenizer, chat, self._eos_ids)
        if was_cut:  # the template ends the answer, its writer did not
            rows[-1] = self._without_end(rows[-1])
        rows = [Row(row.tokens[:limit], row.supervised[:limit]) for row in rows]
        rows = [row for row in rows if any(row.supervised[:-1])]
        if not rows:
            raise BadRecord(f"no answer stands in the first {limit} tokens (data.max_chat_tokens)")
        return rows

    def _without_end(self, row: Row) -> Row:
        end = len(row.supervised) - row.supervised[::-1].index(True)
        end -= row.tokens[end - 1] in self._eos_ids
        return Row(row.tokens[:end], row.supervised[:end])


def client_library() -> Any:
    """Imports the `openai` client.

    Raises:
        UserError: it is not installed.
    """
    try:
        import openai
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.source: an openai: server needs the openai client ({error}); install it with "
            "pip install 'openai>=3,<4', or give a file"
        ) from error
    return openai

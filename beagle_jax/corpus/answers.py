"""Answers the items of a part: prompts and chats become rows of training text."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.corpus.server import ServerAnswers
from beagle_jax.corpus.writer import Writer
from beagle_jax.data.chats import Message
from beagle_jax.data.source import SERVER
from beagle_jax.data.template import Row, TemplateRefusal, prompt_tokens, supervised_tokens

_log = logging.getLogger(__name__)

_SEED_OF_A_TURN = 1_000_003


class Answerer(Protocol):
    """Writes the missing answers of items."""

    def answered(
        self, items: Sequence[Row], seed: int, on_tokens: Callable[[int], object]
    ) -> tuple[list[Row], list[np.ndarray] | None]:
        """Returns the rows of the items, in order, and the target's states of each.

        seed: of sampling. on_tokens: called with each number of new answer tokens. States are None
        unless the target wrote every row now.
        """
        ...


def answerer_of(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    write: Writer,
) -> Answerer:
    """Returns what writes the missing answers of `data.source`: the target, or a server."""
    if config.source.startswith(SERVER):
        return ServerAnswers(config, tokenizer, eos_ids)
    return TargetAnswers(config, tokenizer, eos_ids, write)


class TargetAnswers:
    """The target as the writer of answers, turn by turn."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        write: Writer,
    ):
        """write: continues token prompts."""
        self._config, self._tokenizer, self._eos_ids = config, tokenizer, eos_ids
        self._write = write

    def answered(
        self, items: Sequence[Row], seed: int, on_tokens: Callable[[int], object]
    ) -> tuple[list[Row], list[np.ndarray] | None]:
        """See `Answerer`."""
        given = [row for row in items if any(row.supervised)]
        on_tokens(supervised_tokens(given))
        dialogs = [None if any(row.supervised) else _Dialog(row) for row in items]
        waiting = [dialog for dialog in dialogs if dialog is not None]
        turn = ended_early = 0
        while waiting:
            answers = self._write(
                [dialog.prompt for dialog in waiting],
                max_new=self._config.max_answer_tokens,
                temperature=self._config.temperature,
                seed=seed + turn * _SEED_OF_A_TURN,
                on_tokens=on_tokens,
            )
            for answer in answers:
                waiting[answer.index].take(answer.tokens, answer.states_LD)
            unfinished = [dialog for dialog in waiting if dialog.contexts]
            waiting = [dialog for dialog in unfinished if self._has_next(dialog)]
            ended_early += len(unfinished) - len(waiting)
            turn += 1
        if ended_early:
            _log.info(
                f"{ended_early} chats end before their last question: what the template makes of "
                f"it is longer than data.max_chat_tokens = {self._config.max_chat_tokens}, or it "
                "refuses it"
            )
        rows, states = [], []
        for row, dialog in zip(items, dialogs, strict=True):
            rows += [row] if dialog is None else dialog.rows
            states += [] if dialog is None else dialog.states
        return rows, states if not given else None

    def _has_next(self, dialog: "_Dialog") -> bool:
        """Prepares the next prompt of a dialog; returns whether it can be answered."""
        tokens = dialog.rows[-1].tokens[len(dialog.prompt) :]
        text_tokens = tokens[:-1] if tokens[-1] in self._eos_ids else tokens
        text = self._tokenizer.decode(text_tokens, skip_special_tokens=True)
        assert isinstance(text, str)  # a list of texts only for a list of sequences
        try:
            prompt = dialog.next_prompt(self._tokenizer, text)
        except TemplateRefusal:
            return False
        return len(prompt) < self._config.max_chat_tokens


class _Dialog:
    """One item, the answers that it has so far, and the messages that follow them."""

    def __init__(self, item: Row):
        self.prompt = item.tokens
        self.rows: list[Row] = []
        self.states: list[np.ndarray] = []
        self._chat = item.chat
        contexts = item.chat.contexts if item.chat else []
        self._messages: list[Message] = list(contexts[0]) if contexts else []
        self.contexts = contexts[1:]  # messages between the answers to come

    def take(self, answer: Sequence[int], states_LD: np.ndarray) -> None:
        """Adds an answer to the prompt, with the target's states over both.

        It extends the last row if the prompt does, else it begins a row of its own: some templates
        render earlier answers differently once the chat continues.
        """
        before = self.rows[-1] if self.rows else Row([], [])
        flags = [False] * len(self.prompt)
        if before.tokens and self.prompt[: len(before.tokens)] == before.tokens:
            flags[: len(before.tokens)] = before.supervised
            self.rows.pop()
            self.states.pop()
        self.rows.append(Row([*self.prompt, *answer], [*flags, *[True] * len(answer)]))
        self.states.append(states_LD)

    def next_prompt(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Returns the prompt of the next answer; text: of the answer before it."""
        answer = {"role": "assistant", "content": text}
        self._messages += [answer, *self.contexts[0]]
        self.contexts = self.contexts[1:]
        chat = self._chat
        assert chat is not None  # without a chat there are no contexts
        self.prompt = prompt_tokens(tokenizer, self._messages, chat.where, chat.variables)
        return self.prompt

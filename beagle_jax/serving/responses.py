"""Responses in the form of OpenAI's API: whole, and as chunks of a stream."""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from beagle_jax.decoding.requests import Codec
from beagle_jax.serving.bodies import ChatBody, CompletionBody
from beagle_jax.serving.choice import Choice, New, chat_logprobs, completion_logprobs


@dataclass
class Form:
    """The form of the responses to one body."""

    body: ChatBody | CompletionBody
    codec: Codec
    prompt_tokens: int
    number: str = field(default_factory=lambda: secrets.token_hex(12), init=False)
    created: int = field(default_factory=lambda: int(time.time()), init=False)

    @property
    def chat(self) -> bool:
        """Whether it is a chat completion."""
        return isinstance(self.body, ChatBody)

    @property
    def identity(self) -> str:
        """Field `id`."""
        return ("chatcmpl-" if self.chat else "cmpl-") + self.number

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The response to a request without `stream`."""
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self._usage(choices),
        }

    def first(self, index: int) -> Iterator[dict[str, Any]]:
        """The chunk before the first text of a choice."""
        if self.chat:
            yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def chunk(self, index: int, choice: Choice, new: New) -> Iterator[dict[str, Any]]:
        """The chunks for what a piece added: text, and at the end the reason of it."""
        if new.text or new.logprobs or new.extension:
            made: dict[str, Any] = (
                {"delta": {"content": new.text}} if self.chat else {"text": new.text}
            )
            if self.body.wanted_logprobs is not None:
                made["logprobs"] = self._logprobs(new.logprobs, new.offset)
            if new.extension is not None:
                made["beagle"] = new.extension
            yield self._chunk(index, made)
        if choice.reason is not None:
            made = {"delta": {}} if self.chat else {"text": ""}
            yield self._chunk(index, made, choice.reason)

    def last(self, choices: Sequence[Choice]) -> Iterator[dict[str, Any]]:
        """The chunk with the usage, on request."""
        if self._streams_usage:
            yield {**self._head(self._kind), "choices": [], "usage": self._usage(choices)}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    @property
    def _streams_usage(self) -> bool:
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.identity,
            "object": kind,
            "created": self.created,
            "model": self.body.model,
        }

    def _chunk(self, index: int, made: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, "finish_reason": reason, **made}
        usage = {"usage": None} if self._streams_usage else {}
        return {**self._head(self._kind), "choices": [choice], **usage}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        made: dict[str, Any] = {"index": index, "finish_reason": choice.reason, "logprobs": None}
        if self.chat:
            made["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
        else:
            made["text"] = choice.text
        if self.body.wanted_logprobs is not None:
            made["logprobs"] = self._logprobs(choice.logprobs, 0)
        if self.body.beagle.tokens:
            made["beagle"] = choice.extension()
        return made

    def _logprobs(self, entries: Sequence[Any], offset: int) -> dict[str, Any]:
        if self.chat:
            return chat_logprobs(self.codec, entries)
        return completion_logprobs(self.codec, entries, offset)

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """`accepted_prediction_tokens`: drafted tokens among those of the answers."""
        counts = [choice.usage() for choice in choices]
        tokens, accepted, rounds = (sum(column) for column in zip(*counts, strict=True))
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "completion_tokens_details": {"accepted_prediction_tokens": accepted},
            "rounds": rounds,
        }

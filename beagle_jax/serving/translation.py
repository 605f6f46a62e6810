"""From the body of a request to requests of the engine."""

import secrets
import threading
from dataclasses import dataclass, field
from typing import TypeVar

from beagle_jax.config import Config
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.requests import Codec, Request
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.errors import ContextFull, UserError
from beagle_jax.serving.bodies import Body, ChatBody, CompletionBody
from beagle_jax.serving.refusal import Refusal, bad

Value = TypeVar("Value")


@dataclass(frozen=True)
class Translator:
    """Fills what a body leaves out from the config's section `decode`."""

    config: Config
    decoder: SpeculativeDecoder
    model: str  # the name that requests must use
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def requests(self, body: ChatBody | CompletionBody) -> list[Request]:
        """The engine's requests: `n` for each prompt, one after the other.

        Without a seed, each call draws its own.

        Raises:
            Refusal: the model is another one, or values do not fit the target.
        """
        if body.model != self.model:
            raise Refusal(
                404,
                f"there is no model {body.model[:200]!r}; this server has {self.model!r}",
                param="model",
                code="model_not_found",
            )
        count, prompts_count = body.n or 1, len(getattr(body, "prompts", [0]))
        serve = self.config.serve
        most = min(serve.max_choices, serve.rows + serve.max_waiting)
        if prompts_count * count > most:  # before the work of encoding them
            raise bad(
                f"{prompts_count} prompts times n = {count} are more than {most} answers; ask for "
                "fewer",
                "n",
            )
        with self._lock:  # tokenizers may change their settings while they encode
            prompts = self._prompts(body)
        seed = secrets.randbits(32) if body.seed is None else body.seed
        return [
            self._request(body, tokens, seed + line, choice)
            for line, tokens in enumerate(prompts)
            for choice in range(count)
        ]

    def _prompts(self, body: ChatBody | CompletionBody) -> list[list[int]]:
        codec = self.decoder.codec
        name = "messages" if isinstance(body, ChatBody) else "prompt"
        try:
            if isinstance(body, ChatBody):
                return [codec.encode([message.plain() for message in body.messages])]
            return [codec.encode(_tokens(codec, prompt)) for prompt in body.prompts]
        except ContextFull as error:
            raise Refusal(400, str(error), param=name, code="context_length_exceeded") from None
        except UserError as error:
            raise bad(str(error), name) from None

    def _request(
        self, body: ChatBody | CompletionBody, tokens: list[int], seed: int, choice: int
    ) -> Request:
        decode, limit = self.config.decode, body.limit
        if limit is not None and len(tokens) + limit > self.decoder.codec.context:
            raise Refusal(
                400,
                f"the prompt has {len(tokens)} tokens and its answer may have {limit}, but the "
                f"context ends at {self.decoder.codec.context}; ask for fewer",
                param="max_tokens",
                code="context_length_exceeded",
            )
        ends, stops = body.stop_token_ids, body.stops
        most = limit or decode.max_new_tokens
        if body.min_tokens is not None and body.min_tokens > most:
            raise bad(
                f"min_tokens is {body.min_tokens}, and the answer has at most {most}; ask for "
                "fewer, or raise max_tokens",
                "min_tokens",
            )
        request = Request(
            tokens,
            most,
            self._sampling(body),
            min_new_tokens=_or(body.min_tokens, min(decode.min_new_tokens, most)),
            stop=tuple(decode.stop) if stops is None else stops,
            stop_token_ids=tuple(decode.stop_token_ids if ends is None else ends),
            ignore_eos=_or(body.ignore_eos, decode.ignore_eos),
            logprobs=body.wanted_logprobs,
            seconds=self.config.serve.answer_seconds,
            seed=seed,
            choice=choice,
            draft=body.beagle.draft,
        )
        try:
            request = self.decoder.checked(request)
            self.decoder.codec.stream(request.stop)
        except UserError as error:
            name = str(error).partition(" ")[0]
            raise bad(str(error), name if name in type(body).model_fields else None) from None
        return request

    def _sampling(self, body: Body) -> Sampling:
        decode = self.config.decode
        top_k = _or(body.top_k, decode.top_k)
        return Sampling(
            _or(body.temperature, decode.temperature),
            max(top_k, 0),
            _or(body.top_p, decode.top_p),
            _or(body.min_p, decode.min_p),
            _or(body.repetition_penalty, decode.repetition_penalty),
            _or(body.presence_penalty, decode.presence_penalty),
            _or(body.frequency_penalty, decode.frequency_penalty),
            _bias(body),
        )


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _bias(body: Body) -> dict[int, float] | None:
    """`logit_bias` by token. Raises Refusal for keys that are no token ids."""
    if not body.logit_bias:
        return None
    for key in body.logit_bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise bad(f"logit_bias holds {key[:40]!r}; expected token ids", "logit_bias")
    return {int(key): bias for key, bias in body.logit_bias.items()}


def _tokens(codec: Codec, prompt: str | list[int]) -> list[int]:
    """The tokens of a prompt that is continued as it stands, without a chat template."""
    if not isinstance(prompt, str):
        return prompt
    if codec.tokenizer is None:
        raise UserError("this target has no tokenizer, so a prompt cannot be text; give token ids")
    return list(codec.tokenizer(prompt)["input_ids"])

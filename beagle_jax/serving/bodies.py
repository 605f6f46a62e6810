"""Bodies of requests: the fields of OpenAI's API that this server honours, and its own.

Each other field of that API is refused by name, unless its value asks for nothing (`NEUTRAL`).
"""

from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from beagle_jax.decoding.requests import MOST_ENDS, MOST_LOGPROBS
from beagle_jax.serving.refusal import Refusal, bad

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]

# Fields of OpenAI's API that this server does not have, with values that ask for nothing.
# null asks for nothing everywhere.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# The same for the fields of a message, which clients send back as they got it.
NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}
_LONGEST_NAME = 100  # characters of a client's field names in messages


class Part(BaseModel):
    """A part of a message whose content is a list."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class StreamOptions(BaseModel):
    """What a stream holds beside the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None


class Extension(BaseModel):
    """Field `beagle`: what this server can do and OpenAI's API has no field for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    draft: bool = True  # False: plain decoding, which gives the same answer
    tokens: bool = False  # chunks of a stream say which text was drafted, and hold the last tree


class Body(BaseModel):
    """The fields that both kinds of completion have. null stands for the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(min_length=1, max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None  # goes to the log of requests
    # Not in OpenAI's API; its client sends them as extra_body.
    top_k: Annotated[int, Field(ge=-1)] | None = None  # -1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_ENDS)] | None = None
    ignore_eos: bool | None = None
    beagle: Extension = Extension()

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer; None: the default."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...] | None:
        """Stop strings; None: the default."""
        if self.stop is None:
            return None
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer; None: the default."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Log-probabilities: of the answer's tokens and of so many more; None: of none."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Text | Tokens | Annotated[list[Text] | list[Tokens], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt: text, or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        first = self.prompt[0]
        return [self.prompt] if isinstance(first, int) else list(self.prompt)  # type: ignore

    @property
    def wanted_logprobs(self) -> int | None:
        """Log-probabilities: of the answer's tokens and of so many more; None: of none."""
        return self.logprobs


Kind = TypeVar("Kind", bound=Body)


def parsed(kind: type[Kind], raw: bytes) -> Kind:
    """Reads a body.

    Raises:
        Refusal: it is not JSON, or a field is missing, unknown, not supported, of another type
            or out of range; the message names the field.
    """
    try:
        body = kind.model_validate_json(_without_neutral(kind, raw))
    except ValidationError as error:
        raise _refusal(error) from None
    if isinstance(body, ChatBody):
        limits = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise bad(
                f"max_tokens is {body.max_tokens} and max_completion_tokens "
                f"{body.max_completion_tokens}; give one of them",
                "max_completion_tokens",
            )
        if body.top_logprobs is not None and not body.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options needs stream: true", "stream_options")
    return body


def _without_neutral(kind: type[Kind], raw: bytes) -> bytes:
    """The body without fields of OpenAI's API that this server lacks and that ask for nothing.

    Raises Refusal for those that ask for something.
    """
    try:
        body = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise bad(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise bad(f"the body is {type(body).__name__}; expected a JSON object")
    if "beagle" in body and body["beagle"] is None:
        del body["beagle"]
    for name in NEUTRAL.keys() & body.keys() - kind.model_fields.keys():
        if not _asks_for_nothing(body.pop(name), NEUTRAL[name]):
            raise bad(f"this server does not support {name}; leave it out", name)
    messages = body.get("messages")
    for place, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            for name in NEUTRAL_IN_MESSAGES.keys() & message.keys():
                if not _asks_for_nothing(message.pop(name), NEUTRAL_IN_MESSAGES[name]):
                    name = f"messages.{place}.{name}"
                    raise bad(f"this server does not support {name}; leave it out", "messages")
    return pydantic_core.to_json(body)


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    return value is None or any(
        type(value) is type(nothing) and value == nothing for nothing in neutral
    )


def _refusal(error: ValidationError) -> Refusal:
    """The first mistake of a body, as a sentence."""
    errors = error.errors(include_url=False, include_context=False)
    # Of a field that may be text or a list, the mistake in the form that was sent.
    same = [each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
    first = next((each for each in same if not each["type"].endswith("_type")), errors[0])
    # pydantic's names of the forms, such as `list[constrained-str]`, are no part of the place.
    parts = [str(part) for part in first["loc"]]
    parts = [part for part in parts if "[" not in part and part not in ("str", "constrained-str")]
    place = ".".join(part[:_LONGEST_NAME] for part in parts)
    name = str(first["loc"][0])[:_LONGEST_NAME] if first["loc"] else None
    if first["type"] == "missing":
        return bad(f"{place} is missing", name)
    if first["type"] == "extra_forbidden":
        return bad(f"{place}: there is no such field; check its spelling or leave it out", name)
    message = first["msg"]
    return bad(f"{place}: {message[:1].lower()}{message[1:]}", name)

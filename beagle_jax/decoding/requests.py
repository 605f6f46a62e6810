"""Requests and answers of a decoder; conversion between prompts, tokens and text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypedDict, overload

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from beagle_jax.data.template import prompt_tokens
from beagle_jax.decoding.arguments import real_number, stop_strings, whole_number
from beagle_jax.decoding.logprobs import TokenLogProb
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.text import TextStream
from beagle_jax.errors import ContextFull, PromptError, UserError

# A user's message, a chat that waits for an answer, or token ids in any container.
Prompt = str | Sequence[Mapping[str, str]] | Iterable[int]

_EXPECTED = "expected text, a list of messages, or a sequence of token ids (whole numbers)"

Finish = Literal["token", "string", "length", "context", "time", "cancelled", "error"]

MOST_ENDS = 32  # stop_token_ids of a request
MOST_LOGPROBS = 20  # of the most likely tokens at each place, as OpenAI's API allows

NOT_FINITE = (
    "the target's logits are not finite: its weights hold NaN, or overflow in this dtype; try "
    "target.dtype=float32"
)


@dataclass(frozen=True)
class Request:
    """One prompt, with the settings of its answer."""

    tokens: Sequence[int]  # of the prompt
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()  # the answer ends before the first of these strings
    seed: int = 0
    min_new_tokens: int = 0  # an end token comes after so many tokens at the earliest
    stop_token_ids: tuple[int, ...] = ()  # and after one of these tokens
    ignore_eos: bool = False  # the target's end tokens end nothing
    logprobs: int | None = None  # log-probabilities: of the answer's tokens, and of so many more
    seconds: float | None = None  # the answer ends so long after its prompt got a row
    choice: int = 0  # which of several answers to the same prompt and seed
    draft: bool = True  # False: none of its tokens is drafted

    def check(self) -> "Request":
        """Returns this request with Python's numbers.

        Raises:
            UserError: a setting means nothing.
        """
        if not isinstance(self.sampling, Sampling):
            raise UserError(
                f"sampling is {self.sampling!r:.80}; expected Sampling(temperature, top_k, ..)"
            )
        most = whole_number("max_new_tokens", self.max_new_tokens, 1)
        least = whole_number("min_new_tokens", self.min_new_tokens, 0)
        if least > most:
            raise UserError(f"min_new_tokens is {least}; expected 0 to max_new_tokens, {most}")
        ends = tuple(whole_number("stop_token_ids", token, 0) for token in self.stop_token_ids)
        if len(ends) > MOST_ENDS:
            raise UserError(f"{len(ends)} stop_token_ids; expected at most {MOST_ENDS}")
        logprobs, seconds = self.logprobs, self.seconds
        if logprobs is not None:
            logprobs = whole_number("logprobs", logprobs, 0)
            if logprobs > MOST_LOGPROBS:
                raise UserError(
                    f"logprobs is {logprobs}; expected None, or 0 to {MOST_LOGPROBS} of the most "
                    "likely tokens"
                )
        if seconds is not None:
            seconds = real_number("seconds", seconds, "None or a time above 0")
            if not seconds > 0:
                raise UserError(f"seconds is {seconds}; expected None or a time above 0")
        return replace(
            self,
            max_new_tokens=most,
            min_new_tokens=least,
            sampling=self.sampling.check(),
            stop=stop_strings(self.stop),
            stop_token_ids=ends,
            logprobs=logprobs,
            seconds=seconds,
            seed=whole_number("seed", self.seed),
        )

    def end_tokens(self, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens that end its answer; eos_ids: of the target."""
        return (() if self.ignore_eos else eos_ids) + self.stop_token_ids


class Options(TypedDict, total=False):
    """What a call may say of all its requests; see `Request`."""

    max_new_tokens: int
    min_new_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    seconds: float | None
    seed: int
    raw: bool  # text prompts are given to the target as they are, without the chat template
    template_variables: Mapping[str, Any]  # of the chat template, over those of the settings


@dataclass(frozen=True)
class Answer:
    """One answer. Its measures are defined in method.md 7.1."""

    tokens: list[int]  # the stop token included, if one came
    text: str  # without stop token and stop string; empty when the target has no tokenizer
    # Why the answer ends: an end token, a stop string, max_new_tokens, a full context,
    # `Request.seconds` or the caller; "error": the target's logits after these tokens were not
    # finite, or the prompt could not be answered.
    finish: Finish
    rounds: int  # the prefill is not counted
    # Number of rounds that accepted 0, 1, .. P drafts. Only emitted tokens count.
    accepted: list[int]
    # Of the tokens; with `Request.logprobs`.
    logprobs: list[TokenLogProb] | None = field(default=None, kw_only=True)
    error: str | None = field(default=None, kw_only=True)  # what went wrong, with finish "error"

    @property
    def tau(self) -> float:
        """Tokens per round; only emitted tokens count. 1 for an answer without a round."""
        return (len(self.tokens) - 1) / self.rounds if self.rounds else 1.0


@dataclass(frozen=True)
class Answers(Sequence[Answer]):
    """All answers of a call, in the order of its prompts, and their total time."""

    answers: tuple[Answer, ...]
    prefill_seconds: float
    decode_seconds: float

    @overload
    def __getitem__(self, index: int) -> Answer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Answer]: ...
    def __getitem__(self, index: int | slice) -> Answer | Sequence[Answer]:
        return self.answers[index]

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers divided by the total time, prefill included."""
        tokens = sum(len(answer.tokens) for answer in self.answers)
        return tokens / (self.prefill_seconds + self.decode_seconds)


class DraftedTree(NamedTuple):
    """The tokens that one round drafted; node 0 is the root, the last token before the round."""

    tokens: list[int]
    parents: list[int]  # the root is its own
    accepted: list[bool]  # the node is on the accepted path, as the root always is


@dataclass(frozen=True)
class Piece:
    """Part of one answer, returned as soon as it is decoded."""

    index: int  # of the request
    tokens: list[int]
    text: str  # the text that these tokens complete
    answer: Answer | None  # the whole answer; only in its last piece
    logprobs: list[TokenLogProb] | None = None  # of the tokens, with `Request.logprobs`
    # Accepted drafts of each round that wrote these tokens. An answer's first token is of no round.
    accepted: tuple[int, ...] = ()
    drafted: DraftedTree | None = None  # by the last of these rounds, with `Filters.drafted`


@dataclass(frozen=True)
class Codec:
    """Converts prompts to tokens, and tokens to text, for one target."""

    tokenizer: PreTrainedTokenizerBase | None
    eos_ids: tuple[int, ...]
    vocab_size: int
    context: int  # limit of a prompt and its answer together, in tokens

    def encode(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Returns the tokens of a prompt.

        raw: a text is tokenized as it is, with what the tokenizer puts before every text, and
        without the chat template. variables: of the template, over those of the settings.

        Raises:
            ContextFull: The prompt leaves no room for an answer.
            PromptError: The prompt is empty, or is not a prompt.
        """
        if raw and isinstance(prompt, str):
            prompt = self._plain(prompt)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
        if not _is_sequence(prompt) or isinstance(prompt, set | frozenset | Mapping):
            raise PromptError(f"the prompt is {prompt!r:.80}; {_EXPECTED}")
        parts = _listed(prompt)
        if not parts:
            raise PromptError("the prompt is empty; give at least one token")
        messages = [dict(part) for part in parts if isinstance(part, Mapping)]
        if messages and len(messages) < len(parts):
            raise PromptError(f"the prompt is {parts!r:.80}; {_EXPECTED}")
        if messages:
            if raw:
                raise PromptError(
                    f"the prompt is {parts!r:.80}, messages for the chat template, and raw is set; "
                    "give text, or leave raw out"
                )
            tokenizer = self._tokenizer_of_text()
            try:
                tokens = prompt_tokens(tokenizer, messages, variables=variables, overrides=True)
            except UserError as error:
                raise PromptError(str(error)) from error
        else:
            tokens = _token_ids(parts)
        if not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise PromptError(
                f"the prompt holds token {max(tokens, key=abs)}; expected tokens of the target's "
                f"vocabulary, 0 to {self.vocab_size - 1}; use the target's own tokenizer"
            )
        if len(tokens) >= self.context:
            raise ContextFull(len(tokens), self.context)
        return tokens

    def _plain(self, text: str) -> list[int]:
        """Returns the tokens of a text without markup."""
        return list(self._tokenizer_of_text()(text)["input_ids"]) if text else []

    def _tokenizer_of_text(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise PromptError(
                "this target has no tokenizer, so a prompt cannot be text; give token ids"
            )
        return self.tokenizer

    def stream(
        self, stop: Sequence[str] = (), end_tokens: tuple[int, ...] = ()
    ) -> TextStream | None:
        """Returns a new text stream for one answer; None without a tokenizer.

        end_tokens: tokens that are not shown, beside the target's own end tokens.

        Raises UserError if `stop` is not a list of strings, or needs a tokenizer.
        """
        if self.tokenizer is None:
            if stop:
                raise UserError(
                    "this target has no tokenizer, so stop strings cannot be found in its answers; "
                    "leave stop out"
                )
            return None
        return TextStream(self.tokenizer, (*self.eos_ids, *end_tokens), stop)

    def checked(self, request: Request) -> Request:
        """Returns a request with Python's numbers. Raises UserError if a setting means nothing."""
        request = request.check()
        for name, tokens in (
            ("stop_token_ids", request.stop_token_ids),
            ("logit_bias", request.sampling.logit_bias or ()),
        ):
            for token in tokens:
                if not 0 <= token < self.vocab_size:
                    raise UserError(
                        f"{name} holds token {token}, and the target's vocabulary ends at "
                        f"{self.vocab_size - 1}"
                    )
        return request


def _token_ids(parts: Sequence[object]) -> list[int]:
    """Converts token ids to Python ints. Raises PromptError for other values."""
    try:
        numbers = np.asarray(parts)
    except ValueError:  # numbers and lists beside each other
        numbers = np.empty(0)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        several = all(isinstance(part, str) or np.ndim(part) for part in parts)  # type: ignore[arg-type]
        hint = "; of several prompts each is given by itself" if several else ""
        raise PromptError(f"the prompt is {parts!r:.80}; {_EXPECTED}{hint}")
    return numbers.tolist()


def _is_sequence(value: object) -> bool:
    """Whether this can be a list of prompts, messages or tokens."""
    if isinstance(value, bytes | bytearray) or getattr(value, "ndim", None) == 0:
        return False
    return isinstance(value, Iterable)


def prompts_of(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """Iterates over the prompts of a call. Raises PromptError for one prompt without a list."""
    if not _is_sequence(prompts):
        raise PromptError(f"prompts is {prompts!r:.80}; expected a list of prompts")
    if not isinstance(prompts, (str, Mapping)):
        prompts = _listed(prompts)
        if not any(_is_part(part) for part in prompts):
            return iter(prompts)
    raise PromptError(
        f"generate takes a list of prompts, and was given one, {prompts!r:.80}; write "
        "generate([prompt])"
    )


def _listed(values: Iterable[Any]) -> list[Any]:
    """Returns a list. Of a jax array it is made at once: jax compiles what takes its elements."""
    return list(np.asarray(values) if isinstance(values, jax.Array) else values)


def _is_part(value: object) -> bool:
    """Returns whether the value is part of a prompt: a message or a token."""
    if isinstance(value, Mapping):
        return "input_ids" not in value  # what a tokenizer returns is refused as a prompt
    return isinstance(value, int) or (hasattr(value, "dtype") and getattr(value, "ndim", None) == 0)


def rounds_through(accepted: Sequence[int], count: int) -> list[int]:
    """Returns the accepted drafts of the rounds that wrote an answer's first `count` tokens.

    The prefill writes the first token. A round writes its accepted drafts and one more token.
    Drafts that the last of these rounds accepted after the first `count` tokens are not counted.

        accepted 2 0 3, count 5: the rounds wrote tokens 2-4, 5 and 6-9; the result is 2 0
        accepted 2 0 3, count 7: the result is 2 0 2
    """
    through: list[int] = []
    written = 1
    for drafts in accepted:
        if written >= count:
            break
        through.append(min(drafts, count - written))
        written += drafts + 1
    return through

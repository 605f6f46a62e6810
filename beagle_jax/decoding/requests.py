"""What is asked of a decoder and what it answers; prompts to tokens and tokens to text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from beagle_jax.data.template import prompt_tokens
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.text import TextStream
from beagle_jax.errors import ContextFull, PromptError, UserError

# A user's message, a chat that waits for an answer, or token ids in any container.
Prompt = str | Sequence[Mapping[str, str]] | Iterable[int]

Finish = Literal["token", "string", "length", "context", "error"]

NOT_FINITE = (
    "the target's logits are not finite: its weights hold NaN, or overflow in this dtype; try "
    "target.dtype=float32"
)


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it."""

    tokens: Sequence[int]  # of the prompt
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()  # the answer ends before the first of these strings
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer (defined in method.md 7.1)."""

    tokens: list[int]  # the stop token included, if one came
    text: str  # without stop token and stop string; empty when the target has no tokenizer
    # The target's stop token, a stop string, max_new_tokens, a full context; or "error": the
    # target's logits were not finite after these tokens.
    finish: Finish
    rounds: int  # the prefill is in no round
    # histogram: rounds that accepted 0, 1, .. P drafts, as far as they were emitted
    accepted: list[int]

    @property
    def tau(self) -> float:
        """Tokens per round; a round cut short counts what it emitted. 1 for an answer without a
        round.
        """
        return (len(self.tokens) - 1) / self.rounds if self.rounds else 1.0


@dataclass(frozen=True)
class Answers(Sequence[Answer]):
    """All answers of a call, in the order of its prompts, and the time that they took together."""

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
        """All tokens of all answers over all time, prefill included."""
        tokens = sum(len(answer.tokens) for answer in self.answers)
        return tokens / (self.prefill_seconds + self.decode_seconds)


@dataclass(frozen=True)
class Piece:
    """Part of one answer, as soon as it is there."""

    index: int  # of the request
    tokens: list[int]
    text: str  # what these tokens complete
    answer: Answer | None  # the whole, with its last piece


@dataclass(frozen=True)
class Codec:
    """Prompts to tokens, and tokens to text, for one target."""

    tokenizer: PreTrainedTokenizerBase | None
    eos_ids: tuple[int, ...]
    vocab_size: int
    context: int  # tokens that a prompt and its answer may have together

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt.

        Raises:
            ContextFull: The prompt leaves no room for an answer.
            PromptError: The prompt is empty, or is not a prompt.
        """
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
        parts = list(prompt)
        if not parts:
            raise PromptError("the prompt is empty; give at least one token")
        messages = [dict(part) for part in parts if isinstance(part, Mapping)]
        if len(messages) == len(parts):
            if self.tokenizer is None:
                raise PromptError(
                    "this target has no tokenizer, so a prompt cannot be text; give token ids"
                )
            try:
                tokens = prompt_tokens(self.tokenizer, messages)
            except UserError as error:
                raise PromptError(str(error)) from error
        else:
            tokens = _token_ids(parts)
        if not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise PromptError(
                f"the prompt holds token {max(tokens, key=abs)}, and the target's vocabulary "
                f"ends at {self.vocab_size - 1}; use its own tokenizer"
            )
        if len(tokens) >= self.context:
            raise ContextFull(len(tokens), self.context)
        return tokens

    def stream(self, stop: Sequence[str] = ()) -> TextStream | None:
        """Text of tokens as they come; None without a tokenizer.

        Raises UserError for stop strings that cannot be looked for.
        """
        if isinstance(stop, str) or not all(isinstance(part, str) and part for part in stop):
            raise UserError(f"stop is {stop!r}; expected a list of strings, none of them empty")
        if self.tokenizer is None:
            if stop:
                raise UserError(
                    "this target has no tokenizer, so stop strings cannot be looked for"
                )
            return None
        return TextStream(self.tokenizer, self.eos_ids, stop)


def _token_ids(parts: Sequence[object]) -> list[int]:
    """Python ints of token ids. Raises PromptError for anything else."""
    numbers = np.asarray(parts)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise PromptError(
            f"the prompt is {parts!r:.80}; expected text, a list of messages, or a sequence of "
            "whole numbers, the token ids"
        )
    return numbers.tolist()


def prompts_of(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """The prompts of a call. Raises PromptError when it was given one instead of a list."""
    if not isinstance(prompts, (str, Mapping)):
        prompts = list(prompts)
        if not any(_is_part(part) for part in prompts):
            return iter(prompts)
    raise PromptError(
        f"generate takes a list of prompts, and was given one, {prompts!r:.80}; write "
        "generate([prompt])"
    )


def _is_part(value: object) -> bool:
    """Whether this is a message or a token, and no prompt."""
    return isinstance(value, (Mapping, int)) or (
        hasattr(value, "dtype") and getattr(value, "ndim", None) == 0
    )


def rounds_through(accepted: Sequence[int], count: int) -> list[int]:
    """Accepted drafts of the rounds that wrote an answer's first `count` tokens.

    The prefill wrote the first; a round writes its accepted drafts and one token more. What the
    last of these rounds accepted after those tokens does not count.

        accepted 2 0 3, count 5: the rounds wrote tokens 2-4, 5, 6-9; those that count are 2 0
        accepted 2 0 3, count 7: 2 0 2
    """
    through: list[int] = []
    written = 1
    for drafts in accepted:
        if written >= count:
            break
        through.append(min(drafts, count - written))
        written += drafts + 1
    return through

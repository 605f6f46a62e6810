"""The requests of one call: many prompts, or a generator of them, with what is common to all."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from beagle_jax.decoding.arguments import (
    stop_strings,
    template_variables,
    whole_number,
    yes_or_no,
)
from beagle_jax.decoding.requests import Answer, Codec, Options, Prompt, Request
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.session import Session
from beagle_jax.errors import PromptError, UsageError


def each_sampling(sampling: Sampling | Iterable[Sampling]) -> Sampling | list[Sampling]:
    """Returns the sampling of all prompts, or a list with that of each."""
    if isinstance(sampling, Sampling) or not isinstance(sampling, list | tuple):
        return sampling  # type: ignore[return-value]  # what is no Sampling is refused later
    return list(sampling)


@dataclass
class Batch:
    """Encodes prompts one by one, and answers them in the order in which they end.

    A prompt that cannot be answered fails alone: its answer has `finish="error"` and the reason.
    """

    codec: Codec
    sampling: Sampling | list[Sampling]  # of all prompts, or one for each
    n: int  # answers to each prompt
    options: Options
    failed: dict[int, PromptError] = field(default_factory=dict, init=False)  # by prompt

    def __post_init__(self) -> None:
        """Raises UserError for options that mean nothing."""
        if unknown := set(self.options) - set(Options.__annotations__):
            raise UsageError(
                f"{', '.join(sorted(unknown))}: no such option; expected some of "
                f"{', '.join(Options.__annotations__)}"
            )
        self.n = whole_number("n", self.n, 1)
        self.codec.stream(stop_strings(self.options.get("stop", ())))
        self._raw = yes_or_no("raw", self.options.get("raw", False))
        self._variables = template_variables(self.options.get("template_variables", {}))
        self._places: list[int] = []  # in the result, of each request
        self._reported = 0

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the tokens of a prompt. Raises PromptError if it cannot be answered."""
        return self.codec.encode(prompt, raw=self._raw, variables=self._variables)

    def requests(self, prompts: Iterable[Prompt]) -> Iterator[Request]:
        """The requests of these prompts, n of each; prompts that are none are left out."""
        common: dict[str, Any] = dict(self.options)
        for name in ("raw", "template_variables"):  # of the prompt, and not of the request
            common.pop(name, None)
        common["stop"] = stop_strings(common.get("stop", ()))
        common["stop_token_ids"] = tuple(common.get("stop_token_ids", ()))
        seed = whole_number("seed", common.pop("seed", 0))
        for line, prompt in enumerate(prompts):
            sampling = self.sampling
            if isinstance(sampling, list):
                sampling = sampling[line]
            try:
                tokens = self.encode(prompt)
            except PromptError as error:
                self.failed[line] = error
                continue
            for choice in range(self.n):
                request = Request(
                    tokens, sampling=sampling, seed=seed + line, choice=choice, **common
                )
                request = self.codec.checked(request)
                self._places.append(line * self.n + choice)
                yield request

    def answers(self, session: Session) -> Iterator[tuple[int, Answer]]:
        """Place and answer of each prompt, as they end."""
        for piece in session:
            yield from self._failures()
            if piece.answer is not None:
                yield self._places[piece.index], piece.answer
        yield from self._failures()

    def _failures(self) -> Iterator[tuple[int, Answer]]:
        """What was not reported yet."""
        for line, error in list(self.failed.items())[self._reported :]:
            self._reported += 1
            for choice in range(self.n):
                answer = Answer([], "", "error", 0, [], error=str(error))
                yield line * self.n + choice, answer

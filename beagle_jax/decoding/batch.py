"""The requests of one call: many prompts, or a generator of them, with what is common to all."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from beagle_jax.decoding.requests import Answer, Codec, Options, Prompt, Request
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.session import Session
from beagle_jax.errors import PromptError, UsageError, UserError


@dataclass
class Batch:
    """Encodes prompts one by one, and answers them in the order in which they end.

    A prompt that cannot be answered fails alone: its answer has `finish="error"` and the reason.
    """

    codec: Codec
    sampling: Sampling | Sequence[Sampling]  # of all prompts, or one for each
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
        if self.n < 1:
            raise UserError(f"n is {self.n}; expected at least 1 answer to each prompt")
        self.codec.stream(self.options.get("stop", ()))  # before its letters are taken for strings
        self._places: list[int] = []  # in the result, of each request
        self._reported = 0

    def requests(self, prompts: Iterable[Prompt]) -> Iterator[Request]:
        """The requests of these prompts, n of each; prompts that are none are left out."""
        common: dict[str, Any] = dict(self.options)
        for name in ("stop", "stop_token_ids"):
            common[name] = tuple(common.get(name, ()))
        seed = common.pop("seed", 0)
        for line, prompt in enumerate(prompts):
            sampling = self.sampling
            if not isinstance(sampling, Sampling):
                sampling = sampling[line]
            try:
                tokens = self.codec.encode(prompt)
            except PromptError as error:
                self.failed[line] = error
                continue
            for choice in range(self.n):
                request = Request(
                    tokens, sampling=sampling, seed=seed + line, choice=choice, **common
                )
                self.codec.check(request)
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

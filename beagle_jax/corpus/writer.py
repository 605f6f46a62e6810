"""The target as a writer of answers, and the interface of any writer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from beagle_jax.config import DataConfig
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.writer import write_answers
from beagle_jax.weights.target import Target


class Answer(Protocol):
    """What the target generated for one prompt (decoding/writer.py)."""

    @property
    def index(self) -> int:
        """Index of the prompt."""

    @property
    def tokens(self) -> list[int]:
        """The generated tokens."""

    @property
    def states_LD(self) -> np.ndarray:
        """The target's states over prompt and answer."""


class Writer(Protocol):
    """Generates continuations of token prompts and yields them in any order."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new: int,
        temperature: float,
        seed: int,
        on_tokens: Callable[[int], object],
    ) -> Iterator[Answer]: ...


class TargetWriter:
    """Generates answers with the target, `data.batch` rows at a time."""

    def __init__(
        self, target: Target, config: DataConfig, before_first: Callable[[], object] = lambda: None
    ) -> None:
        """Makes a writer that has not written yet.

        before_first: called once, before the target generates for the first time.
        """
        self._target, self._config, self._before_first = target, config, before_first
        self._has_written = False

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new: int,
        temperature: float,
        seed: int,
        on_tokens: Callable[[int], object],
    ) -> Iterator[Answer]:
        """See `Writer`."""
        if not self._has_written:
            self._before_first()
        self._has_written = True
        return write_answers(
            self._target.params,
            self._target.spec,
            prompts,
            eos_ids=self._target.eos_ids,
            max_new=max_new,
            batch=self._config.batch,
            sampling=Sampling(temperature, self._config.top_k),
            seed=seed,
            on_tokens=on_tokens,
        )

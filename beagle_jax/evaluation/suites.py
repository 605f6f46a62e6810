"""Prompts to measure on, and the measurement: plain and speculative decoding of the same prompts in one process."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.data.chats import Chat, own_prompts, read_chats
from beagle_jax.data.template import prompt_tokens
from beagle_jax.decoding.decoder import Generation, SpeculativeDecoder
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.errors import UserError


def suite(source: str, limit: int | None) -> list[Chat]:
    """The committed held-out prompts, or those of a file; at most `limit`. Raises UserError for chats with answers."""
    chats = own_prompts("held_out") if source == "held_out" else read_chats(source)
    for chat in chats:
        if not chat.waits_for_answer:
            raise UserError(f"{chat.where}: the chat ends with an answer; evaluation needs prompts that wait for one")
    return chats[:limit]


def tokenize(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompt tokens of each chat."""
    return [prompt_tokens(tokenizer, chat.messages) for chat in chats]


@dataclass
class Measurement:
    """Answers of one way of decoding to all prompts, in order."""

    name: str
    tree: str  # what was drafted per round
    generations: list[Generation] = field(default_factory=list)
    compiles: int = 0  # programs compiled after the warm-up; 0 when every shape was met before

    @property
    def tokens(self) -> int:
        """Tokens written, stop tokens included."""
        return sum(len(one.tokens) for one in self.generations)

    @property
    def rounds(self) -> int:
        """Rounds run; the prefill is in none."""
        return sum(one.rounds for one in self.generations)

    @property
    def tau(self) -> float:
        """Mean tokens per round over all rounds."""
        return (self.tokens - len(self.generations)) / max(self.rounds, 1)

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all time, prefill included."""
        return self.tokens / sum(one.prefill_seconds + one.decode_seconds for one in self.generations)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the time after the prefill."""
        return (self.tokens - len(self.generations)) / sum(one.decode_seconds for one in self.generations)

    @property
    def step_alpha(self) -> list[float]:
        """Per draft depth: of the rounds that reached it, the share that accepted it."""
        histogram = np.sum([one.accepted for one in self.generations], axis=0)
        reached = np.cumsum(histogram[::-1])[::-1]
        return [float(reached[depth + 1] / reached[depth]) if reached[depth] else 0.0 for depth in range(len(histogram) - 1)]

    def identical_to(self, other: "Measurement") -> int:
        """Prompts whose tokens are the same in both."""
        return sum(mine.tokens == theirs.tokens for mine, theirs in zip(self.generations, other.generations, strict=True))

    @property
    def repeated_4_grams(self) -> float:
        """Share of 4-grams that occurred before in the same answer: loops flatter acceptance."""
        seen = total = 0
        for one in self.generations:
            grams = [tuple(one.tokens[i : i + 4]) for i in range(len(one.tokens) - 3)]
            seen, total = seen + len(grams) - len(set(grams)), total + len(grams)
        return seen / max(total, 1)


class CompileCounter:
    """Counts programs that XLA compiles (cached ones too) while it is the active one."""

    _listening: "CompileCounter | None" = None
    _registered = False

    def __init__(self) -> None:
        self.count = 0
        if not CompileCounter._registered:
            jax.monitoring.register_event_duration_secs_listener(CompileCounter._on_event)
            CompileCounter._registered = True

    @staticmethod
    def _on_event(event: str, duration: float, **_: object) -> None:
        if CompileCounter._listening is not None and event.endswith("backend_compile_duration"):
            CompileCounter._listening.count += 1

    def __enter__(self) -> "CompileCounter":
        CompileCounter._listening = self
        return self

    def __exit__(self, *exception: object) -> None:
        CompileCounter._listening = None


def measure(
    decoders: dict[str, SpeculativeDecoder], prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = GREEDY
) -> list[Measurement]:
    """Runs every decoder on every prompt, in turn, so that a drifting machine treats all alike.

    Each decoder first answers one prompt of every padded length, so that compilation is not timed.
    """
    for _, decoder in tqdm(decoders.items(), desc="compiling", unit="decoder", leave=False):
        decoder.warm_up(prompts, sampling, max_new_tokens=max_new_tokens)
    results = [Measurement(name, str(decoder.tree)) for name, decoder in decoders.items()]
    counters = [CompileCounter() for _ in decoders]
    for prompt in tqdm(prompts, desc="decoding", unit="prompt"):
        for result, counter, decoder in zip(results, counters, decoders.values()):
            with counter:
                result.generations += decoder.generate([prompt], sampling, max_new_tokens=max_new_tokens)
    for result, counter in zip(results, counters):
        result.compiles = counter.count
    return results

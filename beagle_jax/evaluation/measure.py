"""Measures all systems on the same prompts, in one process, turn by turn.

A system is a way of decoding: plain decoding, or one draft.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.data.chats import Chat, Message
from beagle_jax.data.template import prompt_tokens
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.requests import NOT_FINITE, Answer, Answers
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.errors import UserError
from beagle_jax.evaluation.answers import AnswerLog, Asked, Case, TimedAnswer

_TURNS_PER_CASE = 64  # distance between the seeds of two cases


A = TypeVar("A", bound=Answer)


@dataclass
class Measurement(Generic[A]):
    """Answers of one system, and the figures that method.md 7.1 defines on them."""

    name: str
    cases: list[list[A]]  # by prompt, the answers to its turns

    @cached_property
    def generations(self) -> list[A]:
        """All answers, in order."""
        return [answer for case in self.cases for answer in case]

    @property
    def tokens(self) -> int:
        """Number of generated tokens, including stop tokens."""
        return sum(len(answer.tokens) for answer in self.generations)

    @property
    def rounds(self) -> int:
        """Number of rounds; prefill is not a round."""
        return sum(answer.rounds for answer in self.generations)

    @property
    def tau(self) -> float:
        """Mean tokens per round over all rounds; 1 if there were no rounds."""
        return (self.tokens - len(self.generations)) / self.rounds if self.rounds else 1.0

    @property
    def tokens_per_second(self: "Measurement[TimedAnswer]") -> float:
        """All tokens over the total time, prefill included."""
        return self.tokens / sum(
            answer.prefill_seconds + answer.decode_seconds for answer in self.generations
        )

    @property
    def decode_tokens_per_second(self: "Measurement[TimedAnswer]") -> float:
        """Tokens after the first over the time after prefill."""
        return (self.tokens - len(self.generations)) / sum(
            answer.decode_seconds for answer in self.generations
        )

    @property
    def accepted(self) -> list[int]:
        """Number of rounds that accepted 0, 1, .. P drafts; only emitted drafts count."""
        return np.sum([answer.accepted for answer in self.generations], axis=0).tolist()

    @property
    def step_alpha(self) -> list[float]:
        """Per draft depth: of the rounds that reached it, the share that accepted it."""
        reached = np.cumsum(self.accepted[::-1])[::-1]
        return [
            float(reached[depth + 1] / reached[depth]) if reached[depth] else 0.0
            for depth in range(len(reached) - 1)
        ]

    def identical_to(self, other: "Measurement[A]") -> int:
        """Returns the number of answers with the same tokens in both measurements.

        The stop token counts; text and finish reason are not compared. The report shows the result
        for each system (`report.py`).
        """
        return sum(
            mine.tokens == theirs.tokens
            for mine, theirs in zip(self.generations, other.generations, strict=True)
        )

    @property
    def repeated_4_grams(self) -> float:
        """Share of 4-grams that already occurred in the same answer.

        Repetitive text inflates acceptance.
        """
        seen = total = 0
        for answer in self.generations:
            grams = [tuple(answer.tokens[i : i + 4]) for i in range(len(answer.tokens) - 3)]
            seen, total = seen + len(grams) - len(set(grams)), total + len(grams)
        return seen / max(total, 1)


class CompileCounter:
    """Counts the programs that XLA compiles while this counter is active.

    Programs loaded from the compilation cache also count.
    """

    _listening: "CompileCounter | None" = None
    _registered = False

    def __init__(self) -> None:
        self.count = 0
        if not CompileCounter._registered:
            jax.monitoring.register_event_duration_secs_listener(CompileCounter._on_event)
            CompileCounter._registered = True

    @staticmethod
    def _on_event(event: str, duration_secs: float, **_: str | int) -> None:
        if CompileCounter._listening is not None and event.endswith("backend_compile_duration"):
            CompileCounter._listening.count += 1

    def __enter__(self) -> "CompileCounter":
        CompileCounter._listening = self
        return self

    def __exit__(self, *exception: object) -> None:
        CompileCounter._listening = None


@dataclass(frozen=True)
class System:
    """A way of decoding under its name in the report."""

    name: str  # "plain", "lookup", or the folder of the draft
    decoder: SpeculativeDecoder
    trained_tokens: int | None = None  # longest text, in tokens, that its draft was trained on


@dataclass(frozen=True)
class Bench:
    """The compared systems, and the settings that all of them share."""

    plain: System  # decoding without a draft
    speculative: tuple[System, ...]  # decoding with a draft
    tokenizer: PreTrainedTokenizerBase
    context: int  # cache slots of every decoder
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0

    @property
    def systems(self) -> tuple[System, ...]:
        """All systems, plain decoding first."""
        return (self.plain, *self.speculative)


class Measured(NamedTuple):
    """All answers of a measurement, with its compilations and the turns left out."""

    cases: list[Case]
    compiles: dict[
        str, int
    ]  # by system: programs compiled after warm-up; 0 if warm-up covered every shape
    left_out: dict[str, int]  # by suite: turns that did not fit the context
    missing: int = 0  # prompts that were not reached before an interrupt


def context_for(
    suites: Mapping[str, Sequence[Chat]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    most: int,
) -> int:
    """Returns the number of cache slots that all prompts and answers fit in, at most `most`.

    most: the target's own context. An answer that becomes part of a later prompt may be tokenized
    differently there; twice its tokens are reserved.
    """
    longest = max(
        _longest_prompt(chat, tokenizer, max_new_tokens)
        for chats in suites.values()
        for chat in chats
    )
    return min(longest + max_new_tokens, most)


def _longest_prompt(chat: Chat, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> int:
    messages = list(chat.messages)
    for text in chat.later:
        messages += _answered(".", text)
    return len(prompt_tokens(tokenizer, messages, chat.where)) + 2 * max_new_tokens * len(
        chat.later
    )


def _answered(answer: str, question: str) -> list[Message]:
    return [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]


def measure(
    bench: Bench, suites: Mapping[str, Sequence[Chat]], log: AnswerLog | None = None
) -> Measured:
    """Runs every system on every prompt, interleaved so that machine drift affects all alike.

    The prompt of a later turn contains the system's own answer to the turn before. Each system
    first answers a prompt of every padded length, so that compilation is not timed. Cases that are
    already in the log are not decoded again. Ctrl-C ends the measurement with the cases that are
    complete.
    """
    known = {} if log is None else log.cases
    waiting = [
        (name, number, chat)
        for name, chats in suites.items()
        for number, chat in enumerate(chats)
        if (name, number) not in known
    ]
    lengths = _prompts_to_come(bench, [chat for *_, chat in waiting])
    counters = {system.name: CompileCounter() for system in bench.systems}
    answered, order = dict(known), {name: number for number, name in enumerate(suites)}
    try:
        for system in tqdm(bench.systems, desc="compiling", unit="decoder", leave=False):
            system.decoder.warm_up(lengths, bench.sampling, max_new_tokens=bench.max_new_tokens)
        for name, number, chat in tqdm(waiting, desc="decoding", unit="prompt"):
            first_seed = bench.seed + _TURNS_PER_CASE * (number + 1_000_000 * order[name])
            turns = _turns(bench, chat, counters, first_seed)
            case = answered[name, number] = Case(name, number, chat.kind, turns)
            if log is not None:
                log.add(case)
    except KeyboardInterrupt:
        if not any(case.turns for case in answered.values()):
            raise
    reached = {
        name: {
            number: (chat, answered[name, number])
            for number, chat in enumerate(chats)
            if (name, number) in answered
        }
        for name, chats in suites.items()
    }
    left_out = {
        name: sum(1 + len(chat.later) - len(case.turns) for chat, case in entries.values())
        for name, entries in reached.items()
    }
    cases = [case for entries in reached.values() for _, case in entries.values() if case.turns]
    compiles = {name: counter.count for name, counter in counters.items()}
    missing = sum(map(len, suites.values())) - sum(map(len, reached.values()))
    return Measured(cases, compiles, left_out, missing)


def _prompts_to_come(bench: Bench, chats: Sequence[Chat]) -> list[list[int]]:
    """Returns prompts of every length that is compiled separately."""
    longest = bench.context - bench.max_new_tokens
    lengths = []
    for chat in chats:
        first = len(prompt_tokens(bench.tokenizer, chat.messages, chat.where))
        last = _longest_prompt(chat, bench.tokenizer, bench.max_new_tokens)
        lengths += [length for length in (*range(first, last, 64), last) if length <= longest]
    return [[0] * length for length in sorted(set(lengths))]


def timed(answers: Answers) -> TimedAnswer:
    """Returns the only answer of a call, with its times.

    Raises: UserError if the target produced non-finite values.
    """
    [answer] = answers
    if answer.finish == "error":
        raise UserError(NOT_FINITE)
    return TimedAnswer(
        **vars(answer),
        prefill_seconds=answers.prefill_seconds,
        decode_seconds=answers.decode_seconds,
    )


def _turns(
    bench: Bench, chat: Chat, counters: dict[str, CompileCounter], seed: int
) -> tuple[dict[str, Asked], ...]:
    """Decodes all turns of a chat that fit the context."""
    histories = {system.name: list(chat.messages) for system in bench.systems}
    turns: list[dict[str, Asked]] = []
    for question in (None, *chat.later):
        if question is not None:
            for name, entry in turns[-1].items():
                histories[name] += _answered(
                    entry.answer.text or ".", question
                )  # templates refuse an empty answer
        prompts = {
            name: prompt_tokens(bench.tokenizer, history, chat.where)
            for name, history in histories.items()
        }
        if max(map(len, prompts.values())) + bench.max_new_tokens > bench.context:
            break
        turn = {}
        for system in bench.systems:
            with counters[system.name]:
                answers = system.decoder.generate(
                    [prompts[system.name]],
                    bench.sampling,
                    max_new_tokens=bench.max_new_tokens,
                    seed=seed + len(turns),
                )
            turn[system.name] = Asked(prompts[system.name], timed(answers))
        turns.append(turn)
    return tuple(turns)

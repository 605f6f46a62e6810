"""The measurement: every way of decoding answers the same prompts in one process, turn by turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.data.chats import Chat, Message
from beagle_jax.data.template import prompt_tokens
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.requests import NOT_FINITE, Answers
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.errors import UserError
from beagle_jax.evaluation.answers import AnswerLog, Asked, Case, TimedAnswer

_TURNS_PER_CASE = 64  # seeds that lie between those of two cases


@dataclass
class Measurement:
    """Answers of one way of decoding (defined in method.md 7.1)."""

    name: str
    tree: str  # what was drafted per round
    cases: list[list[TimedAnswer]] = field(
        default_factory=list
    )  # of each prompt, the answers to its turns

    @cached_property
    def generations(self) -> list[TimedAnswer]:
        """All answers, in order."""
        return [answer for case in self.cases for answer in case]

    @property
    def tokens(self) -> int:
        """Tokens written, stop tokens included."""
        return sum(len(answer.tokens) for answer in self.generations)

    @property
    def rounds(self) -> int:
        """Rounds run; the prefill is in none."""
        return sum(answer.rounds for answer in self.generations)

    @property
    def tau(self) -> float:
        """Mean tokens per round over all rounds; 1 when there was none."""
        return (self.tokens - len(self.generations)) / self.rounds if self.rounds else 1.0

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all time, prefill included."""
        return self.tokens / sum(
            answer.prefill_seconds + answer.decode_seconds for answer in self.generations
        )

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the time after the prefill."""
        return (self.tokens - len(self.generations)) / sum(
            answer.decode_seconds for answer in self.generations
        )

    @property
    def accepted(self) -> list[int]:
        """Rounds that accepted 0, 1, .. P drafts, as far as they were emitted."""
        return np.sum([answer.accepted for answer in self.generations], axis=0).tolist()

    @property
    def step_alpha(self) -> list[float]:
        """Per draft depth: of the rounds that reached it, the share that accepted it."""
        reached = np.cumsum(self.accepted[::-1])[::-1]
        return [
            float(reached[depth + 1] / reached[depth]) if reached[depth] else 0.0
            for depth in range(len(reached) - 1)
        ]

    def identical_to(self, other: "Measurement") -> int:
        """Answers whose tokens are the same in both."""
        return sum(
            mine.tokens == theirs.tokens
            for mine, theirs in zip(self.generations, other.generations, strict=True)
        )

    @property
    def repeated_4_grams(self) -> float:
        """Share of 4-grams that occurred before in the same answer: loops flatter acceptance."""
        seen = total = 0
        for answer in self.generations:
            grams = [tuple(answer.tokens[i : i + 4]) for i in range(len(answer.tokens) - 3)]
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


@dataclass(frozen=True)
class Bench:
    """Ways of decoding that are compared, plain decoding first, and how all of them are asked."""

    decoders: dict[str, SpeculativeDecoder]
    tokenizer: PreTrainedTokenizerBase
    context: int  # of all decoders
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    trained_tokens: dict[str, int] = field(
        default_factory=dict
    )  # by system: longest text that its draft was trained on


class Measured(NamedTuple):
    """All answers, and what it took to get them."""

    cases: list[Case]
    compiles: dict[
        str, int
    ]  # by system: programs compiled after the warm-up; 0 when every shape was met before
    left_out: dict[str, int]  # by suite: turns that did not fit the context


def context_for(
    suites: Mapping[str, Sequence[Chat]], tokenizer, max_new_tokens: int, most: int
) -> int:
    """Tokens that prompts and answers will need together: one cache size for all; at most the
    target's own context.

    An answer that is written into a later prompt may take other tokens than it was made of; twice
    as many are allowed for.
    """
    longest = max(
        _longest_prompt(chat, tokenizer, max_new_tokens)
        for chats in suites.values()
        for chat in chats
    )
    return min(longest + max_new_tokens, most)


def _longest_prompt(chat: Chat, tokenizer, max_new_tokens: int) -> int:
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
    """Every decoder on every prompt, in turn, so that a drifting machine treats all alike.

    A later turn is asked after the decoder's own answer to the one before. Each decoder first
    answers one prompt of every padded length, so that compilation is not timed. Cases that the log
    has are not asked again.
    """
    known = {} if log is None else log.cases
    waiting = [
        (name, number, chat)
        for name, chats in suites.items()
        for number, chat in enumerate(chats)
        if (name, number) not in known
    ]
    lengths = _prompts_to_come(bench, [chat for *_, chat in waiting])
    for decoder in tqdm(bench.decoders.values(), desc="compiling", unit="decoder", leave=False):
        decoder.warm_up(lengths, bench.sampling, max_new_tokens=bench.max_new_tokens)
    counters = {name: CompileCounter() for name in bench.decoders}
    answered, order = dict(known), {name: number for number, name in enumerate(suites)}
    for name, number, chat in tqdm(waiting, desc="decoding", unit="prompt"):
        first_seed = bench.seed + _TURNS_PER_CASE * (number + 1_000_000 * order[name])
        case = answered[name, number] = Case(
            name, number, chat.kind, _turns(bench, chat, counters, first_seed)
        )
        if log is not None:
            log.add(case)
    left_out = {
        name: sum(
            1 + len(chat.later) - len(answered[name, number].turns)
            for number, chat in enumerate(chats)
        )
        for name, chats in suites.items()
    }
    cases = [
        answered[name, number]
        for name, chats in suites.items()
        for number in range(len(chats))
        if answered[name, number].turns
    ]
    return Measured(cases, {name: counter.count for name, counter in counters.items()}, left_out)


def _prompts_to_come(bench: Bench, chats: Sequence[Chat]) -> list[list[int]]:
    """A prompt of every length that may come, as far as lengths differ in what is compiled."""
    longest = bench.context - bench.max_new_tokens
    lengths = []
    for chat in chats:
        first = len(prompt_tokens(bench.tokenizer, chat.messages, chat.where))
        last = _longest_prompt(chat, bench.tokenizer, bench.max_new_tokens)
        lengths += [length for length in (*range(first, last, 64), last) if length <= longest]
    return [[0] * length for length in sorted(set(lengths))]


def timed(answers: Answers) -> TimedAnswer:
    """The one answer of a call, with its time. Raises UserError if the target broke down."""
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
    """All turns of a chat; those that do not fit the context are left out."""
    histories = {name: list(chat.messages) for name in bench.decoders}
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
        for name, decoder in bench.decoders.items():
            with counters[name]:
                answers = decoder.generate(
                    [prompts[name]],
                    bench.sampling,
                    max_new_tokens=bench.max_new_tokens,
                    seed=seed + len(turns),
                )
            turn[name] = Asked(prompts[name], timed(answers))
        turns.append(turn)
    return tuple(turns)

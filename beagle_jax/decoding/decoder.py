"""`SpeculativeDecoder`: prompts in; text, tokens and measurements out."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from jax.sharding import Mesh

from beagle_jax.config import Config, load_config
from beagle_jax.decoding.arguments import stop_strings, whole_number
from beagle_jax.decoding.drafter import Drafter
from beagle_jax.decoding.engine import peek, release
from beagle_jax.decoding.kinds import drafter_for
from beagle_jax.decoding.requests import (
    NOT_FINITE,
    Answer,
    Answers,
    Codec,
    Piece,
    Prompt,
    Request,
    prompts_of,
)
from beagle_jax.decoding.round import RULES, Round, TargetModel
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.session import Session, padded
from beagle_jax.decoding.state import DecodeState
from beagle_jax.decoding.tree import ROOT_ONLY, Tree
from beagle_jax.errors import UsageError, UserError
from beagle_jax.model.cache import round_up
from beagle_jax.sharding import place
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

_log = logging.getLogger(__name__)

CAPACITY_BUCKET = 128  # the number of cache slots is a multiple of this


class Stream:
    """Iterator over the text of one answer; `answer` is the whole answer."""

    def __init__(self, pieces: Iterator[Piece], session: Session) -> None:
        self._pieces, self._session = pieces, session
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            piece = next(self._pieces)
            self._answer = piece.answer
            if piece.text:
                return piece.text

    @property
    def answer(self) -> Answer:
        """The whole answer; reads the rest of the stream first."""
        for _ in self:
            pass
        assert self._answer is not None
        return self._answer

    @property
    def answers(self) -> Answers:
        """The whole answer, with the time that it took."""
        answer, session = self.answer, self._session
        return Answers((answer,), session.prefill_seconds, session.decode_seconds)


class SpeculativeDecoder:
    """Lossless decoding of a target, with a draft and a tree or plainly without a draft.

    Each combination of rows, padded prompt length, cache capacity and sampling filters compiles
    once; the compiled program is kept.

        decoder = SpeculativeDecoder(target, draft, chain(3))
        [answer] = decoder.generate(["Why is the sky blue?"])
        print(answer.text, answer.tau)
    """

    def __init__(
        self,
        target: Target,
        draft: Draft | Drafter | None = None,
        tree: Tree = ROOT_ONLY,
        *,
        context: int | None = None,
        append_predicted: bool = True,
        rule: Literal["match", "ratio"] = "match",
        mesh: Mesh | None = None,
    ) -> None:
        """Checks that the parts fit together. Nothing is compiled before the first call.

        draft: a trained draft, or a drafter of any kind. context: limit of a prompt and its answer
        together, in tokens; all caches then have this capacity. None: the limit is the target's
        own context, and caches have the largest capacity that a call has needed so far.
        append_predicted: predicted states become keys of deeper levels. rule: how drafts are
        accepted (`round.RULES`). mesh: the devices over which the target is sharded.

        Raises:
            UserError: Draft, tree, rule, context and target do not fit each other.
        """
        _check_parts(target, draft, tree, rule)
        if context is not None:
            context = whole_number("context", context, 1)
        params = place(target.params, mesh)
        drafter = drafter_for(
            draft if tree.depth else None, params, append_predicted=append_predicted, mesh=mesh
        )
        drafter.check(target.spec, tree, rule)
        if context is not None and not tree.depth + 1 < context <= target.spec.max_positions:
            raise UserError(
                f"a context of {context} tokens does not fit: the target's is "
                f"{target.spec.max_positions}, and a round of this tree adds up to "
                f"{tree.depth + 1}; choose a context of {tree.depth + 2} to "
                f"{target.spec.max_positions} tokens"
            )
        self._fixed = context is not None
        self._capacity = 0 if context is None else round_up(context + tree.depth + 1, 64)
        self._codec = Codec(
            target.tokenizer,
            target.eos_ids,
            target.spec.vocab_size,
            context or target.spec.max_positions,
        )
        self._round = Round(
            TargetModel(target.spec, params), drafter, tree, target.eos_ids, RULES[rule], mesh=mesh
        )

    @classmethod
    def from_config(cls, config: Config | str | Path, *overrides: str) -> "SpeculativeDecoder":
        """Loads the target and the draft of a config and returns their decoder.

            decoder = SpeculativeDecoder.from_config("configs/smollm2_135m.yaml")

        config: a YAML file, or a config from `load_config`. overrides: `section.key=value`, only
        for a file. `draft.path=plain` decodes without a draft.

        Raises:
            UserError: The config, the target or the draft cannot be used.
        """
        from beagle_jax.decoding.build import decoder_from  # imports this module

        if not isinstance(config, Config | str | Path):
            raise UsageError(
                f"config is {config!r:.80}; expected the path of a YAML file, or a Config"
            )
        if not isinstance(config, Config):
            config = load_config(config, overrides)
        elif overrides:
            raise UsageError(
                f"overrides {list(overrides)} cannot be applied to a Config object; give the "
                "path of the config file, or change the object with config.changed(..)"
            )
        return decoder_from(config)

    @property
    def tree(self) -> Tree:
        """The tree that each round drafts."""
        return self._round.tree

    def with_(self, **parts: Callable[..., Any]) -> Self:
        """Returns a decoder with parts of its rounds replaced (`Round.with_`)."""
        other = copy.copy(self)
        other._round = self._round.with_(**parts)
        return other

    def warm_up(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling = GREEDY,
        *,
        max_new_tokens: int = 128,
        batch: int = 1,
    ) -> None:
        """Compiles the programs for prompts of these lengths in `batch` rows."""
        batch = whole_number("batch", batch, 1)
        encoded = map(self._codec.encode, prompts_of(prompts))
        lengths = {padded(len(tokens)): tokens for tokens in encoded}
        requests = [Request(tokens, max_new_tokens, sampling) for tokens in lengths.values()]
        if requests:
            self._session(requests, batch)  # sets the capacity to that of the longest prompt
        for request in requests:
            # One request more than rows, so that a row is refilled; each answer has a round.
            short = [replace(request, max_new_tokens=2)] * (batch + (batch > 1))
            session = self._session(short, batch)
            state = session.first_state()
            peek(state), release(state, np.zeros(session.rows, bool))
            for _ in session:
                pass

    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling = GREEDY,
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
        batch: int | None = None,
    ) -> Answers:
        """Answers all prompts, in the order in which they were given.

        Prompt n draws with seed + n, so a prompt gets the same answer alone and in a batch. stop:
        an answer ends before the first of these strings. It also ends at the target's stop tokens,
        after max_new_tokens, where the context is full and, with a warning, where the target's
        logits are not finite. batch: number of rows; a finished row takes the next prompt. None:
        one row for each prompt.

        Raises:
            PromptError: A prompt is empty or not a prompt.
            ContextFull: A prompt leaves no room for an answer.
            UserError: A setting is out of range.
        """
        session = self.session(
            prompts, sampling, max_new_tokens=max_new_tokens, stop=stop, seed=seed, batch=batch
        )
        by_index = {piece.index: piece.answer for piece in session if piece.answer is not None}
        answers = tuple(by_index[index] for index in range(len(session.requests)))
        for index, answer in enumerate(answers):
            if answer.finish == "error":
                _log.warning("prompt %d: %s", index + 1, NOT_FINITE)
        return Answers(answers, session.prefill_seconds, session.decode_seconds)

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = GREEDY,
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Stream:
        """Yields the text of one answer, a few rounds at a time. See `generate` for arguments."""
        if self._codec.tokenizer is None:
            raise UserError(
                "this target has no tokenizer, so its answer cannot be streamed as text; use "
                "generate, which returns tokens"
            )
        stops = stop_strings(stop)
        request = Request(self._codec.encode(prompt), max_new_tokens, sampling, stops, seed)
        session = self._session([request], 1, streaming=True)
        return Stream(iter(session), session)

    def session(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling = GREEDY,
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int = 0,
        batch: int | None = None,
    ) -> Session:
        """Returns the session that `generate` runs; same arguments and errors."""
        stops, first = stop_strings(stop), whole_number("seed", seed)
        requests = [
            Request(self._codec.encode(prompt), max_new_tokens, sampling, stops, first + line)
            for line, prompt in enumerate(prompts_of(prompts))
        ]
        return self._session(requests, batch)

    def pieces(self, requests: Sequence[Request], batch: int) -> Iterator[Piece]:
        """Yields parts of all answers as they are decoded, in `batch` rows."""
        return iter(self._session(requests, batch, streaming=True))

    def prefilled(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling = GREEDY,
        *,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> tuple[Round, DecodeState]:
        """Returns a round and the state after the prompts, to measure or draw parts of it."""
        session = self.session(prompts, sampling, max_new_tokens=max_new_tokens, seed=seed)
        return session.now, session.first_state()

    def _session(
        self, requests: Sequence[Request], batch: int | None, *, streaming: bool = False
    ) -> Session:
        """Checks the settings. Raises UserError if one means nothing."""
        if not requests:
            raise UserError("there are no prompts; give at least one")
        if batch is not None:
            batch = whole_number("batch", batch, 1)
        requests = [request.check() for request in requests]
        if self._round.rule.draws and any(request.sampling.greedy for request in requests):
            raise UserError(
                "rule 'ratio' needs drawn drafts, but temperature is 0 (greedy); set a "
                "temperature, or use rule 'match'"
            )
        rows = min(batch or len(requests), len(requests))
        most = max(len(request.tokens) + request.max_new_tokens for request in requests)
        need = min(most, self._codec.context) + self.tree.depth + 1
        widest = padded(max(len(request.tokens) for request in requests))
        needed = 0 if self._fixed else round_up(need, CAPACITY_BUCKET)
        self._capacity = max(self._capacity, needed, widest)
        return Session(self._round, self._codec, requests, rows, self._capacity, streaming)


def _check_parts(target: object, draft: object, tree: object, rule: object) -> None:
    """Raises UserError if one of them is something else, such as the path of a draft."""
    if not isinstance(target, Target):
        raise UserError(f"target is {target!r:.80}; expected what load_target returns")
    if isinstance(draft, str | Path):
        raise UserError(f"draft is {draft!r:.80}; expected what load_draft returns, or None")
    if not isinstance(tree, Tree):
        raise UserError(
            f"tree is {tree!r:.80}; expected chain(..), static_tree(..), dynamic_tree(..) or "
            "ROOT_ONLY"
        )
    if rule not in RULES:
        raise UserError(f"rule is {rule!r:.80}; expected one of {', '.join(RULES)}")

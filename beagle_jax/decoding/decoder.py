"""The decoder that everything else calls: prompts in, text, tokens and measurements out."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from jax.sharding import Mesh

from beagle_jax.config import Config, load_config
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

CAPACITY_BUCKET = 128  # caches have a multiple of so many slots


class Stream:
    """The text of an answer as it comes; `answer` is the whole, once the text has ended."""

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
        """The whole answer. Reads the rest of the stream."""
        for _ in self:
            pass
        assert self._answer is not None
        return self._answer

    @property
    def answers(self) -> Answers:
        """The answer with its time."""
        answer, session = self.answer, self._session
        return Answers((answer,), session.prefill_seconds, session.decode_seconds)


class SpeculativeDecoder:
    """Lossless decoding of a target with a draft and a tree, or plainly without a draft.

    A program is compiled once for each (rows, padded prompt length, capacity, filters of sampling)
    and then kept.

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
        """Sets up the programs; compiles nothing yet.

        draft: a trained draft, or a drafter of any kind. context: most tokens that a prompt and its
        answer may have together, and then the one capacity of the caches; None: the target's own
        context, and the largest capacity that a call has needed so far. append_predicted: predicted
        states become keys of the levels below. rule: how drafts are accepted (`round.RULES`). mesh:
        the devices that share the target.

        Raises:
            UserError: Draft, tree, rule, context and target do not fit each other.
        """
        params = place(target.params, mesh)
        drafter = drafter_for(
            draft if tree.depth else None, params, append_predicted=append_predicted, mesh=mesh
        )
        drafter.check(target.spec, tree, rule)
        if context is not None and not tree.depth + 1 < context <= target.spec.max_positions:
            raise UserError(
                f"a context of {context} tokens does not fit: the target's is "
                f"{target.spec.max_positions}, and a round of this tree adds up to "
                f"{tree.depth + 1}; choose one between"
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
        """The decoder that a config asks for, with its target and draft loaded.

            decoder = SpeculativeDecoder.from_config("configs/smollm2_135m.yaml")

        config: a YAML file, or what `load_config` gave. overrides: `section.key=value`, of a file.
        `draft.path=plain` decodes without a draft.

        Raises:
            UserError: The config, the target or the draft cannot be used.
        """
        from beagle_jax.decoding.build import decoder_from  # it builds decoders

        if not isinstance(config, Config):
            config = load_config(config, overrides)
        elif overrides:
            raise UsageError(
                f"overrides {list(overrides)} were given with a config that is built already; "
                "give the file, or config.changed(..)"
            )
        return decoder_from(config)

    @property
    def tree(self) -> Tree:
        """What is drafted per round."""
        return self._round.tree

    def with_(self, **parts: Callable[..., Any]) -> Self:
        """A decoder with parts of its rounds replaced (`Round.with_`)."""
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
        """Compiles what answering prompts of these lengths in `batch` rows will need."""
        lengths = {padded(len(tokens)): tokens for tokens in map(self._codec.encode, prompts)}
        requests = [Request(tokens, max_new_tokens, sampling) for tokens in lengths.values()]
        if requests:
            self._session(requests, batch)  # the capacity is that of the longest
        for request in requests:
            # One more than there are rows, so that one is refilled; each with a round.
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
        """Answers all prompts. Prompt n draws with seed + n, so a batch repeats what each would get
        alone.

        stop: an answer ends before the first of these strings. It ends also at the target's stop
        tokens, after max_new_tokens, where the context is full, and with a warning where the
        target's logits are not finite. batch: rows that run at once, a finished one taking the next
        prompt; None: a row for each prompt.

        Raises:
            PromptError: A prompt is empty or not a prompt.
            ContextFull: A prompt leaves no room for an answer.
            UserError: A setting means nothing.
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
        """The text of an answer as it comes, a few rounds at a time. Takes what `generate`
        takes.
        """
        if self._codec.tokenizer is None:
            raise UserError(
                "this target has no tokenizer, so there is no text to stream; use generate"
            )
        request = Request(self._codec.encode(prompt), max_new_tokens, sampling, tuple(stop), seed)
        session = self._session([request], 1, stop, streaming=True)
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
        """What `generate` runs. Takes and raises what it does."""
        requests = [
            Request(self._codec.encode(prompt), max_new_tokens, sampling, tuple(stop), seed + line)
            for line, prompt in enumerate(prompts_of(prompts))
        ]
        return self._session(requests, batch, stop)

    def pieces(self, requests: Sequence[Request], batch: int) -> Iterator[Piece]:
        """Parts of all answers as they come, over `batch` rows."""
        return iter(self._session(requests, batch, streaming=True))

    def prefilled(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling = GREEDY,
        *,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> tuple[Round, DecodeState]:
        """A round, and the state after the prompts: to measure parts of a round, or to draw one."""
        session = self.session(prompts, sampling, max_new_tokens=max_new_tokens, seed=seed)
        return session.now, session.first_state()

    def _session(
        self,
        requests: Sequence[Request],
        batch: int | None,
        stop: Sequence[str] = (),
        *,
        streaming: bool = False,
    ) -> Session:
        """Raises UserError for settings that mean nothing."""
        self._codec.stream(stop)  # before its letters are taken for strings
        if not requests:
            raise UserError("there are no prompts; give at least one")
        if batch is not None and batch < 1:
            raise UserError(f"batch is {batch}; expected at least 1 row")
        for request in requests:
            if request.max_new_tokens < 1:
                raise UserError(f"max_new_tokens is {request.max_new_tokens}; expected at least 1")
            if self._round.rule.draws and request.sampling.check().greedy:
                raise UserError(
                    "rule 'ratio' accepts drafts that were drawn; set a temperature, or use rule "
                    "'match'"
                )
            request.sampling.check()
        rows = min(batch or len(requests), len(requests))
        most = max(len(request.tokens) + request.max_new_tokens for request in requests)
        need = min(most, self._codec.context) + self.tree.depth + 1
        widest = padded(max(len(request.tokens) for request in requests))
        needed = 0 if self._fixed else round_up(need, CAPACITY_BUCKET)
        self._capacity = max(self._capacity, needed, widest)
        return Session(self._round, self._codec, requests, rows, self._capacity, streaming)

"""`SpeculativeDecoder`: prompts in; text, tokens and measurements out."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, Unpack, overload
from weakref import WeakSet

import numpy as np
from jax.sharding import Mesh

from beagle_jax.config import Config, DecodeConfig, load_config
from beagle_jax.decoding.arguments import whole_number
from beagle_jax.decoding.batch import Batch, each_sampling
from beagle_jax.decoding.conversation import Conversation
from beagle_jax.decoding.drafter import Drafter
from beagle_jax.decoding.engine import peek, release
from beagle_jax.decoding.kinds import drafter_for
from beagle_jax.decoding.programs import filters_for, filters_for_all
from beagle_jax.decoding.requests import (
    Answer,
    Answers,
    Codec,
    Options,
    Piece,
    Prompt,
    Request,
    prompts_of,
)
from beagle_jax.decoding.round import Round, TargetModel
from beagle_jax.decoding.rules import RULES
from beagle_jax.decoding.sampling import GREEDY, Filters, Sampling
from beagle_jax.decoding.session import (
    CAPACITY_BUCKET,
    Earlier,
    Session,
    padded,
    slots,
)
from beagle_jax.decoding.state import DecodeState
from beagle_jax.decoding.stream import Stream
from beagle_jax.decoding.tree import ROOT_ONLY, Tree, tree_of
from beagle_jax.errors import UsageError, UserError
from beagle_jax.model.cache import round_up
from beagle_jax.model.joined import heads_apart
from beagle_jax.sharding import (
    check_split,
    decoding_mesh,
    decoding_parts,
    place,
    splits_heads,
    with_experts,
)
from beagle_jax.weights.draft import Draft, DraftFiles
from beagle_jax.weights.target import Target

_log = logging.getLogger(__name__)

COMPLETING_ROWS = 8  # of `generate(.., as_completed=True)`
_FITTING: Any = object()  # stands for the tree that fits what is drafted with


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
        draft: Draft | DraftFiles | Drafter | None = None,
        tree: Tree = _FITTING,
        *,
        context: int | None = None,
        append_predicted: bool = True,
        rule: Literal["match", "ratio"] = "match",
        mesh: Mesh | None = None,
    ) -> None:
        """Checks that the parts fit together. Nothing is compiled before the first call.

        draft: what `load_draft` returns, or a drafter of any kind. tree: left out, the default of
        the settings (`decode.tree`) with a draft, and plain decoding without one. context: limit of
        a prompt and its answer together, in tokens; all caches then have this capacity. None: the
        limit is the target's own context, and caches have the largest capacity that a call has
        needed so far. Capacities are multiples of 128 slots, with room for a round's drafts.
        append_predicted: predicted states become keys of deeper levels. rule: how drafts are
        accepted (`rules.RULES`). mesh: the devices over which target, draft and rows are split.

        Raises:
            UserError: Draft, tree, rule, context and target do not fit each other.
        """
        if tree is _FITTING:
            tree = ROOT_ONLY if draft is None else tree_of(DecodeConfig())
        _check_parts(target, draft, tree, rule)
        if isinstance(draft, DraftFiles):
            draft = draft.read(target)
        if context is not None:
            context = whole_number("context", context, 1)
        mesh = None if mesh is None else _checked_mesh(mesh, target)
        whole_heads = splits_heads(mesh, target.spec.num_kv_heads)
        params = place(target.params if whole_heads else heads_apart(target.params), mesh)
        model = TargetModel(with_experts(target.spec, mesh), params)
        drafter = drafter_for(draft, params, tree, append_predicted=append_predicted, mesh=mesh)
        drafter.check(target.spec, tree, rule)
        if context is not None and not tree.depth + 1 < context <= target.spec.max_positions:
            raise UserError(
                f"a context of {context} tokens does not fit: the target's is "
                f"{target.spec.max_positions}, and a round of this tree adds up to "
                f"{tree.depth + 1}; choose a context of {tree.depth + 2} to "
                f"{target.spec.max_positions} tokens"
            )
        self._fixed, self._row_parts = context is not None, decoding_parts(mesh)
        self._conversations: WeakSet[Conversation] = WeakSet()
        self._capacity = 0
        if context is not None:
            self._capacity = round_up(context + tree.depth + 1, CAPACITY_BUCKET)
        self._codec = Codec(
            target.tokenizer,
            target.eos_ids,
            target.spec.vocab_size,
            context or target.spec.max_positions,
        )
        self._round = Round(model, drafter, tree, target.eos_ids, RULES[rule], mesh=mesh)

    @classmethod
    def from_config(cls, config: Config | str | Path, *overrides: str) -> "SpeculativeDecoder":
        """Loads the target and the draft of a config and returns their decoder.

            decoder = SpeculativeDecoder.from_config("smollm2_135m")

        config: a YAML file, the name of a config that comes with the package, or a config from
        `load_config`. overrides: `section.key=value`, for a file or a name. `draft.path=plain`
        decodes without a draft.

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

    @property
    def capacity(self) -> int:
        """Slots of a row: those of its `context`, or the most that a call has needed so far."""
        return self._capacity

    @property
    def mesh(self) -> Mesh | None:
        """The devices of this decoder; None for one."""
        return self._round.mesh

    def with_(self, **parts: Callable[..., Any]) -> Self:
        """Returns a decoder with parts of its rounds replaced (`Round.with_`)."""
        other = copy.copy(self)
        other._round = self._round.with_(**parts)
        other._conversations = WeakSet()
        return other

    def warm_up(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling = GREEDY,
        *,
        batch: int = 1,
        **options: Unpack[Options],
    ) -> None:
        """Compiles the programs for prompts of these lengths in `batch` rows."""
        batch = whole_number("batch", batch, 1)
        made = Batch(self._codec, sampling, 1, options)
        encoded = map(made.encode, prompts_of(prompts))
        lengths = {padded(len(tokens)): tokens for tokens in encoded}
        requests = self._requests(lengths.values(), sampling, options)
        if requests:
            self._session(requests, batch)  # sets the capacity to that of the longest prompt
        for request in requests:
            # One more than there are rows, so that one is refilled; each with a round.
            brief = replace(
                request, max_new_tokens=2, min_new_tokens=min(2, request.min_new_tokens)
            )
            short = [brief] * (batch + (batch > 1))
            session = self._session(short, batch)
            state = session.first_state()
            peek(state, logprobs=session.now.filters.logprobs is not None)
            release(state, np.zeros(session.rows, bool))
            for _ in session:
                pass

    @overload
    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling | Sequence[Sampling] = ...,
        *,
        n: int = ...,
        batch: int | None = ...,
        as_completed: Literal[False] = ...,
        **options: Unpack[Options],
    ) -> Answers: ...
    @overload
    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling = ...,
        *,
        n: int = ...,
        batch: int | None = ...,
        as_completed: Literal[True],
        **options: Unpack[Options],
    ) -> Iterator[tuple[int, Answer]]: ...
    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        n: int = 1,
        batch: int | None = None,
        as_completed: bool = False,
        **options: Unpack[Options],
    ) -> Answers | Iterator[tuple[int, Answer]]:
        """Answers all prompts, in the order in which they were given.

        Prompt n draws with seed + n, so a prompt gets the same answer alone and in a batch. An
        answer ends at the target's end tokens, after `max_new_tokens`, where the context is full,
        before a string of `stop`, and with a warning where the target's logits are not finite.
        options: fields of `Request`, and how prompts become tokens (`Options`): `raw=True` for text
        without the chat template, and `template_variables`.

        sampling: of all prompts, or one for each. n: answers to each prompt, one after the other
        in the result. batch: rows that run at once, a finished one taking the next prompt; None: a
        row for each prompt. as_completed: returns an iterator of (place, answer) instead, in the
        order in which answers end; prompts, of a generator too, are taken as rows become free
        (8 rows if batch is None).

        A prompt that cannot be answered fails alone: its answer's `finish` is "error", and `error`
        says why.

        Raises:
            PromptError: No prompt can be answered: each is empty, no prompt, or too long.
            UserError: A setting means nothing.
        """
        if as_completed:
            return self._completed(prompts, sampling, n, batch or COMPLETING_ROWS, options)
        samplings = each_sampling(sampling)
        made = Batch(self._codec, samplings, n, options)
        listed = list(prompts_of(prompts))
        if not listed:
            raise UserError("there are no prompts; give at least one")
        if isinstance(samplings, list) and len(samplings) != len(listed):
            raise UserError(
                f"{len(samplings)} samplings were given for {len(listed)} prompts; give one for "
                "all, or one for each"
            )
        requests = list(made.requests(listed))
        if len(made.failed) == len(listed):
            raise made.failed[0]
        session = self._session(requests, batch)
        by_place = dict(made.answers(session))
        answers = tuple(by_place[index] for index in range(len(listed) * n))
        for index, answer in enumerate(answers):
            if answer.finish == "error":
                _log.warning("prompt %d: %s", index // n + 1, answer.error)
        return Answers(answers, session.prefill_seconds, session.decode_seconds)

    def _completed(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling | Sequence[Sampling],
        n: int,
        batch: int,
        options: Options,
    ) -> Iterator[tuple[int, Answer]]:
        """Places and answers as they end; prompts are taken one by one as rows become free."""
        if not isinstance(sampling, Sampling):
            raise UserError("as_completed takes one sampling for all prompts")
        made = Batch(self._codec, sampling, n, options)
        if isinstance(prompts, (str, Mapping)):
            prompts = prompts_of(prompts)
        common = next(Batch(self._codec, sampling, 1, options).requests([[0]]))
        self._check_rule([common])
        now = replace(self._round, filters=filters_for([common], self._codec.eos_ids))
        capacity = max(self._capacity, CAPACITY_BUCKET)
        batch = round_up(batch, self._row_parts)
        session = Session(now, self._codec, made.requests(prompts), batch, capacity)
        return made.answers(session)

    def stream(
        self, prompt: Prompt, sampling: Sampling = GREEDY, **options: Unpack[Options]
    ) -> Stream:
        """Yields the text of one answer, a few rounds at a time. See `generate` for arguments."""
        if self._codec.tokenizer is None:
            raise UserError(
                "this target has no tokenizer, so its answer cannot be streamed as text; use "
                "generate, which returns tokens"
            )
        session = self._session(self._requests([prompt], sampling, options), 1, streaming=True)
        return Stream(iter(session), session)

    def conversation(self, messages: Sequence[Mapping[str, str]] = ()) -> Conversation:
        """Begins a chat that keeps its caches between turns.

        messages: what was said before, such as a system text. Conversations of one decoder that
        begin alike read the beginning once.
        """
        chat = Conversation(self, messages, self._conversations)
        self._conversations.add(chat)
        return chat

    def request(self, prompt: Prompt, sampling: Sampling, options: Options) -> Request:
        """Returns a prompt's request. Raises PromptError if it cannot be answered."""
        [request] = self._requests([prompt], sampling, options)
        return request

    def resumed(
        self, request: Request, earlier: Earlier | None, *, drafted: bool = False
    ) -> Session:
        """A session of one request, which goes on from the caches of an earlier one.

        drafted: its pieces report the tree of their last round, and are of one round each.
        """
        session = self._session([request], 1, streaming=True, earlier=earlier)
        if drafted:
            filters = session.now.filters._replace(drafted=self.tree.size)
            session.now, session.rounds_per_look = replace(session.now, filters=filters), 1
        return session

    def session(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling = GREEDY,
        *,
        batch: int | None = None,
        **options: Unpack[Options],
    ) -> Session:
        """What `generate` runs. Takes and raises what it does; a bad prompt ends the call."""
        return self._session(self._requests(prompts_of(prompts), sampling, options), batch)

    def pieces(self, requests: Sequence[Request], batch: int) -> Iterator[Piece]:
        """Yields parts of all answers as they are decoded, in `batch` rows."""
        requests = [self._codec.checked(request) for request in requests]
        return iter(self._session(requests, batch, streaming=True))

    def prefilled(
        self,
        prompts: Iterable[Prompt],
        sampling: Sampling = GREEDY,
        **options: Unpack[Options],
    ) -> tuple[Round, DecodeState]:
        """A round, and the state after the prompts: to measure parts of a round, or to draw one."""
        session = self.session(prompts, sampling, **options)
        return session.now, session.first_state()

    @property
    def codec(self) -> Codec:
        """Converts prompts to tokens and tokens to text."""
        return self._codec

    def checked(self, request: Request) -> Request:
        """Returns a request with Python's numbers. Raises UserError if it cannot be answered."""
        request = self._codec.checked(request)
        self._check_rule([request])
        return request

    def live(
        self,
        source: Iterator[Request | None],
        rows: int,
        filters: Filters | None = None,
        *,
        rounds_per_look: int = 1,
    ) -> Session:
        """A session over requests that come while it runs; only for decoders with a `context`.

        source: see `Session`; its requests come from `checked`. filters: cover all of them; None:
        any request is answered, by a few programs that all run on one state (`programs`).
        rounds_per_look: rounds between two pieces of an answer.
        """
        if rows % self._row_parts:
            raise UserError(
                f"{rows} rows cannot be split over mesh.data={self._row_parts}; choose a multiple "
                "of it"
            )
        nodes = self.tree.size if self.tree.depth else 0
        programs = (filters,) if filters else filters_for_all(self._codec.eos_ids, nodes)
        return Session(
            replace(self._round, filters=programs[-1]),
            self._codec,
            source,
            rows,
            self._capacity,  # the longest request fits, so that none enlarges the caches
            streaming=True,
            rounds_per_look=rounds_per_look,
            wide_start=False,
            programs=programs,
        )

    def _requests(
        self, prompts: Iterable[Prompt], sampling: Sampling, options: Options
    ) -> list[Request]:
        """The requests of a call. Raises PromptError for the first bad prompt."""
        made = Batch(self._codec, sampling, 1, options)
        requests = list(made.requests(prompts))
        for error in made.failed.values():
            raise error
        return requests

    def _session(
        self,
        requests: Sequence[Request],
        batch: int | None,
        *,
        streaming: bool = False,
        earlier: Earlier | None = None,
    ) -> Session:
        """A session over requests from `Codec.checked`. Raises UserError if there are none."""
        if not requests:
            raise UserError("there are no prompts; give at least one")
        if batch is not None:
            batch = whole_number("batch", batch, 1)
        self._check_rule(requests)
        rows = round_up(min(batch or len(requests), len(requests)), self._row_parts)
        overhang = self.tree.depth + 1
        if not self._fixed:
            needs = (slots(request, self._codec.context, overhang) for request in requests)
            self._capacity = max(self._capacity, *needs)
        now = replace(self._round, filters=filters_for(requests, self._codec.eos_ids))
        capacity = self._capacity
        if earlier is not None:  # its slots, and room for the padded rest
            rest = padded(len(requests[0].tokens) - earlier.start)
            capacity = max(capacity, earlier.slots, round_up(earlier.start + rest, CAPACITY_BUCKET))
        return Session(now, self._codec, requests, rows, capacity, streaming, earlier=earlier)

    def _check_rule(self, requests: Sequence[Request]) -> None:
        if self._round.rule.draws and any(request.sampling.greedy for request in requests):
            raise UserError(
                "rule 'ratio' needs drawn drafts, but temperature is 0 (greedy); set a "
                "temperature, or use rule 'match'"
            )


def _checked_mesh(mesh: Mesh, target: Target) -> Mesh:
    """Returns the mesh for a target's KV heads. Raises UserError if it cannot be split so."""
    if target.quantised is not None:
        raise UserError(
            "a quantised target is for one device, but a mesh was given; set target.quantize=none, "
            "or leave the mesh out"
        )
    spec = target.spec
    widths = (spec.num_heads * spec.head_dim, spec.intermediate_size, spec.vocab_size)
    check_split(mesh, widths, spec.hidden_size)
    return decoding_mesh(mesh, spec.num_kv_heads)


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

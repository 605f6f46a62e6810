"""One round of decoding: propose a tree, read it, accept a path, append its rows.

Plain decoding is the same round with the tree of the root alone. A `Round` holds everything that a
round reads except the state: weights are its leaves, the rest is static, so that `jit` compiles
once for each shape. `with_` replaces a part by another function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from beagle_jax.arrays import AnyArray
from beagle_jax.decoding.accept import Accepted
from beagle_jax.decoding.drafter import Drafter, Draw, Known, NoDrafter, Proposal, Seen
from beagle_jax.decoding.logprobs import written_at
from beagle_jax.decoding.nodes import Nodes
from beagle_jax.decoding.penalties import (
    History,
    edited,
    history_of_prompt,
    history_with,
    no_history,
)
from beagle_jax.decoding.rules import FOR_DRAFT, FOR_TARGET, RULES, Rule
from beagle_jax.decoding.sampling import (
    Filters,
    choose,
    is_stop,
    place_keys,
)
from beagle_jax.decoding.state import DecodeState, Drafted, Requests, constrained, idle
from beagle_jax.decoding.top_k import split
from beagle_jax.decoding.tree import ROOT_ONLY, Tree
from beagle_jax.model.cache import KVCache, KVRows, repeated, take_rows
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import (
    Forward,
    Params,
    TargetSpec,
    best_tokens,
    forward,
    init_cache,
    logits,
)

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TargetModel:
    """The weights of a target and their static description."""

    spec: TargetSpec = field(metadata=_STATIC)
    params: Params


class Chunk(NamedTuple):
    """A chunk of R right-padded prompts: T tokens from position `offset` on.

    A prompt may be in it twice, for the same row of the batch.
    """

    row_R: AnyArray  # row of the batch for each prompt
    token_RT: AnyArray
    offset: AnyArray
    length_R: AnyArray  # of the whole prompts
    requests: Requests


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Round:
    """Everything that a round reads except the state.

    A replaced part gets the round as its first argument: `round.with_(accept=f)` calls `f(round,
    state, proposal, states)` instead of `Round.accept`. It compiles to a program of its own.
    """

    target: TargetModel
    drafter: Drafter
    tree: Tree = field(metadata=_STATIC)
    eos_ids: tuple[int, ...] = field(metadata=_STATIC)
    rule: Rule = field(metadata=_STATIC, default=RULES["match"])
    filters: Filters = field(metadata=_STATIC, default=Filters())
    mesh: Mesh | None = field(metadata=_STATIC, default=None)
    parts: tuple[tuple[str, Callable[..., Any]], ...] = field(metadata=_STATIC, default=())

    def with_(self, **parts: Callable[..., Any]) -> Self:
        """Returns the round with some of its parts replaced.

        Parts: read_chunk, propose, read, accept, append, emit, edit and keys.
        """
        return replace(self, parts=tuple(sorted({**dict(self.parts), **parts}.items())))

    @property
    def reading(self) -> Self:
        """The round for reading prompts, which compiles once for all trees and rules."""
        parts = tuple(part for part in self.parts if part[0] in ("read_chunk", "edit", "keys"))
        return replace(self, tree=ROOT_ONLY, rule=RULES["match"], parts=parts)

    @property
    def plain(self) -> Self:
        """The round without drafts. It also runs on the states of the round with drafts."""
        plain = replace(self, drafter=NoDrafter(), tree=ROOT_ONLY, rule=RULES["match"])
        return replace(plain, filters=self.filters._replace(drafted=0))

    def empty(self, batch: int, capacity: int) -> DecodeState:
        """Returns a state without requests. capacity: slots for a text and a round's drafts."""
        dtype = self.target.params["embed_VD"].dtype
        layers = init_cache(self.target.spec, batch, capacity, dtype)
        cache = KVCache(layers, jnp.zeros(batch, jnp.int32))
        draft = self.drafter.init(batch, capacity)
        state = idle(cache, draft, batch, capacity, self.filters, self.target.spec.vocab_size)
        return constrained(state, self.mesh)

    @split
    def run(self, state: DecodeState) -> tuple[DecodeState, jax.Array]:
        """Runs one round of every row. Also returns the target's states [B, W, D] of the nodes.

        Finished rows are computed too, but their answers do not change.
        """
        with jax.named_scope("draft"):
            proposal = self.part("propose")(self, state)
        with jax.named_scope("verify"):
            output = self.part("read")(self, state, proposal.nodes)
        with jax.named_scope("accept"):
            accepted, finite_BW = self.part("accept")(self, state, proposal, output.states_BTD)
        with jax.named_scope("append"):
            state = self.part("append")(self, state, accepted, output)
            if self.filters.logprobs is not None:
                state = self._with_logprobs(state, accepted, output.states_BTD)
            if self.filters.drafted:
                state = _with_drafted(state, proposal.nodes, accepted)
        return self.part("emit")(self, state, accepted, finite_BW), output.states_BTD

    @split
    def propose(self, state: DecodeState) -> Proposal:
        """Drafts the tree of this round."""
        draw = None
        if self.rule.draws:
            place_BP = state.transcript.count_B[:, None] + jnp.arange(self.tree.depth)[None]
            key_BP = self.part("keys")(self, state.requests.key_B, place_BP, FOR_DRAFT)
            draw = Draw(key_BP, state.requests.knobs, self.filters)
        known = Known(state.transcript.root_B, state.cache.length_B)
        return self.drafter.propose(state.draft, known, self.tree, draw)

    def read(self, state: DecodeState, nodes: Nodes) -> Forward:
        """Runs the target over the tree: the pass that verifies the drafts.

        Returns its states of the nodes [B, W, D], their key/value rows, and what the drafter taps.
        """
        cache = state.cache
        positions_BW = cache.length_B[:, None] + nodes.depth_BW
        target = self.target
        return forward(
            target.params,
            target.spec,
            nodes.token_BW,
            positions_BW,
            nodes.above_BWW,
            cache.layers,
            cache.visible(),
            cache.positions(),
            taps=self.drafter.taps,
        )

    @split
    def accept(
        self, state: DecodeState, proposal: Proposal, states_BWD: jax.Array
    ) -> tuple[Accepted, jax.Array]:
        """Lets the rule decide: what `accept.py` computes, and whether logits are finite [B, W]."""
        return self.rule.accept(self, state, proposal, states_BWD)

    def append(self, state: DecodeState, accepted: Accepted, output: Forward) -> DecodeState:
        """Appends the accepted path to the cache, and passes its true states to the drafter.

        The cache gets rows of this path only; entries after it are overwritten by the next round.
        """
        path_BP1 = accepted.path_BP1

        def on_path(x_BWI: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x_BWI, path_BP1[..., None], axis=1)

        rows, tapped_BWI = output.rows, output.tapped_BTI
        if self.tree.depth:
            rows = [take_rows(layer, path_BP1) for layer in rows]
        cache = state.cache.append(rows, accepted.bonus_B)
        # bonus_B < 0 never holds. It makes this write depend on the accepted tokens, so that XLA
        # orders it after all reads of the drafter's state and can update that state in place.
        start_B = jnp.where(accepted.bonus_B < 0, 0, state.cache.length_B)
        tokens_BP2 = jnp.concatenate([state.transcript.root_B[:, None], accepted.token_BP1], axis=1)
        seen = Seen(
            on_path(output.states_BTD),
            tokens_BP2[:, :-1],
            accepted.token_BP1,
            start_B,
            jnp.where(state.transcript.done_B, 0, accepted.count_B + 1),
            tapped_BTI=None if tapped_BWI is None else on_path(tapped_BWI),
        )
        return state._replace(cache=cache, draft=self.drafter.observe(state.draft, seen))

    def emit(self, state: DecodeState, accepted: Accepted, finite_BW: jax.Array) -> DecodeState:
        """Writes the tokens of the round, up to the first stop token and the limit.

        If the logits of a node on the accepted path are not finite, the answer ends as broken. The
        tokens before that node are kept.
        """
        now, stats, (B, P1) = state.transcript, state.stats, accepted.token_BP1.shape
        row_B, step_1P = jnp.arange(B), jnp.arange(P1)[None]
        on_path_BP = step_1P <= accepted.count_B[:, None]
        finite_BP = jnp.take_along_axis(finite_BW, accepted.path_BP1, axis=1)
        sound_B = jnp.cumprod(finite_BP & on_path_BP, axis=1).sum(axis=1)
        stop_BP = self._is_stop(state.requests, accepted.token_BP1) & (step_1P < sound_B[:, None])
        to_stop_B = jnp.where(stop_BP.any(axis=1), jnp.argmax(stop_BP, axis=1) + 1, sound_B)
        live_B = ~now.done_B
        left_B = state.requests.limit_B - now.count_B
        emitted_B = jnp.where(live_B, jnp.minimum(to_stop_B, left_B), 0)
        stopped_B = (stop_BP & (step_1P < emitted_B[:, None])).any(axis=1)
        count_B = now.count_B + emitted_B
        full_B = count_B >= state.requests.limit_B
        broken_B = live_B & (sound_B <= accepted.count_B) & ~stopped_B & ~full_B
        capacity = now.out_BS.shape[1]  # an index past the end is dropped
        column_BP = jnp.where(
            step_1P < emitted_B[:, None], now.count_B[:, None] + step_1P, capacity
        )
        counted_B = live_B & (emitted_B > 0)  # a round that breaks at its root does not count
        round_B = jnp.where(counted_B, stats.rounds_B, capacity)
        length_B = state.cache.length_B + jnp.where(live_B, accepted.count_B + 1, 0)
        out_BS = now.out_BS.at[row_B[:, None], column_BP].set(accepted.token_BP1, mode="drop")
        accepted_B = jnp.minimum(accepted.count_B, emitted_B)
        if self.filters.penalties:
            assert state.history is not None
            history = history_with(state.history, accepted.token_BP1, emitted_B)
            state = state._replace(history=history)
        return state._replace(
            cache=state.cache.with_(length_B=length_B),
            transcript=now._replace(
                root_B=jnp.where(live_B, accepted.bonus_B, now.root_B),
                out_BS=out_BS,
                count_B=count_B,
                done_B=now.done_B | stopped_B | full_B | broken_B,
                broken_B=now.broken_B | broken_B,
            ),
            stats=stats._replace(
                rounds_B=stats.rounds_B + counted_B,
                passes_B=stats.passes_B + 1,
                accepted_BS=stats.accepted_BS.at[row_B, round_B].set(accepted_B, mode="drop"),
            ),
        )

    def choose(
        self,
        requests: Requests,
        states_BWD: jax.Array,
        place_BW: jax.Array,
        history: History | None = None,
        nodes: Nodes | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the target's next token after each state, and whether its logits are finite.

        The token is the most likely one, or drawn with the noise of its position in the answer.
        history, nodes: the text before each state, for penalties.
        """
        params, spec = self.target.params, self.target.spec
        if not (self.filters.drawn or self.filters.edits):
            return best_tokens(params, states_BWD)
        raw_BWV = logits(params, spec, states_BWD)
        finite_BW = jnp.isfinite(raw_BWV.max(axis=-1))
        edited_BWV = self.part("edit")(self, requests, raw_BWV, place_BW, history, nodes)
        if not self.filters.drawn:
            return edited_BWV.argmax(axis=-1).astype(jnp.int32), finite_BW
        key_BW = self.part("keys")(self, requests.key_B, place_BW, FOR_TARGET)
        return choose(edited_BWV, key_BW, requests.knobs, self.filters), finite_BW

    def edit(
        self,
        requests: Requests,
        raw_BWV: jax.Array,
        place_BW: jax.Array,
        history: History | None,
        nodes: Nodes | None,
    ) -> jax.Array:
        """The target's logits with each request's bias, penalties and minimum length."""
        return edited(
            raw_BWV,
            place_BW,
            requests.knobs,
            self.filters,
            ends=requests.ends,
            history=history,
            nodes=nodes,
        )

    def _is_stop(self, requests: Requests, token_BT: jax.Array) -> jax.Array:
        """Which tokens end the answer of their row [B, T]."""
        if requests.ends is None:
            return is_stop(token_BT, self.eos_ids)
        return (token_BT[..., None] == requests.ends.token_BE[:, None]).any(axis=-1)

    def _with_logprobs(
        self, state: DecodeState, accepted: Accepted, states_BWD: jax.Array
    ) -> DecodeState:
        """Notes the log-probabilities of this round's tokens. Before `emit`, which counts them."""
        assert state.stats.logprobs is not None
        path_BPD = jnp.take_along_axis(states_BWD, accepted.path_BP1[..., None], axis=1)
        raw_BPV = logits(self.target.params, self.target.spec, path_BPD)
        place_BP = state.transcript.count_B[:, None] + jnp.arange(path_BPD.shape[1])[None]
        logprobs = written_at(state.stats.logprobs, raw_BPV, accepted.token_BP1, place_BP)
        return state._replace(stats=state.stats._replace(logprobs=logprobs))

    def keys(self, key_B: jax.Array, place_BT: jax.Array, purpose: int) -> jax.Array:
        """Returns the random key [B, T] of each position of an answer, for one purpose."""
        return place_keys(jax.vmap(lambda key: jax.random.fold_in(key, purpose))(key_B), place_BT)

    @split
    def read_chunk(
        self,
        state: DecodeState,
        chunk: Chunk,
        first: bool,
        prefix: Sequence[KVRows] | None = None,
        follows: bool = False,
    ) -> tuple[DecodeState, jax.Array]:
        """Reads a chunk of new prompts into their rows; other rows stay as they are.

        first: the chunk begins new requests in its rows. A row whose prompt ends in this chunk gets
        the first token of its answer, and takes part in rounds from then on. prefix: key/value rows
        of the tokens before the chunk, of one sequence, if they are the same in every row of the
        cache. follows: the rows hold the tokens before the chunk from an earlier text, and the
        drafter has seen the chunk's first token after them. Also returns the target's states
        [R, T, D] of the chunk.
        """
        row_R, offset, length_R = chunk.row_R, chunk.offset, chunk.length_R
        R, T = chunk.token_RT.shape
        count_R = jnp.clip(length_R - offset, 0, T)  # tokens of this chunk
        ends_R = (length_R > offset) & (length_R <= offset + T)
        output = self._read_text(state, chunk, count_R, first, prefix)
        last_R = jnp.maximum(count_R - 1, 0)[:, None, None]
        last_R1D = jnp.take_along_axis(output.states_BTD, last_R, axis=1)
        zero_R1 = jnp.zeros((R, 1), jnp.int32)
        history = self._history_of(state, chunk, count_R, first)
        wanted_R1, finite_R1 = self.choose(chunk.requests, last_R1D, zero_R1, history)
        now, stats = state.transcript, state.stats
        root_R = jnp.where(ends_R, wanted_R1[:, 0], now.root_B[row_R])

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[row_R].set(new)

        def of_row(x_B: jax.Array) -> jax.Array:
            return jnp.zeros(R, x_B.dtype) if first else x_B[row_R]

        broken_R = of_row(now.broken_B) | (ends_R & ~finite_R1[:, 0])
        broken_R |= _spoiled(output.rows, count_R)
        stop_R = self._is_stop(chunk.requests, root_R[:, None])[:, 0]
        ended_R = stop_R | (chunk.requests.limit_B <= 1) | broken_R
        done_R = jnp.where(ends_R, ended_R, (length_R > offset + T) | now.done_B[row_R])
        cache = state.cache.put(output.rows, row_R, _after_reads(offset, wanted_R1))
        after = DecodeState(
            cache.holding(row_R, jnp.minimum(length_R, offset + T)),
            self._observe(state, _seen(chunk, root_R, output, first or follows), row_R, first),
            jax.tree.map(put, state.requests, chunk.requests),
            now._replace(
                root_B=put(now.root_B, root_R),
                out_BS=now.out_BS.at[row_R, 0].set(root_R),
                count_B=put(now.count_B, jnp.where(ends_R, ~broken_R, of_row(now.count_B))),
                done_B=put(now.done_B, done_R),
                broken_B=put(now.broken_B, broken_R),
            ),
            stats._replace(rounds_B=put(stats.rounds_B, of_row(stats.rounds_B))),
        )
        if history is not None:
            after = _with_history(after._replace(history=state.history), history, row_R, ends_R)
        if stats.logprobs is not None:
            after = self._with_first_logprobs(after, row_R, ends_R, last_R1D)
        return after, output.states_BTD

    def _with_first_logprobs(
        self, state: DecodeState, row_R: AnyArray, ends_R: AnyArray, last_R1D: jax.Array
    ) -> DecodeState:
        """Notes the log-probabilities of the roots of rows whose prompt ends here."""
        stats = state.stats
        assert stats.logprobs is not None
        of_rows = jax.tree.map(lambda x: x[row_R], stats.logprobs)
        raw_R1V = logits(self.target.params, self.target.spec, last_R1D)
        place_R1 = jnp.where(ends_R, 0, stats.logprobs.own_BS.shape[1])[:, None]
        of_rows = written_at(of_rows, raw_R1V, state.transcript.root_B[row_R][:, None], place_R1)
        logprobs = jax.tree.map(lambda x, new: x.at[row_R].set(new), stats.logprobs, of_rows)
        return state._replace(stats=stats._replace(logprobs=logprobs))

    def _history_of(
        self, state: DecodeState, chunk: Chunk, count_R: AnyArray, first: bool
    ) -> History | None:
        """The history of the chunk's rows after its prompt tokens; None without penalties."""
        if state.history is None:
            return None
        if first:
            before = no_history(len(chunk.row_R), state.history.count_BV.shape[1])
        else:
            before = jax.tree.map(lambda x: x[chunk.row_R], state.history)
        return history_of_prompt(before, chunk.token_RT, count_R)

    def _read_text(
        self,
        state: DecodeState,
        chunk: Chunk,
        count_R: jax.Array,
        first: bool,
        prefix: Sequence[KVRows] | None,
    ) -> Forward:
        """Returns a chunk's states [R, T, D], key/value rows, and what the drafter taps."""
        R, T = chunk.token_RT.shape
        positions_RT = jnp.broadcast_to(chunk.offset + jnp.arange(T)[None], (R, T))
        past: tuple = ()
        if prefix:
            past = (repeated(prefix, R), jnp.ones((R, prefix[0].v_BKSH.shape[2]), bool))
        elif not first:
            past = state.cache.past(chunk.row_R, chunk.offset)
        mask_RTT = causal_mask(count_R, T)
        target, taps = self.target, self.drafter.taps
        return forward(
            target.params, target.spec, chunk.token_RT, positions_RT, mask_RTT, *past, taps=taps
        )

    def _observe(self, state: DecodeState, seen: Seen, row_R: AnyArray, first: bool) -> Any:
        """Returns the drafter's state after a chunk of these rows."""
        if not first:
            part = jax.tree.map(lambda x: x[row_R], state.draft)
        else:
            part = self.drafter.init(len(row_R), state.transcript.out_BS.shape[1])
        part = self.drafter.observe(part, seen)
        return jax.tree.map(lambda x, new: x.at[row_R].set(new), state.draft, part)

    def part(self, name: str) -> Callable[..., Any]:
        """Returns the replacement of a part, or the method itself; call it with the round first."""
        return dict(self.parts).get(name, getattr(type(self), name))


def _after_reads(offset: AnyArray, wanted_R1: jax.Array) -> jax.Array:
    """Returns the offset, made to depend on the chosen tokens, none of which is negative.

    XLA must then order every write after all reads of the chunks before. It would copy the caches
    otherwise.
    """
    return jnp.where((wanted_R1 < 0).any(), 0, offset)


def _with_history(
    state: DecodeState, history: History, row_R: AnyArray, ends_R: AnyArray
) -> DecodeState:
    """Returns the state with the history of some rows, and the root of those whose prompt ends."""
    root_R1 = state.transcript.root_B[row_R][:, None]
    history = history_with(history, root_R1, jnp.asarray(ends_R, jnp.int32))
    put = jax.tree.map(lambda x, new: x.at[row_R].set(new), state.history, history)
    return state._replace(history=put)


def _spoiled(rows: Sequence[KVRows], count_R: jax.Array) -> jax.Array:
    """Returns whether a prompt's first `count_R` tokens hold values that are not finite [R].

    The cache stores these as zeros, so that later tokens would not notice them.
    """
    spoiled_R = jnp.zeros(count_R.shape, bool)
    for layer in rows:
        spoiled_RT = ~jnp.isfinite(layer.v_BKSH).all(axis=(1, 3))
        own_RT = jnp.arange(spoiled_RT.shape[1])[None] < count_R[:, None]
        spoiled_R |= (spoiled_RT & own_RT).any(axis=1)
    return spoiled_R


def _seen(chunk: Chunk, root_R: jax.Array, output: Forward, first: bool) -> Seen:
    """Returns what a drafter sees of a chunk of prompts."""
    R, T = chunk.token_RT.shape
    # The token after a prompt's last token is the root.
    at_RT1 = chunk.offset + jnp.arange(T + 1)[None]
    text_RT1 = jnp.concatenate([chunk.token_RT, root_R[:, None]], axis=1)
    text_RT1 = jnp.where(at_RT1 == chunk.length_R[:, None], root_R[:, None], text_RT1)
    start_R = jnp.broadcast_to(chunk.offset, (R,))
    count_R = jnp.clip(chunk.length_R - chunk.offset, 0, T)
    tokens = text_RT1[:, :-1], text_RT1[:, 1:]
    return Seen(output.states_BTD, *tokens, start_R, count_R, not first, output.tapped_BTI)


def _with_drafted(state: DecodeState, nodes: Nodes, accepted: Accepted) -> DecodeState:
    """Notes the tree of this round. Before `emit`; rows that are done keep their last tree."""
    path_BP1 = jnp.minimum(accepted.path_BP1, nodes.token_BW.shape[1] - 1)
    on_path_BW = jnp.zeros(nodes.token_BW.shape, bool)
    on_path_BW = on_path_BW.at[jnp.arange(len(path_BP1))[:, None], path_BP1].set(True)
    new = Drafted(nodes.token_BW, nodes.parent_BW, on_path_BW)
    done_B1, before = state.transcript.done_B[:, None], state.stats.drafted
    drafted = jax.tree.map(lambda old, now: jnp.where(done_B1, old, now), before, new)
    return state._replace(stats=state.stats._replace(drafted=drafted))

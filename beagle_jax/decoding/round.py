"""One round of decoding: propose a tree, let the target read it, accept a path, append its rows.

Plain decoding is the same round with the tree of the root alone. A `Round` holds everything that a
round reads: weights are leaves of it, all else is static, so that `jit` compiles once for each
shape. `with_` puts another function in the place of a part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from beagle_jax.arrays import AnyArray
from beagle_jax.decoding.accept import Accepted, accept_by_ratio, accept_matching
from beagle_jax.decoding.drafter import Drafter, Draw, Known, NoDrafter, Proposal, Seen
from beagle_jax.decoding.nodes import Nodes
from beagle_jax.decoding.sampling import (
    Filters,
    choose,
    filter_logits,
    gumbel,
    is_stop,
    place_keys,
)
from beagle_jax.decoding.state import DecodeState, Requests, constrained, idle
from beagle_jax.decoding.tree import ROOT_ONLY, Tree
from beagle_jax.model.cache import KVCache, KVRows, repeated, take_rows
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import (
    Params,
    TargetSpec,
    best_tokens,
    forward,
    init_cache,
    logits,
)

# What a place's key is folded with, so that its draws are independent of each other.
FOR_TARGET, FOR_DRAFT, FOR_ACCEPTING = 0, 1, 2

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TargetModel:
    """A target's weights, and their static description."""

    spec: TargetSpec = field(metadata=_STATIC)
    params: Params


class Rule(Protocol):
    """Decides which drafts are accepted. Hashable."""

    @property
    def name(self) -> str:
        """Its key in `RULES`."""

    @property
    def draws(self) -> bool:
        """Drafts must be drawn from the drafter's distribution."""

    def accept(
        self, now: "Round", state: DecodeState, proposal: Proposal, states_BWD: jax.Array
    ) -> tuple[Accepted, jax.Array]:
        """What is accepted, and which nodes' logits are finite [B, W]."""
        ...


@dataclass(frozen=True)
class Match:
    """Drafts are accepted where they are the target's own choice, greedy or drawn (method.md 6.6).

    With drawn choices this is EAGLE-2's rule.
    """

    name: str = "match"
    draws: bool = False

    def accept(
        self, now: "Round", state: DecodeState, proposal: Proposal, states_BWD: jax.Array
    ) -> tuple[Accepted, jax.Array]:
        """What is accepted, and which nodes' logits are finite [B, W]."""
        place_BW = state.transcript.count_B[:, None] + proposal.nodes.depth_BW
        wanted_BW, finite_BW = now.choose(state.requests, states_BWD, place_BW)
        return accept_matching(proposal.nodes, wanted_BW, now.tree.depth), finite_BW


@dataclass(frozen=True)
class Ratio:
    """Leviathan's rule for chains of drawn drafts: accept with probability min(1, p / q)."""

    name: str = "ratio"
    draws: bool = True

    def accept(
        self, now: "Round", state: DecodeState, proposal: Proposal, states_BWD: jax.Array
    ) -> tuple[Accepted, jax.Array]:
        """What is accepted, and which nodes' logits are finite [B, W]."""
        assert proposal.logits_BPV is not None, "the ratio rule needs the draft's logits"
        requests, count_B1 = state.requests, state.transcript.count_B[:, None]
        raw_BWV = logits(now.target.params, now.target.spec, states_BWD)
        place_BP = count_B1 + jnp.arange(now.tree.depth)[None]
        key_BP = now.part("keys")(now, requests.key_B, place_BP, FOR_ACCEPTING)
        key_BW = now.part("keys")(
            now, requests.key_B, count_B1 + proposal.nodes.depth_BW, FOR_TARGET
        )
        accepted = accept_by_ratio(
            proposal.nodes,
            filter_logits(raw_BWV, requests.knobs, now.filters),
            proposal.logits_BPV,
            self.uniform(key_BP),
            gumbel(key_BW, raw_BWV.shape[-1]),
        )
        return accepted, jnp.isfinite(raw_BWV.max(axis=-1))

    def uniform(self, key_BP: jax.Array) -> jax.Array:
        """A number in [0, 1) for each draft."""
        return jax.vmap(jax.vmap(jax.random.uniform))(key_BP)


RULES: dict[str, Rule] = {"match": Match(), "ratio": Ratio()}


class Chunk(NamedTuple):
    """A chunk of R right-padded prompts: T tokens from position `offset` on.

    A prompt may stand in it twice, in the same row.
    """

    row_R: AnyArray  # of the batch
    token_RT: AnyArray
    offset: AnyArray
    length_R: AnyArray  # of the whole prompts
    requests: Requests


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Round:
    """All that a round reads but the state.

    Parts are called with the round first: `round.with_(accept=f)` calls `f(round, state, proposal,
    states)` in the place of `Round.accept`, in a program of its own.
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
        """The round with some of its parts replaced: read_chunk, propose, read, accept, append,
        emit or keys.
        """
        return replace(self, parts=tuple(sorted({**dict(self.parts), **parts}.items())))

    @property
    def reading(self) -> Self:
        """The round as prompts need it: their programs are the same for every tree and rule."""
        parts = tuple(part for part in self.parts if part[0] in ("read_chunk", "keys"))
        return replace(self, tree=ROOT_ONLY, rule=RULES["match"], parts=parts)

    @property
    def plain(self) -> Self:
        """The round without drafts."""
        return replace(self, drafter=NoDrafter(), tree=ROOT_ONLY, rule=RULES["match"])

    def empty(self, batch: int, capacity: int) -> DecodeState:
        """A state whose rows have no request. capacity: tokens of a text and a round's overhang."""
        dtype = self.target.params["embed_VD"].dtype
        layers = init_cache(self.target.spec, batch, capacity, dtype)
        cache = KVCache(layers, jnp.zeros(batch, jnp.int32))
        state = idle(cache, self.drafter.init(batch, capacity), batch, capacity)
        return constrained(state, self.mesh)

    def run(self, state: DecodeState) -> tuple[DecodeState, jax.Array]:
        """One round of every row; finished ones compute along and change nothing that counts.

        Returns the target's states [B, W, D] of the nodes too.
        """
        with jax.named_scope("draft"):
            proposal = self.part("propose")(self, state)
        with jax.named_scope("verify"):
            states_BWD, rows = self.part("read")(self, state, proposal.nodes)
        with jax.named_scope("accept"):
            accepted, finite_BW = self.part("accept")(self, state, proposal, states_BWD)
        with jax.named_scope("append"):
            state = self.part("append")(self, state, accepted, states_BWD, rows)
        return self.part("emit")(self, state, accepted, finite_BW), states_BWD

    def propose(self, state: DecodeState) -> Proposal:
        """This round's tree."""
        draw = None
        if self.rule.draws:
            place_BP = state.transcript.count_B[:, None] + jnp.arange(self.tree.depth)[None]
            key_BP = self.part("keys")(self, state.requests.key_B, place_BP, FOR_DRAFT)
            draw = Draw(key_BP, state.requests.knobs, self.filters)
        known = Known(state.transcript.root_B, state.cache.length_B)
        return self.drafter.propose(state.draft, known, self.tree, draw)

    def read(self, state: DecodeState, nodes: Nodes) -> tuple[jax.Array, list[KVRows]]:
        """The target's states of the nodes [B, W, D], and their key/value rows."""
        cache = state.cache
        positions_BW = cache.length_B[:, None] + nodes.depth_BW
        target = self.target
        read = forward(
            target.params,
            target.spec,
            nodes.token_BW,
            positions_BW,
            nodes.above_BWW,
            cache.layers,
            cache.visible(),
            cache.positions(),
        )
        return read.states_BTD, read.rows

    def accept(
        self, state: DecodeState, proposal: Proposal, states_BWD: jax.Array
    ) -> tuple[Accepted, jax.Array]:
        """What is accepted, and which nodes' logits are finite [B, W]."""
        return self.rule.accept(self, state, proposal, states_BWD)

    def append(
        self, state: DecodeState, accepted: Accepted, states_BWD: jax.Array, rows: list[KVRows]
    ) -> DecodeState:
        """Writes the rows of the accepted path only, and shows the drafter its true states: rows
        past it are overwritten by the next round.
        """
        path_BP1 = accepted.path_BP1
        if self.tree.depth:
            rows = [take_rows(layer, path_BP1) for layer in rows]
        cache = state.cache.append(rows, accepted.bonus_B)
        # Ordered after the reads of the drafter's state, as the cache's rows are.
        start_B = jnp.where(accepted.bonus_B < 0, 0, state.cache.length_B)
        tokens_BP2 = jnp.concatenate([state.transcript.root_B[:, None], accepted.token_BP1], axis=1)
        seen = Seen(
            jnp.take_along_axis(states_BWD, path_BP1[..., None], axis=1),
            tokens_BP2[:, :-1],
            accepted.token_BP1,
            start_B,
            jnp.where(state.transcript.done_B, 0, accepted.count_B + 1),
        )
        return state._replace(cache=cache, draft=self.drafter.observe(state.draft, seen))

    def emit(self, state: DecodeState, accepted: Accepted, finite_BW: jax.Array) -> DecodeState:
        """Writes the round's tokens: up to the first stop token, and never past the limit.

        A node whose logits are not finite breaks its row if it is on the accepted path; the tokens
        before it count.
        """
        now, stats, (B, P1) = state.transcript, state.stats, accepted.token_BP1.shape
        row_B, step_1P = jnp.arange(B), jnp.arange(P1)[None]
        on_path_BP = step_1P <= accepted.count_B[:, None]
        finite_BP = jnp.take_along_axis(finite_BW, accepted.path_BP1, axis=1)
        sound_B = jnp.cumprod(finite_BP & on_path_BP, axis=1).sum(axis=1)
        stop_BP = is_stop(accepted.token_BP1, self.eos_ids) & (step_1P < sound_B[:, None])
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
        counted_B = live_B & (emitted_B > 0)  # a round that broke at its root brought nothing
        round_B = jnp.where(counted_B, stats.rounds_B, capacity)
        length_B = state.cache.length_B + jnp.where(live_B, accepted.count_B + 1, 0)
        out_BS = now.out_BS.at[row_B[:, None], column_BP].set(accepted.token_BP1, mode="drop")
        accepted_B = jnp.minimum(accepted.count_B, emitted_B)
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
                accepted_BS=stats.accepted_BS.at[row_B, round_B].set(accepted_B, mode="drop"),
            ),
        )

    def choose(
        self, requests: Requests, states_BWD: jax.Array, place_BW: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The target's own next token after each state, greedy or drawn with the noise of its
        place; and is it finite?
        """
        params, spec = self.target.params, self.target.spec
        if not self.filters.drawn:
            return best_tokens(params, states_BWD)
        raw_BWV = logits(params, spec, states_BWD)
        key_BW = self.part("keys")(self, requests.key_B, place_BW, FOR_TARGET)
        wanted_BW = choose(raw_BWV, key_BW, requests.knobs, self.filters)
        return wanted_BW, jnp.isfinite(raw_BWV.max(axis=-1))

    def keys(self, key_B: jax.Array, place_BT: jax.Array, purpose: int) -> jax.Array:
        """The random key [B, T] of each place, for one purpose."""
        return place_keys(jax.vmap(lambda key: jax.random.fold_in(key, purpose))(key_B), place_BT)

    def read_chunk(
        self,
        state: DecodeState,
        chunk: Chunk,
        first: bool,
        prefix: Sequence[KVRows] | None = None,
    ) -> tuple[DecodeState, jax.Array]:
        """Reads a chunk of new prompts into their rows; other rows stay as they are.

        first: the rows begin anew. A row whose prompt ends here gets the first token of its answer,
        and runs from now on. prefix: the tokens before the chunk, of one sequence, if every row of
        the cache holds the same ones. Returns the target's states [R, T, D] of the chunk too.
        """
        row_R, offset, length_R = chunk.row_R, chunk.offset, chunk.length_R
        R, T = chunk.token_RT.shape
        count_R = jnp.clip(length_R - offset, 0, T)  # tokens of this chunk
        ends_R = (length_R > offset) & (length_R <= offset + T)
        states_RTD, rows = self._read_text(state, chunk, count_R, first, prefix)
        last_R = jnp.maximum(count_R - 1, 0)[:, None, None]
        last_R1D = jnp.take_along_axis(states_RTD, last_R, axis=1)
        wanted_R1, finite_R1 = self.choose(chunk.requests, last_R1D, jnp.zeros((R, 1), jnp.int32))
        now, stats = state.transcript, state.stats
        root_R = jnp.where(ends_R, wanted_R1[:, 0], now.root_B[row_R])
        # After a prompt's last token comes the root.
        at_RT1 = offset + jnp.arange(T + 1)[None]
        text_RT1 = jnp.concatenate([chunk.token_RT, root_R[:, None]], axis=1)
        text_RT1 = jnp.where(at_RT1 == length_R[:, None], root_R[:, None], text_RT1)
        start_R = jnp.broadcast_to(offset, (R,))
        seen = Seen(states_RTD, text_RT1[:, :-1], text_RT1[:, 1:], start_R, count_R, not first)
        none_R = jnp.zeros(R, jnp.int32)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[row_R].set(new)

        def of_row(x_B: jax.Array) -> jax.Array:
            return none_R.astype(x_B.dtype) if first else x_B[row_R]

        broken_R = of_row(now.broken_B) | (ends_R & ~finite_R1[:, 0])
        ended_R = is_stop(root_R, self.eos_ids) | (chunk.requests.limit_B <= 1) | broken_R
        done_R = jnp.where(ends_R, ended_R, (length_R > offset + T) | now.done_B[row_R])
        # The slot depends on the chosen tokens, none of which is negative, so that XLA must order
        # every write after all reads of the chunks before: it would copy the caches otherwise.
        slot = jnp.where((wanted_R1 < 0).any(), 0, offset)
        cache = state.cache.put(rows, row_R, slot)
        after = DecodeState(
            cache.holding(row_R, jnp.minimum(length_R, offset + T)),
            self._observe(state, seen, row_R),
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
        return after, states_RTD

    def _read_text(
        self,
        state: DecodeState,
        chunk: Chunk,
        count_R: jax.Array,
        first: bool,
        prefix: Sequence[KVRows] | None,
    ) -> tuple[jax.Array, list[KVRows]]:
        """The target's states [R, T, D] of a chunk, and its rows."""
        R, T = chunk.token_RT.shape
        positions_RT = jnp.broadcast_to(chunk.offset + jnp.arange(T)[None], (R, T))
        past: tuple = ()
        if prefix:
            past = (repeated(prefix, R), jnp.ones((R, prefix[0].v_BKSH.shape[2]), bool))
        elif not first:
            past = state.cache.past(chunk.row_R, chunk.offset)
        mask_RTT = causal_mask(count_R, T)
        target = self.target
        read = forward(target.params, target.spec, chunk.token_RT, positions_RT, mask_RTT, *past)
        return read.states_BTD, read.rows

    def _observe(self, state: DecodeState, seen: Seen, row_R: AnyArray) -> Any:
        """The drafter's state after a chunk of these rows."""
        if seen.resumed:
            part = jax.tree.map(lambda x: x[row_R], state.draft)
        else:
            part = self.drafter.init(len(row_R), state.transcript.out_BS.shape[1])
        part = self.drafter.observe(part, seen)
        return jax.tree.map(lambda x, new: x.at[row_R].set(new), state.draft, part)

    def part(self, name: str) -> Callable[..., Any]:
        """A part as it was put in place, to be called with the round first."""
        return dict(self.parts).get(name, getattr(type(self), name))

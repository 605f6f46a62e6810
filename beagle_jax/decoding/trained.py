"""Drafters with a trained block: Beagle and EAGLE (method.md 6.1, 6.2, 8).

Both keep keys and values of true states only, and grow the same trees. They differ in the inputs of
a query, in its position, and in what it sees of its own round.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.arrays import AnyArray
from beagle_jax.decoding.draft import Frontier, LevelOutput, TreeDrafter
from beagle_jax.decoding.drafter import Draw, Known, Proposal, Seen, State
from beagle_jax.decoding.tree import Tree
from beagle_jax.errors import UserError
from beagle_jax.model.attention import merge_attention, partial_attention
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec
from beagle_jax.model.cache import (
    KVRows,
    append_rows,
    empty_rows,
    finite,
    visible_slots,
    write_rows,
)
from beagle_jax.model.draft import DraftSpec, LayerBlock, LayerSpec
from beagle_jax.model.eagle import EagleBlock, EagleSpec
from beagle_jax.model.eagle3 import Eagle3Block, Eagle3Spec
from beagle_jax.model.target import TargetSpec, embed, logit_columns
from beagle_jax.weights.draft import hot_problem


class DraftHead(NamedTuple):
    """Head that reads the draft's states: its rows, and the token id of each row."""

    rows_VD: jax.Array
    ids_V: AnyArray | None  # None: row v belongs to token v


@dataclass(frozen=True)
class TrainedDrafter(TreeDrafter):
    """Base of Beagle and EAGLE. Embedding and head are the target's or the draft's own."""

    attends: ClassVar[bool] = True

    spec: DraftSpec = field(metadata=dict(static=True))
    params: dict[str, jax.Array]
    embed_VD: jax.Array
    head: DraftHead
    # True: predicted states become keys of deeper levels (the paper's "concate"). False: all levels
    # see only true states.
    append_predicted: bool = field(default=True, metadata=dict(static=True))

    @property
    def taps(self) -> tuple[int, ...]:
        """Streams of the target that the draft reads, as in training."""
        return self.spec.taps

    @property
    def ids_V(self) -> AnyArray | None:  # type: ignore[override]
        """Token id of each logit; None: logit v belongs to token v."""
        return self.head.ids_V

    def propose(self, state: State, known: Known, tree: Tree, draw: Draw | None) -> Proposal:
        """Grows the tree; logits of a drawn chain are expanded to the whole vocabulary."""
        proposal = super().propose(state, known, tree, draw)
        if proposal.logits_BPV is None or self.head.ids_V is None:
            return proposal
        shape = (*proposal.logits_BPV.shape[:2], self.embed_VD.shape[0])
        spread_BPV = jnp.full(shape, -jnp.inf).at[:, :, self.head.ids_V].set(proposal.logits_BPV)
        return proposal._replace(logits_BPV=spread_BPV)

    def check(self, target: TargetSpec, tree: Tree, rule: str) -> None:
        """Raises UserError for a draft of another target or a tree that it cannot draft."""
        if not tree.depth:
            return
        if beyond := [tap for tap in self.spec.taps if tap > target.num_layers]:
            raise UserError(
                f"this draft belongs to another target (it reads the streams {beyond}, the target "
                f"has 0 to {target.num_layers})"
            )
        ours, theirs = self.spec.target_width, target.hidden_size
        if ours != theirs:
            raise UserError(
                f"this draft belongs to another target (its hidden size is {ours}, the target's is "
                f"{theirs}); set draft.path or target.source to a pair that fits"
            )
        vocabulary = known = target.vocab_size
        if self.head.ids_V is not None:
            vocabulary, highest = len(self.head.ids_V), int(jnp.max(self.head.ids_V))
            if highest >= known:
                raise UserError(
                    f"this draft belongs to another target (it scores token {highest}, the "
                    f"target has {known}); set draft.path or target.source to a pair that fits"
                )
            if problem := hot_problem(np.asarray(self.head.ids_V), known):
                raise UserError(problem)
        if len(self.head.rows_VD) != vocabulary:
            raise UserError(
                f"the draft's head has {len(self.head.rows_VD)} rows for {vocabulary} scored "
                "tokens; load the draft with load_draft, which checks it"
            )
        most = max(tree.grown.kept_children(level) for level in range(tree.grown.depth))
        if most > vocabulary:
            raise UserError(
                f"the tree keeps {most} children of a node, but the draft scores only "
                f"{vocabulary} tokens; lower topk"
            )
        if rule == "ratio" and (tree.scored or tree.size != tree.depth + 1):
            raise UserError(
                "rule 'ratio' is for chains: a tree's siblings are not independent draws; use "
                "rule 'match'"
            )

    def owned(self) -> Any:
        """Returns the block's weights, and the head if it has fewer tokens."""
        if self.spec.owns_head(self.params):
            return self.params, self.head.ids_V
        return self.params, (() if self.head.ids_V is None else self.head)

    def at(self, state: State, state_BLD: jax.Array, length_B: jax.Array) -> State:
        """Returns the state after only the first length_B tokens of a text.

        state: state after the whole text. state_BLD: the target's states of the text.
        """
        return state

    def _embedded(self, token_BT: jax.Array) -> jax.Array:
        return embed(self.embed_VD, token_BT, self.spec.embed_scale)

    def _predict(
        self,
        block: LayerBlock,
        rows: KVRows,
        frontier: Frontier,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        memory: KVRows | None,
        sees_BTQ: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Predicts states [B, T, D] of a level and their logits, from true states and memory."""
        q_BKGTH = block.queries(x_BTD, positions_BT)
        slots = visible_slots(frontier.length_B, [rows])[:, None, None, None]
        parts = [partial_attention(q_BKGTH, *rows, slots)]
        if memory is not None:
            # Values of one node that are not finite must not reach the others, as 0 x NaN.
            k_BKHQ, v_BKQH = memory
            seen_BTQ = sees_BTQ[:, None, None]
            # The barrier keeps XLA from making one product of both parts, for which it would join
            # their keys: a copy of the cache in each level on an H100.
            q_BKGTH = jax.lax.optimization_barrier(q_BKGTH)
            parts.append(partial_attention(q_BKGTH, k_BKHQ, finite(v_BKQH), seen_BTQ))
        state_BTD = block.predict(x_BTD, merge_attention(*parts))
        normed_BTD = self.spec.final_norm(self.params, state_BTD)
        return state_BTD, logit_columns(self.head.rows_VD, normed_BTD)

    def _empty(self, batch: int, capacity: int) -> KVRows:
        spec, dtype = self.spec, self.embed_VD.dtype
        return empty_rows(batch, spec.num_kv_heads, capacity, spec.head_dim, dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeagleDrafter(TrainedDrafter):
    """Beagle: queries are token embeddings.

    They see true states, and predicted states of their strict ancestors. The drafter's state is a
    cache with keys and values of true states.
    """

    kind: ClassVar[str] = BeagleSpec.kind

    spec: BeagleSpec = field(metadata={"static": True})

    def init(self, batch: int, capacity: int) -> KVRows:
        """Returns an empty cache."""
        return self._empty(batch, capacity)

    def observe(self, state: KVRows, seen: Seen) -> KVRows:
        """Appends keys and values of the states."""
        block = BeagleBlock(self.spec).bind({"params": self.params})
        rows = block.entry_rows(seen.input_BTI, _positions(seen.start_B, seen.token_BT))
        return write_rows(state, rows, seen.start_B)

    def level(self, state: KVRows, frontier: Frontier) -> LevelOutput:
        """Predicts one level."""
        block = BeagleBlock(self.spec).bind({"params": self.params})
        x_BTD = self._embedded(frontier.token_BT)
        at_BT = _same_position(frontier.length_B + frontier.depth, frontier)
        memory = frontier.memory
        state_BTD, logits_VM = self._predict(
            block, state, frontier, x_BTD, at_BT, memory, frontier.sees_BTQ
        )
        if self.append_predicted:
            memory = append_rows(memory, block.keys_values(state_BTD, at_BT))
        return LevelOutput(state_BTD, logits_VM, memory)

    def first_queries(
        self, state_1LD: jax.Array, text_1L: jax.Array, places_1T: jax.Array
    ) -> jax.Array:
        """Returns the queries of the tokens at these positions."""
        block = BeagleBlock(self.spec).bind({"params": self.params})
        return block.queries(self._embedded(text_1L[:, places_1T[0]]), places_1T)

    def rows(self, state: KVRows) -> KVRows:
        """Returns the state, which is the cache."""
        return state


class EagleState(NamedTuple):
    """Cache of the text so far; a slot holds a true state fused with the token after it."""

    rows: KVRows
    last_B1D: jax.Array  # the last true state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EagleDrafter(TrainedDrafter):
    """EAGLE: queries fuse a token with the state before it.

    A query has the position of that state, and sees itself too. The cache slot of a state also
    needs the token after it. For the last state of a chunk, that token comes with the next chunk,
    which therefore writes the slot of that state first. For the last state of a prompt, it is the
    root.
    """

    kind: ClassVar[str] = EagleSpec.kind

    spec: LayerSpec = field(metadata=dict(static=True))

    @property
    def block(self) -> EagleBlock:
        """The block of this kind, with the draft's parameters."""
        return EagleBlock(self.spec).bind({"params": self.params})

    def init(self, batch: int, capacity: int) -> EagleState:
        """Returns an empty cache."""
        shape = (batch, 1, self.spec.hidden_size)
        return EagleState(self._empty(batch, capacity), jnp.zeros(shape, self.embed_VD.dtype))

    def observe(self, state: EagleState, seen: Seen) -> EagleState:
        """Appends slots of these states; for a resumed prompt, also of the state before them."""
        block = self.block
        read_BTD = block.features(seen.input_BTI)
        state_BTD, next_BT, start_B = read_BTD, seen.next_BT, seen.start_B
        if seen.resumed:
            state_BTD = jnp.concatenate([state.last_B1D, state_BTD], axis=1)
            next_BT = jnp.concatenate([seen.token_BT[:, :1], next_BT], axis=1)
            start_B = start_B - 1
        f_BTD = block.fuse(self._embedded(next_BT), state_BTD)
        rows = block.keys_values(f_BTD, _positions(start_B, next_BT))
        last_B = jnp.maximum(seen.count_B - 1, 0)[:, None, None]
        last_B1D = jnp.take_along_axis(read_BTD, last_B, axis=1)
        last_B1D = jnp.where((seen.count_B > 0)[:, None, None], last_B1D, state.last_B1D)
        return EagleState(write_rows(state.rows, rows, start_B), last_B1D)

    def level(self, state: EagleState, frontier: Frontier) -> LevelOutput:
        """Predicts one level."""
        block = self.block
        before_BTD = state.last_B1D if frontier.before_BTD is None else frontier.before_BTD
        x_BTD = block.fuse(self._embedded(frontier.token_BT), before_BTD)
        at_BT = _same_position(frontier.length_B + frontier.depth - 1, frontier)
        memory, sees_BTQ = None, frontier.sees_BTQ
        if frontier.depth:  # the root's own slot is already in the cache
            above = frontier.memory if self.append_predicted else None
            memory, sees_BTQ = self.with_own(above, sees_BTQ, block.keys_values(x_BTD, at_BT))
        state_BTD, logits_VM = self._predict(
            block, state.rows, frontier, x_BTD, at_BT, memory, sees_BTQ
        )
        return LevelOutput(block.carried(state_BTD), logits_VM, memory)

    def with_own(
        self, memory: KVRows | None, sees_BTQ: jax.Array, own: KVRows
    ) -> tuple[KVRows, jax.Array]:
        """Returns keys and values of this round, and the mask of who sees them.

        A query sees itself and, if predicted states are appended, its ancestors below the root.
        """
        B, T, Q = sees_BTQ.shape
        above_BTQ = sees_BTQ[:, :, Q if memory is None else 1 :]
        itself_BTT = jnp.broadcast_to(jnp.eye(T, dtype=bool)[None], (B, T, T))
        return append_rows(memory, own), jnp.concatenate([above_BTQ, itself_BTT], axis=2)

    def at(self, state: EagleState, state_BLD: jax.Array, length_B: jax.Array) -> EagleState:
        """Returns the same cache, with the last state among the first length_B."""
        last_B = (length_B - 1)[:, None, None]
        last_B1D = jnp.take_along_axis(state_BLD, last_B, axis=1)
        return state._replace(last_B1D=self.block.features(last_B1D))

    def first_queries(
        self, state_1LD: jax.Array, text_1L: jax.Array, places_1T: jax.Array
    ) -> jax.Array:
        """Returns the queries of the slots before these positions."""
        block = self.block
        e_1TD = self._embedded(text_1L[:, places_1T[0]])
        before_1TD = block.features(state_1LD[:, places_1T[0] - 1])
        return block.queries(block.fuse(e_1TD, before_1TD), places_1T - 1)

    def rows(self, state: EagleState) -> KVRows:
        """Returns the cache."""
        return state.rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eagle3Drafter(EagleDrafter):
    """EAGLE-3: EAGLE's entries over features of several layers (method.md 14).

    Its state holds the last true feature in place of the last state.
    """

    kind: ClassVar[str] = Eagle3Spec.kind

    spec: Eagle3Spec = field(metadata=dict(static=True))

    @property
    def block(self) -> Eagle3Block:
        """The block of this kind, with the draft's parameters."""
        return Eagle3Block(self.spec).bind({"params": self.params})


def _positions(start_B: jax.Array, token_BT: jax.Array) -> jax.Array:
    return start_B[:, None] + jnp.arange(token_BT.shape[1])[None]


def _same_position(position_B: jax.Array, frontier: Frontier) -> jax.Array:
    return jnp.broadcast_to(position_B[:, None], frontier.token_BT.shape)

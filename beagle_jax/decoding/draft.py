"""Drafting a tree with the cached draft: levels of the block, predicted states as keys (method.md
6.2, 6.4, 8).

True states live in the draft's cache; predicted ones only in local arrays that end with the round,
so nothing has to be rolled back. The states of the last level are never turned into keys (lazy
append).

Beagle and EAGLE grow the same trees. They differ in what a query is made of (`fuse`), where it
stands, and in what it sees of its own round: Beagle's its strict ancestors' predicted states,
EAGLE's itself too (`_with_own_rows`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.decoding.sampling import Sampling, filtered
from beagle_jax.decoding.tree import Tree
from beagle_jax.model.beagle import BeagleBlock, DraftSpec
from beagle_jax.model.cache import KVRows, append_rows, visible_slots
from beagle_jax.model.kinds import block_of
from beagle_jax.model.layers import merge_attention, partial_attention
from beagle_jax.model.precision import exact
from beagle_jax.model.target import embed, logit_columns


class DraftHead(NamedTuple):
    """What reads the draft's states: rows of the target's head, and the token each row stands
    for.
    """

    rows_VD: jax.Array
    ids_V: jax.Array | None  # None: row v is token v


class Nodes(NamedTuple):
    """A drafted tree of W nodes; node 0 is the root, parents precede children."""

    token_BW: jax.Array
    parent_BW: jax.Array  # the root is its own
    depth_BW: jax.Array
    above_BWW: (
        jax.Array
    )  # verify mask: True where the column's node is the row's node or one of its ancestors
    score_BW: jax.Array  # cumulative log-probability under the draft; zero in trees that do not ask


class Drafted(NamedTuple):
    """What drafting leaves behind. Q: all queries of a round, level by level, the root first."""

    nodes: Nodes
    state_BQD: jax.Array  # predicted state of each query's token
    query_token_BQ: jax.Array
    query_sees_BQQ: jax.Array  # draft mask: strict ancestors among the queries
    logits_BPV: (
        jax.Array | None
    )  # filtered draft logits along a sampled chain, over the draft's vocabulary


class _Level(NamedTuple):
    """The queries of one level. T: how many."""

    token_BT: jax.Array
    candidate_BT: (
        jax.Array
    )  # each query's place among all candidates, counted from 1; 0 for the root
    score_BT: jax.Array  # cumulative log-probability (zero in trees that do not ask)
    sees_BTQ: jax.Array  # its strict ancestors among all queries so far
    before_BTD: (
        jax.Array | None
    )  # the state before it: its parent's predicted one, the root's a true one; EAGLE fuses both


@exact
def draft_tree(
    params: dict[str, jax.Array],
    spec: DraftSpec,
    tree: Tree,
    embed_VD: jax.Array,
    head: DraftHead,
    cache: KVRows,
    length_B: jax.Array,
    root_B: jax.Array,
    last_B1D: jax.Array | None = None,
    *,
    append_predicted: bool = True,
    sampling: Sampling | None = None,
    noise_BPV: jax.Array | None = None,
) -> Drafted:
    """Drafts below the root: the best children of each query, or one draw from the draft's
    distribution in a chain.

    cache: rows of the true states at positions below length_B; the root sits at position length_B.
    last_B1D: the last of these states, for EAGLE. append_predicted: predicted states become keys of
    the levels below (the paper's "concate"); off, all levels see true states only. sampling,
    noise_BPV: a chain whose tokens are drawn (`Drafted.logits_BPV` is then set).
    """
    block = block_of(spec).bind({"params": params})
    B = root_B.shape[0]
    slots = visible_slots(length_B, [cache])[:, None, None, None]
    zero_B1 = jnp.zeros((B, 1), jnp.int32)
    no_score_B1, sees_B10 = jnp.zeros((B, 1), jnp.float32), jnp.zeros((B, 1, 0), bool)
    level = _Level(root_B[:, None], zero_B1, no_score_B1, sees_B10, last_B1D)
    states, queries, sees, drawn = [], [], [], []
    # Token, parent, depth, score; the root first.
    candidates = [(level.token_BT, zero_B1, zero_B1, level.score_BT)]
    memory: KVRows | None = None
    for depth in range(tree.depth):
        with jax.named_scope(f"draft_{depth + 1}"):
            place_B = length_B + depth - int(spec.fused)
            positions_BT = jnp.broadcast_to(place_B[:, None], level.token_BT.shape)
            x_BTD = block.fuse(embed(embed_VD, level.token_BT, spec.embed_scale), level.before_BTD)
            sees_BTQ = level.sees_BTQ
            if spec.fused and depth:  # the root's own row is in the cache
                kept = memory if append_predicted else None
                own = block.keys_values(x_BTD, positions_BT)
                memory, sees_BTQ = _with_own_rows(kept, sees_BTQ, own)
            state_BTD = _predict(block, x_BTD, positions_BT, cache, slots, memory, sees_BTQ)
            states.append(state_BTD), queries.append(level.token_BT), sees.append(level.sees_BTQ)
            if noise_BPV is None:
                children = _best_children(tree, depth, level, state_BTD, head)
            else:
                drawn.append(filtered(logit_columns(head.rows_VD, state_BTD).T, sampling))
                token_B = jnp.argmax(drawn[-1] + noise_BPV[:, depth], axis=-1)
                children = (_tokens(head, token_B[:, None]), level.score_BT)
            first = sum(token.shape[1] for token, *_ in candidates)
            candidates.append(_entries(level, depth, *children))
            if depth + 1 < tree.depth:
                if append_predicted and not spec.fused:
                    memory = append_rows(memory, block.keys_values(state_BTD, positions_BT))
                level = _next_level(tree, depth, level, first, *children, state_BTD)
    nodes = _chosen_nodes(tree, candidates)
    queried = [jnp.concatenate(each, axis=1) for each in (states, queries, _same_width(sees))]
    return Drafted(nodes, *queried, jnp.stack(drawn, axis=1) if drawn else None)  # type: ignore[call-arg]  # three in the middle


def _with_own_rows(
    memory: KVRows | None, sees_BTQ: jax.Array, own: KVRows
) -> tuple[KVRows, jax.Array]:
    """EAGLE's rows of this round and who sees them: a query its ancestors below the root, if they
    are kept, and itself.
    """
    B, T, Q = sees_BTQ.shape
    above_BTQ = sees_BTQ[:, :, Q if memory is None else 1 :]
    itself_BTT = jnp.broadcast_to(jnp.eye(T, dtype=bool)[None], (B, T, T))
    return append_rows(memory, own), jnp.concatenate([above_BTQ, itself_BTT], axis=2)


def _predict(
    block: BeagleBlock, x_BTD, positions_BT, cache: KVRows, slots, memory: KVRows | None, sees_BTQ
) -> jax.Array:
    """Predicted states [B, T, D] of one level's queries, over the cache and the round's own rows
    that they see.
    """
    q_BKGTH = block.queries(x_BTD, positions_BT)
    parts = [partial_attention(q_BKGTH, *cache, slots)]
    if memory is not None:
        parts.append(partial_attention(q_BKGTH, *memory, sees_BTQ[:, None, None]))
    return block.predict(x_BTD, merge_attention(*parts))


def _same_width(masks: list[jax.Array]) -> list[jax.Array]:
    """Each level's mask [B, T, Q so far] over the queries of all levels."""
    count = sum(mask.shape[1] for mask in masks)
    return [jnp.pad(mask, ((0, 0), (0, 0), (0, count - mask.shape[2]))) for mask in masks]


def _best_children(
    tree: Tree, depth: int, level: _Level, state_BTD, head: DraftHead
) -> tuple[jax.Array, jax.Array]:
    """Tokens and cumulative log-probabilities [B, T * k] of each query's k best children, in
    (query, rank) order.
    """
    (B, T), k = level.token_BT.shape, tree.kept_children(depth)
    columns_VM = logit_columns(head.rows_VD, state_BTD)
    if k == 1 and not tree.scored:
        best_BTk = jnp.argmax(columns_VM, axis=0).reshape(B, T, 1)
        score_BTk = jnp.zeros((B, T, 1), jnp.float32)
    else:
        # The barrier keeps XLA from turning the product round to rows, which is slower
        # (model/target.py).
        logits_BTV = jax.lax.optimization_barrier(columns_VM).T.reshape(B, T, -1)
        top_BTk, best_BTk = jax.lax.top_k(logits_BTV, k)
        score_BTk = jnp.zeros_like(top_BTk)
        if tree.scored:
            total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
            score_BTk = level.score_BT[..., None] + jnp.minimum(top_BTk - total_BT[..., None], 0.0)
            # A draft that overflows may be wrong, but not choose a child without its parent: NaN
            # would come before all numbers.
            score_BTk = jnp.where(score_BTk > -jnp.inf, score_BTk, -jnp.inf)
    return _tokens(head, best_BTk.reshape(B, T * k)), score_BTk.reshape(B, T * k)


def _tokens(head: DraftHead, row: jax.Array) -> jax.Array:
    """The tokens that rows of the draft's head stand for."""
    return (row if head.ids_V is None else head.ids_V[row]).astype(jnp.int32)


def _entries(
    level: _Level, depth: int, token_BC: jax.Array, score_BC: jax.Array
) -> tuple[jax.Array, ...]:
    """A level's children as candidates: token, parent, depth, score."""
    per_query = token_BC.shape[1] // level.token_BT.shape[1]
    parent_BC = jnp.repeat(level.candidate_BT, per_query, axis=1)
    return token_BC, parent_BC, jnp.full_like(parent_BC, depth + 1), score_BC


def _next_level(
    tree: Tree, depth: int, level: _Level, first: int, token_BC, score_BC, state_BTD
) -> _Level:
    """The children that are continued. first: the place of this level's first candidate among
    all.
    """
    T = level.token_BT.shape[1]
    pick_BN = tree.next_queries(depth, score_BC)

    def pick(x_BC):
        return jnp.take_along_axis(x_BC, pick_BN, axis=1)

    # A child sees what its parent saw, and its parent.
    below_BTQ = jnp.concatenate(
        [level.sees_BTQ, jnp.broadcast_to(jnp.eye(T, dtype=bool)[None], (token_BC.shape[0], T, T))],
        axis=2,
    )
    parent_BN = pick_BN // (token_BC.shape[1] // T)

    def of_parent(x_BTQ):
        return jnp.take_along_axis(x_BTQ, parent_BN[..., None], axis=1)

    return _Level(
        pick(token_BC), pick_BN + first, pick(score_BC), of_parent(below_BTQ), of_parent(state_BTD)
    )


def _chosen_nodes(tree: Tree, candidates: list[tuple[jax.Array, ...]]) -> Nodes:
    """The candidates that the tree keeps, of every level's (token, parent, depth, score)."""
    token_BN, parent_BN, depth_BN, score_BN = (
        jnp.concatenate(each, axis=1) for each in zip(*candidates, strict=True)
    )
    return _nodes(
        tree.chosen(score_BN[:, 1:]) + 1, token_BN, parent_BN, depth_BN, score_BN, tree.depth
    )


def _nodes(chosen_BW: jax.Array, token_BN, parent_BN, depth_BN, score_BN, levels: int) -> Nodes:
    """The chosen candidates (the root is added) as a tree, parents renumbered."""
    chosen_BW = jnp.pad(chosen_BW, ((0, 0), (1, 0)))
    B, W = chosen_BW.shape

    def pick(x_BN):
        return jnp.take_along_axis(x_BN, chosen_BW, axis=1)

    node_BN = (
        jnp.zeros_like(token_BN).at[jnp.arange(B)[:, None], chosen_BW].set(jnp.arange(W)[None])
    )
    parent_BW = jnp.take_along_axis(node_BN, pick(parent_BN), axis=1)
    walk_BW = jnp.broadcast_to(jnp.arange(W)[None], (B, W))
    above_BWW = walk_BW[..., None] == jnp.arange(W)[None, None]
    for _ in range(levels):
        walk_BW = jnp.take_along_axis(parent_BW, walk_BW, axis=1)
        above_BWW |= walk_BW[..., None] == jnp.arange(W)[None, None]
    return Nodes(pick(token_BN), parent_BW, pick(depth_BN), above_BWW, pick(score_BN))


def root_only(root_B: jax.Array) -> Nodes:
    """The tree without drafts: plain decoding."""
    zero_B1 = jnp.zeros((root_B.shape[0], 1), jnp.int32)
    return Nodes(
        root_B[:, None],
        zero_B1,
        zero_B1,
        jnp.ones((root_B.shape[0], 1, 1), bool),
        jnp.zeros((root_B.shape[0], 1)),
    )

"""Grows a tree of drafts level by level (method.md 6.2, 6.4, 8).

A drafter predicts one level at a time (`TreeDrafter.level`). The tree decides which children are
kept, continued and verified. True states are kept in the drafter's own state. Predicted states are
only in arrays of the current round, so a rejected draft needs no rollback.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray
from beagle_jax.decoding.drafter import Drafter, Draw, Known, Proposal, State
from beagle_jax.decoding.nodes import Nodes, chosen_nodes
from beagle_jax.decoding.top_k import top_k
from beagle_jax.decoding.tree import GrownTree, Tree
from beagle_jax.model.precision import exact


class Frontier(NamedTuple):
    """The queries of one level, T of them. Q: all queries of the levels above."""

    depth: int  # of the queries; that of the root is 0; static
    length_B: jax.Array  # the root's position
    token_BT: jax.Array
    sees_BTQ: jax.Array  # the strict ancestors of each query
    before_BTD: jax.Array | None  # the predicted state of each query's parent; the root has none
    memory: Any  # the output `memory` of the level above; None at the root


class LevelOutput(NamedTuple):
    """Predictions of a drafter for one level."""

    state_BTD: jax.Array  # predicted state of each query's token
    logits_VM: jax.Array  # of the token after each query, as columns (M = B * T, B outermost)
    memory: Any  # input of the next level; after the last level it is unused and not computed


class Grown(NamedTuple):
    """A grown tree with its queries. Q: all queries of a round, by level, the root first."""

    nodes: Nodes
    state_BQD: jax.Array  # predicted state of each query's token
    query_token_BQ: jax.Array
    query_sees_BQQ: jax.Array  # draft mask: strict ancestors among the queries
    logits_BPV: jax.Array | None  # filtered logits along a drawn chain, over the draft's vocabulary


class TreeDrafter(Drafter):
    """A drafter that predicts one level at a time; `grow` builds the tree.

    ids_V: token id of each of its logits; None: logit v belongs to token v.
    """

    ids_V: AnyArray | None = None

    def level(self, state: State, frontier: Frontier) -> LevelOutput:
        """Predicts one level, from true states in `state` and predicted states in `frontier`."""
        raise NotImplementedError

    def propose(self, state: State, known: Known, tree: Tree, draw: Draw | None) -> Proposal:
        """Grows the tree. A drawn chain also returns its logits over the whole vocabulary."""
        grown = grow(self, state, known, tree.grown, draw)
        return Proposal(grown.nodes, grown.logits_BPV)


_Candidates = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # token, parent, depth, score


@dataclass(frozen=True)
class _Level:
    """A frontier with its place in the tree."""

    frontier: Frontier
    candidate_BT: jax.Array  # index of each query among all candidates, from 1; the root has 0
    score_BT: jax.Array  # cumulative log-probability (zero in trees that need no scores)


@exact
def grow(
    drafter: TreeDrafter, state: State, known: Known, tree: GrownTree, draw: Draw | None = None
) -> Grown:
    """Drafts below the root: the best children of each query, or drawn tokens for a chain.

    Drawn tokens come from the draft's distribution, one per level.
    """
    B = known.root_B.shape[0]
    zero_B1, score_B1 = jnp.zeros((B, 1), jnp.int32), jnp.zeros((B, 1), jnp.float32)
    nothing_B10 = jnp.zeros((B, 1, 0), bool)
    root = Frontier(0, known.length_B, known.root_B[:, None], nothing_B10, None, None)
    level = _Level(root, zero_B1, score_B1)
    # token, parent, depth, score; the root first
    candidates = [(root.token_BT, zero_B1, zero_B1, score_B1)]
    states, queries, sees, drawn = [], [], [], []
    for depth in range(tree.depth):
        frontier = level.frontier
        with jax.named_scope(f"draft_{depth + 1}"):
            output = drafter.level(state, frontier)
            states.append(output.state_BTD)
            queries.append(frontier.token_BT)
            sees.append(frontier.sees_BTQ)
            if draw is None:
                index_BA, score_BA = _best_children(tree, level, output.logits_VM)
            else:
                index_B, logits_BV = draw.choose(output.logits_VM.T, depth)
                index_BA, score_BA = index_B[:, None], level.score_BT
                drawn.append(logits_BV)
            token_BA = _tokens(drafter.ids_V, index_BA)
            first = sum(token.shape[1] for token, *_ in candidates)
            candidates.append(_entries(level, token_BA, score_BA))
            if depth + 1 < tree.depth:
                level = _next_level(tree, level, first, token_BA, score_BA, output)
    token_BZ, parent_BZ, depth_BZ, score_BZ = (
        jnp.concatenate(each, axis=1) for each in zip(*candidates, strict=True)
    )
    chosen_BW = tree.chosen(score_BZ[:, 1:]) + 1
    nodes = chosen_nodes(chosen_BW, token_BZ, parent_BZ, depth_BZ, score_BZ, tree.depth)
    state_BQD, token_BQ, sees_BQQ = (
        jnp.concatenate(each, axis=1) for each in (states, queries, _same_width(sees))
    )
    return Grown(nodes, state_BQD, token_BQ, sees_BQQ, jnp.stack(drawn, axis=1) if drawn else None)


def _same_width(masks: list[jax.Array]) -> list[jax.Array]:
    """Pads the mask of each level, [B, T, Q so far], to the queries of all levels."""
    count = sum(mask.shape[1] for mask in masks)
    return [jnp.pad(mask, ((0, 0), (0, 0), (0, count - mask.shape[2]))) for mask in masks]


def _best_children(
    tree: GrownTree, level: _Level, logits_VM: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the k best children of each query, in (query, rank) order.

    Returns their logit indices and cumulative log-probabilities, both [B, T * k].
    """
    (B, T), k = level.score_BT.shape, tree.kept_children(level.frontier.depth)
    if k == 1 and not tree.scored:
        best_BTk = jnp.argmax(logits_VM, axis=0).reshape(B, T, 1)
        score_BTk = jnp.zeros((B, T, 1), jnp.float32)
    else:
        # The barrier keeps XLA from computing the product by rows. Where that was measured is in
        # model/target.py, best_tokens.
        logits_BTV = jax.lax.optimization_barrier(logits_VM).T.reshape(B, T, -1)
        top_BTk, best_BTk = top_k(logits_BTV, k)
        score_BTk = jnp.zeros_like(top_BTk)
        if tree.scored:
            total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
            score_BTk = level.score_BT[..., None] + jnp.minimum(top_BTk - total_BT[..., None], 0.0)
            # A draft that overflows scores NaN, which top_k sorts before all numbers. That would
            # select a child without its parent.
            score_BTk = jnp.where(score_BTk > -jnp.inf, score_BTk, -jnp.inf)
    return best_BTk.reshape(B, T * k), score_BTk.reshape(B, T * k)


def _tokens(ids_V: AnyArray | None, index: jax.Array) -> jax.Array:
    """Maps indices of the draft's logits to token ids."""
    return (index if ids_V is None else ids_V[index]).astype(jnp.int32)


def _entries(level: _Level, token_BA: jax.Array, score_BA: jax.Array) -> _Candidates:
    """Returns the children of a level as candidates: token, parent, depth, score."""
    per_query = token_BA.shape[1] // level.score_BT.shape[1]
    parent_BA = jnp.repeat(level.candidate_BT, per_query, axis=1)
    return token_BA, parent_BA, jnp.full_like(parent_BA, level.frontier.depth + 1), score_BA


def _next_level(
    tree: GrownTree,
    level: _Level,
    first: int,
    token_BA: jax.Array,
    score_BA: jax.Array,
    output: LevelOutput,
) -> _Level:
    """Returns the level of the continued children.

    first: index of this level's first candidate among all candidates.
    """
    now = level.frontier
    B, T = now.token_BT.shape
    pick_BX = tree.next_queries(now.depth, score_BA)

    def pick(x_BA: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BA, pick_BX, axis=1)

    # A child sees the queries that its parent sees, and its parent.
    itself_BTT = jnp.broadcast_to(jnp.eye(T, dtype=bool)[None], (B, T, T))
    below_BTQ = jnp.concatenate([now.sees_BTQ, itself_BTT], axis=2)
    parent_BX = pick_BX // (token_BA.shape[1] // T)

    def of_parent(x_BTQ: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BTQ, parent_BX[..., None], axis=1)

    frontier = Frontier(
        now.depth + 1,
        now.length_B,
        pick(token_BA),
        of_parent(below_BTQ),
        of_parent(output.state_BTD),
        output.memory,
    )
    return _Level(frontier, pick_BX + first, pick(score_BA))

"""Growing a tree of drafts level by level (method.md 6.2, 6.4, 8).

A drafter predicts one level at a time (`TreeDrafter.level`); which children are kept, continued and
verified is decided here, by the tree. True states live in the drafter's own state; predicted ones
only in arrays that end with the round, so nothing has to be rolled back.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray
from beagle_jax.decoding.drafter import Drafter, Draw, Known, Proposal, State
from beagle_jax.decoding.nodes import Nodes, chosen_nodes
from beagle_jax.decoding.tree import Tree
from beagle_jax.model.precision import exact


class Frontier(NamedTuple):
    """The queries of one level, T of them. Q: all queries of the levels above."""

    depth: int  # of the queries, the root's is 0; static
    length_B: jax.Array  # the root's position
    token_BT: jax.Array
    sees_BTQ: jax.Array  # the strict ancestors of each query
    before_BTD: jax.Array | None  # the predicted state of each query's parent; the root has none
    memory: Any  # what `level` returned for the level above; None at the root


class LevelOutput(NamedTuple):
    """What a drafter predicts for a level."""

    state_BTD: jax.Array  # of each query's token
    logits_VM: jax.Array  # of the token after each, as columns (M = B * T, sequences first)
    memory: Any  # for the level below; unused after the last level, and then not computed


class Grown(NamedTuple):
    """A grown tree, and how it grew. Q: all queries of a round, level by level, the root first."""

    nodes: Nodes
    state_BQD: jax.Array  # predicted state of each query's token
    query_token_BQ: jax.Array
    query_sees_BQQ: jax.Array  # draft mask: strict ancestors among the queries
    logits_BPV: jax.Array | None  # filtered logits along a drawn chain, over the draft's vocabulary


class TreeDrafter(Drafter):
    """A drafter whose tree is grown outside.

    ids_V: the token that each of its logits stands for; None: logit v is of token v.
    """

    ids_V: AnyArray | None = None

    def level(self, state: State, frontier: Frontier) -> LevelOutput:
        """Predicts one level. True states are in `state`, predicted ones in the frontier."""
        raise NotImplementedError

    def propose(self, state: State, known: Known, tree: Tree, draw: Draw | None) -> Proposal:
        """Grows the tree; of a drawn chain with the logits over the whole vocabulary."""
        grown = grow(self, state, known, tree, draw)
        return Proposal(grown.nodes, grown.logits_BPV)


_Candidates = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # token, parent, depth, score


@dataclass(frozen=True)
class _Level:
    """A frontier with its place in the tree."""

    frontier: Frontier
    candidate_BT: jax.Array  # each query's place among all candidates, from 1; 0 for the root
    score_BT: jax.Array  # cumulative log-probability (zero in trees that need no scores)


@exact
def grow(
    drafter: TreeDrafter, state: State, known: Known, tree: Tree, draw: Draw | None = None
) -> Grown:
    """Drafts below the root: the best children of each query, or one draw from the draft's
    distribution in a chain.
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
    """Each level's mask [B, T, Q so far] over the queries of all levels."""
    count = sum(mask.shape[1] for mask in masks)
    return [jnp.pad(mask, ((0, 0), (0, 0), (0, count - mask.shape[2]))) for mask in masks]


def _best_children(tree: Tree, level: _Level, logits_VM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logit index and cumulative log-probability [B, T * k] of each query's k best children, in
    (query, rank) order.
    """
    (B, T), k = level.score_BT.shape, tree.kept_children(level.frontier.depth)
    if k == 1 and not tree.scored:
        best_BTk = jnp.argmax(logits_VM, axis=0).reshape(B, T, 1)
        score_BTk = jnp.zeros((B, T, 1), jnp.float32)
    else:
        # The barrier keeps XLA from turning the product round to rows, which is slower
        # (model/target.py).
        logits_BTV = jax.lax.optimization_barrier(logits_VM).T.reshape(B, T, -1)
        top_BTk, best_BTk = jax.lax.top_k(logits_BTV, k)
        score_BTk = jnp.zeros_like(top_BTk)
        if tree.scored:
            total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
            score_BTk = level.score_BT[..., None] + jnp.minimum(top_BTk - total_BT[..., None], 0.0)
            # A draft that overflows may be wrong, but not choose a child without its parent: NaN
            # would come before all numbers.
            score_BTk = jnp.where(score_BTk > -jnp.inf, score_BTk, -jnp.inf)
    return best_BTk.reshape(B, T * k), score_BTk.reshape(B, T * k)


def _tokens(ids_V: AnyArray | None, index: jax.Array) -> jax.Array:
    """The tokens that indices of the draft's logits stand for."""
    return (index if ids_V is None else ids_V[index]).astype(jnp.int32)


def _entries(level: _Level, token_BA: jax.Array, score_BA: jax.Array) -> _Candidates:
    """A level's children as candidates: token, parent, depth, score."""
    per_query = token_BA.shape[1] // level.score_BT.shape[1]
    parent_BA = jnp.repeat(level.candidate_BT, per_query, axis=1)
    return token_BA, parent_BA, jnp.full_like(parent_BA, level.frontier.depth + 1), score_BA


def _next_level(
    tree: Tree,
    level: _Level,
    first: int,
    token_BA: jax.Array,
    score_BA: jax.Array,
    output: LevelOutput,
) -> _Level:
    """The children that are continued. first: the place of this level's first candidate among
    all.
    """
    now = level.frontier
    B, T = now.token_BT.shape
    pick_BX = tree.next_queries(now.depth, score_BA)

    def pick(x_BA: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BA, pick_BX, axis=1)

    # A child sees what its parent saw, and its parent.
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

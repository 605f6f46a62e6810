"""Times of parts of a round, each alone in a loop on the device.

A loop makes several passes in one program, as decoding does. A call of its own for each pass would
include the time to pass hundreds of weights to it, which is milliseconds.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from beagle_jax.decoding.drafter import Drafter, Known, NoDrafter, Proposal, State
from beagle_jax.decoding.engine import begin
from beagle_jax.decoding.nodes import Nodes
from beagle_jax.decoding.round import Round, TargetModel
from beagle_jax.decoding.rules import RULES
from beagle_jax.decoding.sampling import GREEDY, Sampling, filters_of, knobs_of
from beagle_jax.decoding.state import DecodeState, constrained, place_state
from beagle_jax.decoding.top_k import split_over
from beagle_jax.decoding.trained import TrainedDrafter
from beagle_jax.decoding.tree import (
    ROOT_ONLY,
    DynamicTree,
    StaticTree,
    Tree,
    candidates,
    dynamic_tree,
)
from beagle_jax.model.cache import KVRows
from beagle_jax.model.precision import exact
from beagle_jax.model.target import Params, TargetSpec, best_tokens, forward, init_cache
from beagle_jax.weights.target import Target

PASSES = 4  # passes in one timed call
_REPEATS = 7
_CAPACITY = 256  # cache slots of one pass
_DEEPEST = 4  # levels of a tree that is verified, but for small trees


class Situation(NamedTuple):
    """How answers are decoded while the costs of a round are measured."""

    batch: int = 1  # rows
    capacity: int = _CAPACITY  # cache slots of a row, half of them in use
    sampling: Sampling = GREEDY


ALONE = Situation()
_NO_DRAFTER = NoDrafter()


@dataclass(frozen=True)
class Passes:
    """A call that repeats its work several times in one program."""

    call: Callable[[], Any]
    count: int


def compiled(works: Sequence[Passes]) -> None:
    """Calls each once, two at a time: most of a compilation runs on one core."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda work: jax.block_until_ready(work.call()), works))


def milliseconds(work: Passes) -> float:
    """Returns the median time of one pass; the first call is not timed."""
    jax.block_until_ready(work.call())
    seconds = []
    for _ in range(_REPEATS):
        clock = time.perf_counter()
        jax.block_until_ready(work.call())
        seconds.append(time.perf_counter() - clock)
    return 1000 * float(np.median(seconds)) / work.count


class Held:
    """A decoding state that each call takes and returns, donated as in decoding."""

    def __init__(self, now: Round, state: DecodeState) -> None:
        self._now, self._state = now, state

    def __call__(self) -> jax.Array:
        """Runs `PASSES` rounds."""
        self._state = _rounds(self._now, self._state)
        return self._state.transcript.root_B


@partial(jax.jit, donate_argnames="state")
@exact
def _rounds(now: Round, state: DecodeState) -> DecodeState:
    def again(_: jax.Array, state: DecodeState) -> DecodeState:
        return now.run(state)[0]

    return constrained(jax.lax.fori_loop(0, PASSES, again, state), now.mesh)


def ending(
    target: Target,
    nodes: int,
    mesh: Mesh | None = None,
    where: Situation = ALONE,
    drafter: Drafter = _NO_DRAFTER,
) -> Passes:
    """Returns a call of rounds of `nodes` nodes that are not drafted, `PASSES` times.

    A round reads the nodes, accepts, and appends what it accepted, for the target and the drafter.
    One node is a round of plain decoding. mesh: over which the target is split.
    """
    model, filters = TargetModel(target.spec, target.params), filters_of([where.sampling])
    if nodes == 1:
        now = Round(model, _NO_DRAFTER, ROOT_ONLY, target.eos_ids, filters=filters, mesh=mesh)
    else:
        rule = RULES["match"]
        now = Round(model, drafter, _some_tree(nodes), target.eos_ids, rule, filters, mesh)
        now = now.with_(propose=_given)
    state = begin(now, batch=where.batch, capacity=where.capacity)
    knobs = jax.tree.map(jnp.asarray, knobs_of([where.sampling] * where.batch))
    full_B = jnp.full(where.batch, where.capacity, jnp.int32)
    state = state._replace(
        cache=state.cache.with_(length_B=full_B // 2),
        requests=state.requests._replace(limit_B=full_B, knobs=knobs),
        transcript=state.transcript._replace(done_B=jnp.zeros(where.batch, bool)),
    )
    embed_VD = target.params["embed_VD"]
    if mesh is None and embed_VD.committed:  # as the states that follow, or jit compiles twice
        state = jax.device_put(state, embed_VD.sharding)
    return Passes(Held(now, state), PASSES)


def _some_tree(nodes: int) -> StaticTree:
    """Returns a tree of so many nodes: a chain, and then children of the root."""
    levels = min(_DEEPEST, nodes - 1)
    deep = [(0,) * depth for depth in range(1, levels + 1)]
    return StaticTree((*deep, *((rank,) for rank in range(1, nodes - levels))))


def _given(now: Round, state: DecodeState) -> Proposal:
    """Returns nodes of the round's tree that depend on the root, in place of a draft."""
    tree, root_B1 = now.tree, state.transcript.root_B[:, None]
    assert isinstance(tree, StaticTree)
    W, B = tree.size, len(root_B1)
    above_WW = np.eye(W, dtype=bool)
    for node in range(1, W):
        above_WW[node] |= above_WW[tree.parent_W[node]]
    token_BW = (root_B1 + jnp.arange(W)[None] * 7919) % now.target.spec.vocab_size
    parent_BW, depth_BW = (
        jnp.broadcast_to(x_W[None], (B, W)) for x_W in (tree.parent_W, tree.depth_W)
    )
    above_BWW = jnp.broadcast_to(above_WW[None], (B, W, W))
    return Proposal(Nodes(token_BW, parent_BW, depth_BW, above_BWW, jnp.zeros((B, W))))


@partial(jax.jit, static_argnames="spec")
def _verified(
    params: Params,
    spec: TargetSpec,
    token_BW: jax.Array,
    cache: Sequence[KVRows],
    visible_BS: jax.Array,
) -> jax.Array:
    """Runs passes in one loop, as decoding does.

    A call of its own for each pass would include the time to pass hundreds of weights to it, which
    is milliseconds.
    """
    B, W = token_BW.shape
    mask_BWW = jnp.broadcast_to(jnp.tril(jnp.ones((W, W), bool))[None], (B, W, W))
    positions_BW = jnp.broadcast_to(_CAPACITY + jnp.arange(W)[None], (B, W))

    def read(_: jax.Array, token_BW: jax.Array) -> jax.Array:
        verified = forward(params, spec, token_BW, positions_BW, mask_BWW, cache, visible_BS)
        return best_tokens(params, verified.states_BTD)[0]

    return jax.lax.fori_loop(0, PASSES, read, token_BW)


def verifying(target: Target, rows: int, mesh: Mesh | None = None) -> Passes:
    """Returns a call that verifies `rows` nodes greedily, `PASSES` times.

    mesh: over which the target is split.
    """
    cache = place_state(init_cache(target.spec, 1, _CAPACITY, target.dtype), mesh)
    tokens, visible = jnp.zeros((1, rows), jnp.int32), jnp.ones((1, _CAPACITY), bool)
    return Passes(lambda: _verified(target.params, target.spec, tokens, cache, visible), PASSES)


@partial(jax.jit, static_argnames=("tree", "mesh"))
def _drafted(
    drafter: TrainedDrafter, tree: Tree, state: State, known: Known, mesh: Mesh | None
) -> jax.Array:
    def read(_: jax.Array, root_B: jax.Array) -> jax.Array:
        with split_over(mesh):
            proposal = drafter.propose(state, known._replace(root_B=root_B), tree, None)
        return proposal.nodes.token_BW[:, -1]

    return jax.lax.fori_loop(0, PASSES, read, known.root_B)


def drafting(
    drafter: TrainedDrafter, tree: Tree, mesh: Mesh | None = None, where: Situation = ALONE
) -> Passes:
    """Returns a call that drafts this tree `PASSES` times.

    mesh: over which the draft is split.
    """
    state = place_state(drafter.init(where.batch, where.capacity), mesh)
    half_B = jnp.full(where.batch, where.capacity // 2)
    known = Known(jnp.zeros(where.batch, jnp.int32), half_B)
    return Passes(lambda: _drafted(drafter, tree, state, known, mesh), PASSES)


def small_tree(levels: int, topk: int) -> DynamicTree:
    """Returns a tree with few nodes: choosing them is part of the cost of drafting."""
    return dynamic_tree(levels, topk, min(8, candidates(levels, topk) + 1))

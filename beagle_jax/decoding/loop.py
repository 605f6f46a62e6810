"""The decoding loop: draft, verify, accept, append, inside one jitted while loop with donated caches.

Plain decoding is the same loop with the tree of the root alone. Nothing reaches the host between rounds, and nothing
depends on the prompt but array contents, so a shape compiles once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.decoding.batch import is_stop
from beagle_jax.decoding.draft import DraftHead, draft_tree
from beagle_jax.decoding.tree import Tree
from beagle_jax.decoding.verify import Accepted, accept_greedy
from beagle_jax.model.beagle import BeagleBlock, DraftSpec
from beagle_jax.model.cache import KVRows, empty_rows, take_rows, visible_slots, write_all, write_rows
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import Params, TargetSpec, best_tokens, forward, head, init_cache


class Models(NamedTuple):
    """All weights that a round reads. Arguments of the jitted loop, never constants in it."""

    target: Params
    draft: dict[str, jax.Array] | None  # None: plain decoding
    draft_head: DraftHead | None


class Shapes(NamedTuple):
    """All that is static in a round. Hashable."""

    target: TargetSpec
    draft: DraftSpec | None
    tree: Tree
    eos_ids: tuple[int, ...]


class DecodeState(NamedTuple):
    """Everything on the device between two rounds; donated from call to call."""

    target_cache: list[KVRows]  # rows of the tokens at positions below length_B
    draft_cache: KVRows | None  # keys and values of their true states, never of predicted ones
    length_B: jax.Array  # tokens in the caches; the root sits at this position
    root_B: jax.Array  # last known token, without a state yet
    out_BT: jax.Array  # answer so far, the prefill's token first
    count_B: jax.Array  # how many tokens of it
    limit_B: jax.Array  # stop at this many
    done_B: jax.Array
    rounds_B: jax.Array  # rounds run, the prefill not counted
    accepted_BP1: jax.Array  # histogram: rounds that accepted 0, 1, .. P drafts


@partial(jax.jit, static_argnames=("shapes", "capacity", "max_new"))
def prefill(
    models: Models,
    shapes: Shapes,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    *,
    capacity: int,
    max_new: int,
) -> DecodeState:
    """Reads right-padded prompts; fills both caches and chooses the first token of each answer.

    limit_B: tokens each answer may have, at most max_new. capacity must hold prompt, answer and one round's overhang.
    """
    spec = shapes.target
    B, T = tokens_BT.shape
    dtype = models.target["embed_VD"].dtype
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    states_BTD, rows = forward(models.target, spec, tokens_BT, positions_BT, causal_mask(length_B, T))
    last_BD = jnp.take_along_axis(states_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]
    root_B = best_tokens(models.target, last_BD)
    start_B = jnp.zeros(B, jnp.int32)
    draft_cache = None
    if models.draft is not None:
        block = BeagleBlock(shapes.draft).bind({"params": models.draft})
        empty = empty_rows(B, shapes.draft.num_kv_heads, capacity, shapes.draft.head_dim, dtype)
        draft_cache = write_rows(empty, block.keys_values(states_BTD, positions_BT), start_B)
    return DecodeState(
        target_cache=write_all(init_cache(spec, B, capacity, dtype), rows, start_B),
        draft_cache=draft_cache,
        length_B=length_B,
        root_B=root_B,
        out_BT=jnp.zeros((B, max_new), jnp.int32).at[:, 0].set(root_B),
        count_B=jnp.ones(B, jnp.int32),
        limit_B=limit_B,
        done_B=is_stop(root_B, shapes.eos_ids) | (limit_B <= 1),
        rounds_B=jnp.zeros(B, jnp.int32),
        accepted_BP1=jnp.zeros((B, shapes.tree.depth + 1), jnp.int32),
    )


@partial(jax.jit, static_argnames=("shapes",), donate_argnames=("state",))
def decode(models: Models, shapes: Shapes, state: DecodeState, max_rounds: jax.Array) -> DecodeState:
    """Runs rounds until every answer is finished, or `max_rounds` of them (for streaming)."""

    def body(carry):
        index, now = carry
        return index + 1, _round(models, shapes, now)

    unfinished = lambda carry: (carry[0] < max_rounds) & ~carry[1].done_B.all()
    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def _round(models: Models, shapes: Shapes, now: DecodeState) -> DecodeState:
    """One round for every sequence; finished ones compute along and change nothing that counts."""
    tree, spec = shapes.tree, shapes.target
    B, W = now.root_B.shape[0], tree.size
    with jax.named_scope("draft"):
        token_BW = now.root_B[:, None]
        if tree.depth:
            token_BW, _ = draft_tree(
                models.draft, shapes.draft, tree, models.target["embed_VD"], models.draft_head,
                now.draft_cache, now.length_B, now.root_B,
            )  # fmt: skip
    with jax.named_scope("verify"):
        positions_BW = now.length_B[:, None] + jnp.asarray(tree.depth_W)[None]
        mask_BWW = jnp.broadcast_to(jnp.asarray(tree.ancestors_or_self_WW), (B, W, W))
        visible_BS = visible_slots(now.length_B, now.target_cache)
        states_BWD, rows = forward(
            models.target, spec, token_BW, positions_BW, mask_BWW, now.target_cache, visible_BS
        )
        best_BW = best_tokens(models.target, states_BWD)
    with jax.named_scope("accept"):
        found = accept_greedy(tree, token_BW, best_BW)
    with jax.named_scope("append"):
        # Rows of the accepted path only, and their true states: rows past it are overwritten by the next round.
        # The picked rows depend on the verification, so XLA can update the caches in place after reading them.
        kept = [take_rows(layer, found.path_BP1) for layer in rows]
        target_cache = write_all(now.target_cache, kept, now.length_B)
        draft_cache = now.draft_cache
        if models.draft is not None:
            block = BeagleBlock(shapes.draft).bind({"params": models.draft})
            states_BPD = jnp.take_along_axis(states_BWD, found.path_BP1[..., None], axis=1)
            positions_BP = now.length_B[:, None] + jnp.arange(tree.depth + 1)[None]
            draft_cache = write_rows(draft_cache, block.keys_values(states_BPD, positions_BP), now.length_B)
    return _emit(now, found, target_cache, draft_cache, shapes.eos_ids)


def _emit(now: DecodeState, found: Accepted, target_cache, draft_cache, eos_ids: tuple[int, ...]) -> DecodeState:
    """Writes the round's tokens: up to the first stop token, and never past the limit."""
    B, P1 = found.token_BP1.shape
    step_1P = jnp.arange(P1)[None]
    stop_BP = is_stop(found.token_BP1, eos_ids) & (step_1P <= found.count_B[:, None])
    to_stop_B = jnp.where(stop_BP.any(axis=1), jnp.argmax(stop_BP, axis=1) + 1, found.count_B + 1)
    emitted_B = jnp.minimum(to_stop_B, now.limit_B - now.count_B)
    emitted_B = jnp.where(now.done_B, 0, emitted_B)
    column_BP = jnp.where(step_1P < emitted_B[:, None], now.count_B[:, None] + step_1P, now.out_BT.shape[1])
    count_B = now.count_B + emitted_B
    stopped_B = (stop_BP & (step_1P < emitted_B[:, None])).any(axis=1)
    live_B = ~now.done_B
    return DecodeState(
        target_cache=target_cache,
        draft_cache=draft_cache,
        length_B=now.length_B + jnp.where(live_B, found.count_B + 1, 0),
        root_B=jnp.where(live_B, found.bonus_B, now.root_B),
        out_BT=now.out_BT.at[jnp.arange(B)[:, None], column_BP].set(found.token_BP1, mode="drop"),
        count_B=count_B,
        limit_B=now.limit_B,
        done_B=now.done_B | stopped_B | (count_B >= now.limit_B),
        rounds_B=now.rounds_B + live_B,
        accepted_BP1=now.accepted_BP1 + (live_B[:, None] & (step_1P == found.count_B[:, None])),
    )


def draft_head_of(target: Params, hot_ids: jax.Array | None) -> DraftHead:
    """The part of the target's head that the draft uses."""
    head_VD = head(target)
    return DraftHead(head_VD, None) if hot_ids is None else DraftHead(head_VD[hot_ids], hot_ids)

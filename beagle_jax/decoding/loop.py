"""The decoding loop: draft, verify, accept, append, inside one jitted while loop with donated
caches.

Plain decoding is the same loop with the tree of the root alone. Nothing reaches the host between
rounds, and nothing depends on the prompt but array contents, so a shape compiles once.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from beagle_jax.decoding.draft import Drafted, DraftHead, Nodes, draft_tree, root_only
from beagle_jax.decoding.lookup import Lookup, lookup_chain
from beagle_jax.decoding.sampling import Sampling, choose, filtered, gumbel, is_stop, place_keys
from beagle_jax.decoding.tree import Tree
from beagle_jax.decoding.verify import Accepted, accept_by_ratio, accept_matching
from beagle_jax.model.beagle import DraftSpec
from beagle_jax.model.cache import (
    KVRows,
    empty_rows,
    take_rows,
    visible_slots,
    write_all,
    write_rows,
)
from beagle_jax.model.kinds import block_of
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.precision import exact
from beagle_jax.model.target import (
    Params,
    TargetSpec,
    best_tokens,
    embed,
    forward,
    head,
    init_cache,
    logits,
)
from beagle_jax.sharding import shard_cache

# What a place's key is folded with, so that its draws are independent of each other.
_FOR_TARGET, _FOR_DRAFT, _FOR_ACCEPTING = 0, 1, 2


class Models(NamedTuple):
    """All weights that a round reads. Arguments of the jitted loop, never constants in it."""

    target: Params
    draft: dict[str, jax.Array] | None  # None: plain decoding, or prompt lookup
    draft_head: DraftHead | None


class Shapes(NamedTuple):
    """All that is static in a round. Hashable."""

    target: TargetSpec
    draft: DraftSpec | Lookup | None
    tree: Tree
    eos_ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    rule: Literal["match", "ratio"] = (
        "match"  # how drawn drafts are accepted; ratio: Leviathan's, chains only
    )
    append_predicted: bool = True
    mesh: Mesh | None = None


class DecodeState(NamedTuple):
    """Everything on the device between two rounds; donated from call to call."""

    target_cache: list[KVRows]  # rows of the tokens at positions below length_B
    draft_cache: KVRows | None  # keys and values of their true states, never of predicted ones
    last_B1D: (
        jax.Array | None
    )  # the last of these states; None for drafts whose root is not fused with it
    length_B: jax.Array  # tokens in the caches; the root sits at this position
    root_B: jax.Array  # last known token, without a state yet
    out_BS: jax.Array  # answer so far, the prefill's token first
    count_B: jax.Array  # how many tokens of it
    limit_B: jax.Array  # stop at this many
    done_B: jax.Array
    broken_B: jax.Array  # the target's logits were not finite
    rounds_B: jax.Array  # rounds run, the prefill not counted
    accepted_BS: jax.Array  # accepted draft tokens of each round, as far as they were emitted
    key_B: jax.Array  # of every draw of the sequence (sampling.place_keys)
    text_BS: (
        jax.Array | None
    )  # prompt lookup: all tokens by position, the root the last; garbage past it


class Report(NamedTuple):
    """What the host reads after some rounds: copies, so that the state can be donated on."""

    out_BS: jax.Array
    count_B: jax.Array
    done_B: jax.Array
    broken_B: jax.Array
    rounds_B: jax.Array
    accepted_BS: jax.Array


def report(state: DecodeState) -> Report:
    """The part of a state that the host reads."""
    return Report(*(getattr(state, name) for name in Report._fields))


@partial(jax.jit, static_argnames=("shapes", "capacity"))
def begin(
    models: Models, shapes: Shapes, limit_B: jax.Array, key_B: jax.Array, *, capacity: int
) -> DecodeState:
    """Empty caches of `capacity` slots, which must hold prompt, answer and one round's overhang.

    limit_B: tokens each answer may have.
    """
    B, dtype = limit_B.shape[0], models.target["embed_VD"].dtype

    def zeros(*shape):
        return jnp.zeros((B, *shape), jnp.int32)

    draft_cache, last_B1D = None, None
    if isinstance(shapes.draft, DraftSpec):
        draft_cache = empty_rows(
            B, shapes.draft.num_kv_heads, capacity, shapes.draft.head_dim, dtype
        )
        last_B1D = (
            jnp.zeros((B, 1, shapes.draft.hidden_size), dtype) if shapes.draft.fused else None
        )
    return DecodeState(
        target_cache=shard_cache(init_cache(shapes.target, B, capacity, dtype), shapes.mesh),
        draft_cache=draft_cache,
        last_B1D=last_B1D,
        length_B=zeros(),
        root_B=zeros(),
        out_BS=zeros(capacity),
        count_B=zeros(),
        limit_B=limit_B,
        done_B=jnp.zeros(B, bool),
        broken_B=jnp.zeros(B, bool),
        rounds_B=zeros(),
        accepted_BS=zeros(capacity),
        key_B=key_B,
        text_BS=zeros(capacity) if isinstance(shapes.draft, Lookup) else None,
    )


@partial(jax.jit, static_argnames=("shapes", "first"), donate_argnames=("state",))
@exact
def read_prompt(
    models: Models,
    shapes: Shapes,
    state: DecodeState,
    tokens_BT: jax.Array,
    offset: jax.Array,
    length_B: jax.Array,
    *,
    first: bool,
) -> DecodeState:
    """Reads one chunk of right-padded prompts: positions offset .. offset + T - 1, `first` when
    offset is 0.

    Fills both caches (the draft's with the projection of the target's states, method.md 6.1) and,
    in rows whose prompt ends in this chunk, chooses the first token of the answer. length_B: of the
    whole prompts.
    """
    spec, (B, T) = shapes.target, tokens_BT.shape
    positions_BT = jnp.broadcast_to(offset + jnp.arange(T)[None], (B, T))
    here_B = jnp.clip(length_B - offset, 0, T)  # tokens of this chunk
    start_B = jnp.broadcast_to(offset, (B,))
    past = () if first else (state.target_cache, visible_slots(start_B, state.target_cache))
    states_BTD, rows = forward(
        models.target, spec, tokens_BT, positions_BT, causal_mask(here_B, T), *past
    )
    ends_B = (length_B > offset) & (length_B <= offset + T)
    last_B1D = jnp.take_along_axis(states_BTD, jnp.maximum(here_B - 1, 0)[:, None, None], axis=1)
    wanted_B1, finite_B1 = _target_choice(
        models, shapes, last_B1D, state.key_B, jnp.zeros((B, 1), jnp.int32)
    )
    root_B = jnp.where(ends_B, wanted_B1[:, 0], state.root_B)
    draft_cache = state.draft_cache
    if draft_cache is not None:
        draft_cache = _read_states(
            models, shapes, state, states_BTD, tokens_BT, root_B, offset, length_B, first
        )
    if state.last_B1D is None:
        last_B1D = None
    else:
        last_B1D = jnp.where((here_B > 0)[:, None, None], last_B1D, state.last_B1D)
    text_BS, length_now_B = state.text_BS, state.length_B + here_B
    if text_BS is not None:
        text_BS = jax.lax.dynamic_update_slice(text_BS, tokens_BT, (0, offset))
        text_BS = text_BS.at[jnp.arange(B), length_now_B].set(root_B, mode="drop")
    broken_B = state.broken_B | (ends_B & ~finite_B1[:, 0])
    return state._replace(
        target_cache=write_all(state.target_cache, rows, start_B),
        draft_cache=draft_cache,
        last_B1D=last_B1D,
        text_BS=text_BS,
        length_B=length_now_B,
        root_B=root_B,
        out_BS=state.out_BS.at[:, 0].set(root_B),
        count_B=jnp.where(ends_B, 1, state.count_B),
        done_B=state.done_B
        | broken_B
        | (ends_B & (is_stop(root_B, shapes.eos_ids) | (state.limit_B <= 1))),
        broken_B=broken_B,
    )


def _read_states(
    models: Models,
    shapes: Shapes,
    state: DecodeState,
    states_BTD: jax.Array,
    tokens_BT: jax.Array,
    root_B: jax.Array,
    offset: jax.Array,
    length_B: jax.Array,
    first: bool,
) -> KVRows:
    """The draft's cache after a chunk of a prompt.

    The token after a state belongs to EAGLE's row of it. After a chunk's last one it comes with the
    next chunk, which begins with that row; after a prompt's last one it is the root.
    """
    B, T = tokens_BT.shape
    before = int(shapes.draft.fused and not first)
    held_BTD = jnp.concatenate([state.last_B1D, states_BTD], axis=1) if before else states_BTD
    held_BT = (offset - before + jnp.arange(T + before))[None]
    next_BT = jnp.concatenate([tokens_BT, root_B[:, None]], axis=1)[:, 1 - before :]
    next_BT = jnp.where(held_BT == length_B[:, None] - 1, root_B[:, None], next_BT)
    new_rows = draft_rows(models, shapes.draft, held_BTD, next_BT, held_BT)
    return write_rows(state.draft_cache, new_rows, jnp.broadcast_to(offset, (B,)) - before)


@partial(jax.jit, static_argnames=("shapes",), donate_argnames=("state",))
@exact
def decode(
    models: Models, shapes: Shapes, state: DecodeState, max_rounds: jax.Array
) -> tuple[DecodeState, Report]:
    """Runs rounds until every answer is finished, or `max_rounds` of them (for streaming)."""

    def body(carry):
        index, now = carry
        return index + 1, _round(models, shapes, now)

    def unfinished(carry):
        return (carry[0] < max_rounds) & ~carry[1].done_B.all()

    state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]
    return state, report(state)


def _round(models: Models, shapes: Shapes, now: DecodeState) -> DecodeState:
    """One round for every sequence; finished ones compute along and change nothing that counts."""
    with jax.named_scope("draft"):
        drafted = propose(models, shapes, now)
    with jax.named_scope("verify"):
        states_BWD, rows = read_tree(models, shapes, now, drafted.nodes)
    with jax.named_scope("accept"):
        found, finite_B = accept(models, shapes, now, drafted, states_BWD)
    with jax.named_scope("append"):
        now = append(models, shapes, now, found, states_BWD, rows)
    return _emit(now, found, finite_B, shapes.eos_ids)


@exact
def draft_rows(models: Models, draft: DraftSpec, states_BTD, next_BT, positions_BT) -> KVRows:
    """What the draft's cache keeps of true states. next_BT: the tokens after them."""
    positions_BT = jnp.broadcast_to(positions_BT, next_BT.shape)
    next_BTD = embed(models.target["embed_VD"], next_BT, draft.embed_scale)
    return (
        block_of(draft).bind({"params": models.draft}).true_rows(states_BTD, next_BTD, positions_BT)
    )


def propose(models: Models, shapes: Shapes, now: DecodeState) -> Drafted:
    """This round's tree; drawn from the draft's distribution under the ratio rule."""
    if not shapes.tree.depth:
        return Drafted(root_only(now.root_B), None, None, None, None)
    if isinstance(shapes.draft, Lookup):
        nodes = lookup_chain(now.text_BS, now.length_B, shapes.draft.ngram, shapes.tree.depth)
        return Drafted(nodes, None, None, None, None)
    drawing = {}
    if shapes.rule == "ratio":
        place_BP = now.count_B[:, None] + jnp.arange(shapes.tree.depth)[None]
        key_BP = _keys(now.key_B, place_BP, _FOR_DRAFT)
        drawing = dict(
            sampling=shapes.sampling, noise_BPV=gumbel(key_BP, models.draft_head.rows_VD.shape[0])
        )
    return draft_tree(
        models.draft,
        shapes.draft,
        shapes.tree,
        models.target["embed_VD"],
        models.draft_head,
        now.draft_cache,
        now.length_B,
        now.root_B,
        now.last_B1D,
        append_predicted=shapes.append_predicted,
        **drawing,
    )


def read_tree(
    models: Models, shapes: Shapes, now: DecodeState, nodes: Nodes
) -> tuple[jax.Array, list[KVRows]]:
    """The target's states of the nodes [B, W, D], and their key/value rows."""
    positions_BW = now.length_B[:, None] + nodes.depth_BW
    visible_BS = visible_slots(now.length_B, now.target_cache)
    read = forward(
        models.target,
        shapes.target,
        nodes.token_BW,
        positions_BW,
        nodes.above_BWW,
        now.target_cache,
        visible_BS,
    )
    return read.states_BTD, read.rows


def accept(
    models: Models, shapes: Shapes, now: DecodeState, drafted: Drafted, states_BWD
) -> tuple[Accepted, jax.Array]:
    """What the target accepts, and whether its logits were finite."""
    nodes, depth = drafted.nodes, shapes.tree.depth
    if drafted.logits_BPV is None:
        wanted_BW, finite_BW = _target_choice(
            models, shapes, states_BWD, now.key_B, now.count_B[:, None] + nodes.depth_BW
        )
        return accept_matching(nodes, wanted_BW, depth), finite_BW.all(axis=1)
    (B, W, _), place_BP = states_BWD.shape, now.count_B[:, None] + jnp.arange(depth)[None]
    raw_BWV = logits(models.target, shapes.target, states_BWD)
    V = raw_BWV.shape[-1]
    target_BWV = filtered(raw_BWV.reshape(B * W, V), shapes.sampling).reshape(B, W, V)
    draft_BPV = drafted.logits_BPV
    if models.draft_head.ids_V is not None:
        draft_BPV = (
            jnp.full((B, depth, V), -jnp.inf).at[:, :, models.draft_head.ids_V].set(draft_BPV)
        )
    uniform_BP = jax.vmap(jax.vmap(jax.random.uniform))(_keys(now.key_B, place_BP, _FOR_ACCEPTING))
    noise_BWV = gumbel(_keys(now.key_B, now.count_B[:, None] + nodes.depth_BW, _FOR_TARGET), V)
    found = accept_by_ratio(nodes, target_BWV, draft_BPV, uniform_BP, noise_BWV)
    return found, jnp.isfinite(raw_BWV.max(axis=-1)).all(axis=1)


def append(
    models: Models,
    shapes: Shapes,
    now: DecodeState,
    found: Accepted,
    states_BWD,
    rows: list[KVRows],
) -> DecodeState:
    """Writes the rows of the accepted path only, and their true states: rows past it are
    overwritten by the next round.
    """
    # Where they go is made to depend on the chosen token (never negative), so that XLA must order
    # every write after all reads and can do it in place. Without drafts nothing else ties the two,
    # and it would copy the caches each round.
    start_B = jnp.where(found.bonus_B < 0, 0, now.length_B)
    target_cache = write_all(
        now.target_cache, [take_rows(layer, found.path_BP1) for layer in rows], start_B
    )
    draft_cache, last_B1D = now.draft_cache, now.last_B1D
    if draft_cache is not None:
        states_BPD = jnp.take_along_axis(states_BWD, found.path_BP1[..., None], axis=1)
        positions_BP = now.length_B[:, None] + jnp.arange(shapes.tree.depth + 1)[None]
        kept = draft_rows(models, shapes.draft, states_BPD, found.token_BP1, positions_BP)
        draft_cache = write_rows(draft_cache, kept, start_B)
        last_B1D = (
            None if last_B1D is None else states_BPD[:, -1:]
        )  # the path ends with its last node, however short
    return now._replace(target_cache=target_cache, draft_cache=draft_cache, last_B1D=last_B1D)


def _target_choice(
    models: Models, shapes: Shapes, states_BWD, key_B, place_BW
) -> tuple[jax.Array, jax.Array]:
    """The target's own next token after each state, greedy or drawn with the noise of its place;
    and is it finite?
    """
    if shapes.sampling.greedy:
        return best_tokens(models.target, states_BWD)
    raw_BWV = logits(models.target, shapes.target, states_BWD)
    B, W, V = raw_BWV.shape
    noise_BWV = gumbel(_keys(key_B, place_BW, _FOR_TARGET), V)
    wanted_M = choose(raw_BWV.reshape(-1, V), noise_BWV.reshape(-1, V), shapes.sampling)
    return wanted_M.reshape(B, W), jnp.isfinite(raw_BWV.max(axis=-1))


def _keys(key_B: jax.Array, place_BT: jax.Array, purpose: int) -> jax.Array:
    return place_keys(jax.vmap(lambda key: jax.random.fold_in(key, purpose))(key_B), place_BT)


def _emit(
    now: DecodeState, found: Accepted, finite_B: jax.Array, eos_ids: tuple[int, ...]
) -> DecodeState:
    """Writes the round's tokens: up to the first stop token, and never past the limit."""
    B, P1 = found.token_BP1.shape
    row_B, step_1P = jnp.arange(B), jnp.arange(P1)[None]
    stop_BP = is_stop(found.token_BP1, eos_ids) & (step_1P <= found.count_B[:, None])
    to_stop_B = jnp.where(stop_BP.any(axis=1), jnp.argmax(stop_BP, axis=1) + 1, found.count_B + 1)
    live_B = ~now.done_B & finite_B
    emitted_B = jnp.where(live_B, jnp.minimum(to_stop_B, now.limit_B - now.count_B), 0)
    capacity = now.out_BS.shape[1]  # an index past the end is dropped
    column_BP = jnp.where(step_1P < emitted_B[:, None], now.count_B[:, None] + step_1P, capacity)
    round_B = jnp.where(live_B, now.rounds_B, capacity)
    count_B = now.count_B + emitted_B
    text_BS = now.text_BS
    if text_BS is not None:
        slot_BP = jnp.where(
            live_B[:, None] & (step_1P <= found.count_B[:, None]),
            now.length_B[:, None] + 1 + step_1P,
            capacity,
        )
        text_BS = text_BS.at[row_B[:, None], slot_BP].set(found.token_BP1, mode="drop")
    stopped_B = (stop_BP & (step_1P < emitted_B[:, None])).any(axis=1)
    return now._replace(
        length_B=now.length_B + jnp.where(live_B, found.count_B + 1, 0),
        root_B=jnp.where(live_B, found.bonus_B, now.root_B),
        out_BS=now.out_BS.at[row_B[:, None], column_BP].set(found.token_BP1, mode="drop"),
        count_B=count_B,
        text_BS=text_BS,
        done_B=now.done_B | ~finite_B | stopped_B | (count_B >= now.limit_B),
        broken_B=now.broken_B | (~now.done_B & ~finite_B),
        rounds_B=now.rounds_B + live_B,
        accepted_BS=now.accepted_BS.at[row_B, round_B].set(
            jnp.minimum(found.count_B, emitted_B), mode="drop"
        ),
    )


def draft_head_of(target: Params, hot_ids: jax.Array | None) -> DraftHead:
    """The part of the target's head that the draft uses."""
    head_VD = head(target)
    return DraftHead(head_VD, None) if hot_ids is None else DraftHead(head_VD[hot_ids], hot_ids)

"""Losses on distributions, through the frozen head, and on states (method.md 3.2).

The vocabulary's logits are computed in chunks of positions. Only the gradient with respect to the
draft's state is needed, because the head is frozen. It is computed in the same pass as the loss,
with three products with the head per position; logits are neither stored nor recomputed. Positions
that do not enter the loss cost nothing: they are sorted to the end, and the loop stops before them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from beagle_jax.config import TrainConfig
from beagle_jax.training.distances import DISTANCES, Distributions
from beagle_jax.training.frozen import Vocabulary
from beagle_jax.training.per_device import OwnShare, over_rows


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def distribution_loss(
    state_MD: jax.Array,
    true_MD: jax.Array,
    head_VD: jax.Array,
    counted_M: jax.Array,
    kind: str,
    chunk: int,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Computes the divergence of target p and draft q over the vocabulary, per position.

    p comes from the true state and q from the draft's state, both through `head_VD`. Differentiable
    in `state_MD` only, because target and head are frozen. On a mesh each device works on its own
    positions and its part of the vocabulary; M must be a multiple of the number of devices that
    split rows.

    kind: a name in distances.DISTANCES; the paper's is cross_entropy, -sum_v p(v) log q(v).
    counted_M: bool; positions that are False cost nothing and return 0. chunk: number of positions
    whose logits exist at once on a device.

    Returns (distance [M], rank [M]). The rank is that of the target's most likely token among the
    draft's logits, 0 if it is the draft's most likely token too.
    """
    distance_M, rank_M, _ = _forward(state_MD, true_MD, head_VD, counted_M, kind, chunk, mesh)
    return distance_M, rank_M


def _forward(
    state_MD: jax.Array,
    true_MD: jax.Array,
    head_VD: jax.Array,
    counted_M: jax.Array,
    kind: str,
    chunk: int,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    own_rows = over_rows(partial(_own_rows, kind, chunk), head_VD.shape[0], mesh)
    return own_rows(head_VD, state_MD, true_MD, counted_M)


def _own_rows(
    kind: str,
    chunk: int,
    share: OwnShare,
    head_VD: jax.Array,
    state_MD: jax.Array,
    true_MD: jax.Array,
    counted_M: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes distance, rank and gradient of one device's positions."""
    M, D = state_MD.shape

    def step(
        carry: tuple[jax.Array, jax.Array, jax.Array], part: Part
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        distance, rank, gradient = carry
        distance_R, rank_R, gradient_RD = _rows(
            kind, part.rows(state_MD), part.rows(true_MD), head_VD, share
        )
        return (
            part.put(distance, distance_R),
            part.put(rank, rank_R),
            part.put(gradient, gradient_RD),
        )

    zeros = (jnp.zeros(M, jnp.float32), jnp.zeros(M, jnp.int32), jnp.zeros((M, D), state_MD.dtype))
    return in_parts(chunk, share, counted_M, zeros, step)


class Part(NamedTuple):
    """R positions of a device that are computed together."""

    rows: Callable[[jax.Array], jax.Array]  # of an array [M, ..] the part's rows [R, ..]
    put: Callable[[jax.Array, jax.Array], jax.Array]  # an array [M, ..] with these rows set
    live_R: jax.Array  # False for positions that only fill up the last part


Carry = TypeVar("Carry")


def in_parts(
    chunk: int,
    share: OwnShare,
    counted_M: jax.Array,
    carry: Carry,
    step: Callable[[Carry, Part], Carry],
) -> Carry:
    """Runs `step` over one device's positions where counted_M, `chunk` at a time."""
    M = len(counted_M)
    count = -(-M // chunk) * chunk
    # Positions that enter the loss come first, in order; the loop never reaches the others.
    order = jnp.argsort(~counted_M, stable=True)
    order = jnp.pad(order, (0, count - M), constant_values=M)
    used = counted_M.sum()
    # Every device runs the same number of iterations, as the loop contains collectives.
    rounds = jax.lax.pmax(-(-used // chunk), share.rows)

    def body(index: jax.Array, carry: Carry) -> Carry:
        row_R = jax.lax.dynamic_slice(order, (index * chunk,), (chunk,))
        live_R = index * chunk + jnp.arange(chunk) < used
        # Positions after `used` in the last chunk get an index out of range and are dropped.
        target_R = jnp.where(live_R, row_R, M)
        return step(
            carry,
            Part(
                lambda x: x.at[row_R].get(mode="fill", fill_value=0),
                lambda into, values: into.at[target_R].set(values, mode="drop"),
                live_R,
            ),
        )

    return jax.lax.fori_loop(0, rounds, body, carry)


def _rows(
    kind: str, state_RD: jax.Array, true_RD: jax.Array, head_VD: jax.Array, share: OwnShare
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes distance, rank and gradient of one chunk, in float32."""
    distance_R, rank_R, slope_RV = compared(kind, state_RD, true_RD, head_VD, head_VD, share)
    gradient_RD = jax.lax.psum(
        _product("RV,VD->RD", slope_RV.astype(head_VD.dtype), head_VD), share.vocabulary
    )
    return distance_R, rank_R, gradient_RD.astype(state_RD.dtype)


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def compared(
    kind: str,
    state_RD: jax.Array,
    true_RI: jax.Array,
    draft_head_VD: jax.Array,
    head_VI: jax.Array,
    share: OwnShare,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes distance [R], rank [R], and the distance's slope [R, V] in the draft's logits.

    V is this device's part of the vocabulary. The draft's states and the target's may differ in
    width, and so may their heads.
    """

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, share.vocabulary)

    def highest(x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, share.vocabulary)

    draft_RV = _product("RD,VD->RV", state_RD, draft_head_VD)
    true_RV = _product("RD,VD->RV", true_RI, head_VI)
    top_R1 = highest(true_RV.max(axis=-1, keepdims=True))
    peak_R1 = highest(draft_RV.max(axis=-1, keepdims=True))

    # Exponentials are computed once, and divided where they are read: each pass over [R, V] moves
    # as many bytes as the logits take.
    true_exp_RV, draft_exp_RV = jnp.exp(true_RV - top_R1), jnp.exp(draft_RV - peak_R1)
    true_sum_R1 = total(true_exp_RV.sum(axis=-1, keepdims=True))
    draft_sum_R1 = total(draft_exp_RV.sum(axis=-1, keepdims=True))
    log_p_RV = true_RV - top_R1 - jnp.log(true_sum_R1)
    log_q_RV = draft_RV - peak_R1 - jnp.log(draft_sum_R1)

    def over_vocabulary(x_RV: jax.Array) -> jax.Array:
        return total(x_RV.sum(axis=-1))

    p_RV, q_RV = true_exp_RV / true_sum_R1, draft_exp_RV / draft_sum_R1
    of = Distributions(p_RV, log_p_RV, q_RV, log_q_RV, over_vocabulary)
    distance_R, slope_RV = DISTANCES[kind](of)
    return distance_R, _rank(draft_RV, true_RV, top_R1, share), slope_RV


def _rank(draft_RV: jax.Array, true_RV: jax.Array, top_R1: jax.Array, share: OwnShare) -> jax.Array:
    """Counts the tokens that the draft ranks above the target's most likely token.

    If several tokens are the most likely, the one with the lowest id is meant.
    """
    V = true_RV.shape[1]
    own_R1 = lowest_of(true_RV, top_R1, share) - share.first_token(V)
    draft_R1 = jnp.take_along_axis(draft_RV, own_R1, axis=-1, mode="clip")
    draft_R1 = jnp.where((own_R1 >= 0) & (own_R1 < V), draft_R1, 0.0)
    draft_R1 = jax.lax.psum(draft_R1, share.vocabulary)
    # Float32 counts to 2^24 exactly; XLA's CPU sums of integers are slow.
    above_R = jnp.sum(draft_RV > draft_R1, axis=-1, dtype=jnp.float32)
    return jax.lax.psum(above_R.astype(jnp.int32), share.vocabulary)


def lowest_of(x_RV: jax.Array, top_R1: jax.Array, share: OwnShare) -> jax.Array:
    """Returns the lowest id [R, 1] over the whole vocabulary whose value is the top one."""
    unseen = 2**31 - 1
    own_R1 = jnp.argmax(x_RV, axis=-1, keepdims=True)  # of equal ones the first
    highest_R1 = x_RV.max(axis=-1, keepdims=True)
    token_R1 = own_R1.astype(jnp.int32) + share.first_token(x_RV.shape[1])
    return jax.lax.pmin(jnp.where(highest_R1 == top_R1, token_R1, unseen), share.vocabulary)


def _vjp_forward(
    state_MD: jax.Array,
    true_MD: jax.Array,
    head_VD: jax.Array,
    counted_M: jax.Array,
    kind: str,
    chunk: int,
    mesh: Mesh,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    distance_M, rank_M, gradient_MD = _forward(
        state_MD, true_MD, head_VD, counted_M, kind, chunk, mesh
    )
    return (distance_M, rank_M), gradient_MD


def _vjp_backward(
    kind: str,
    chunk: int,
    mesh: Mesh,
    gradient_MD: jax.Array,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, None, None, None]:
    slope_M = cotangents[0]
    return (gradient_MD * slope_M[:, None].astype(gradient_MD.dtype), None, None, None)


distribution_loss.defvjp(_vjp_forward, _vjp_backward)


def smooth_l1(state_MD: jax.Array, true_MD: jax.Array) -> jax.Array:
    """Computes smooth-L1 per position, averaged over channels (method.md 3.2).

    With z = state - true: 0.5 z^2 where |z| < 1, |z| - 0.5 elsewhere.
    """
    z_MD = state_MD.astype(jnp.float32) - true_MD.astype(jnp.float32)
    size_MD = jnp.abs(z_MD)
    return jnp.mean(jnp.where(size_MD < 1, 0.5 * jnp.square(z_MD), size_MD - 0.5), axis=-1)


class Outputs(NamedTuple):
    """M predictions of a draft and the target's states that they are compared with."""

    state_MD: jax.Array
    normed_MD: jax.Array  # input of the draft's head; equals state_MD if the draft has no norm
    true_MD: jax.Array  # the target's states after its final norm
    counted_M: jax.Array  # bool: the prediction enters the loss
    draft_head_VD: jax.Array  # head of the draft: the target's, or the draft's own
    head_VD: jax.Array  # head of the target, only the tokens that the draft scores


class Terms(NamedTuple):
    """Terms of a loss for each of M predictions; 0 for those that do not enter the loss."""

    ploss_M: jax.Array  # `train.loss`, unweighted
    vloss_M: jax.Array  # smooth-L1, unweighted
    total_M: jax.Array  # what is minimised
    rank_M: jax.Array  # 0-based rank of the target's most likely token among the draft's logits


def over_vocabulary(
    terms: Terms, outputs: Outputs, vocabulary: Vocabulary, config: TrainConfig, mesh: Mesh
) -> Terms:
    """Replaces terms over the tokens that the draft scores by terms over all tokens.

    The loss is that of the draft's state through the whole head. A head of the draft's own has no
    rows for the other tokens, so its loss remains over those that it scores. A prediction whose
    most likely token the draft does not score is ranked last, as decoding would never propose it.
    """
    counted_M, chunk = outputs.counted_M, config.loss_rows
    missed_M = counted_M & ~is_scored(vocabulary, outputs.true_MD, counted_M, chunk, mesh)
    last = jnp.int32(vocabulary.head_VD.shape[0])
    terms = terms._replace(rank_M=jnp.where(missed_M, last, terms.rank_M))
    if outputs.draft_head_VD is not outputs.head_VD:
        return terms
    ploss_M, _ = distribution_loss(
        outputs.normed_MD,
        outputs.true_MD,
        vocabulary.head_VD,
        counted_M,
        config.loss,
        chunk,
        mesh,
    )
    total_M = terms.total_M - terms.ploss_M + ploss_M
    return terms._replace(ploss_M=ploss_M, total_M=total_M)


def is_scored(
    vocabulary: Vocabulary, state_MI: jax.Array, counted_M: jax.Array, chunk: int, mesh: Mesh
) -> jax.Array:
    """Returns where the target's most likely next token is one that the draft scores, bool [M].

    Only of positions where counted_M; False elsewhere.
    """
    on_rows = over_rows(partial(_best, chunk), vocabulary.head_VD.shape[0], mesh)
    best_M = on_rows(vocabulary.head_VD, state_MI, counted_M)
    return counted_M & vocabulary.scored_V[best_M]


def _best(
    chunk: int, share: OwnShare, head_VI: jax.Array, state_MI: jax.Array, counted_M: jax.Array
) -> jax.Array:
    """Returns the most likely token of one device's positions; of equal ones the lowest."""

    def step(best_M: jax.Array, part: Part) -> jax.Array:
        logits_RV = jnp.einsum(
            "RI,VI->RV", part.rows(state_MI), head_VI, preferred_element_type=jnp.float32
        )
        top_R1 = jax.lax.pmax(logits_RV.max(axis=-1, keepdims=True), share.vocabulary)
        return part.put(best_M, lowest_of(logits_RV, top_R1, share)[:, 0].astype(jnp.int32))

    return in_parts(chunk, share, counted_M, jnp.zeros(len(counted_M), jnp.int32), step)


def distribution_and_state(outputs: Outputs, config: TrainConfig, mesh: Mesh) -> Terms:
    """ploss + vloss_weight * vloss, for drafts that share the target's head (method.md 3.2).

    Raises:
        ValueError: the draft has its own head, which this loss would not train.
    """
    state_MD, normed_MD, true_MD, counted_M, draft_head_VD, head_VD = outputs
    if draft_head_VD is not head_VD:
        raise ValueError("a draft with a head of its own needs a loss of its own")
    ploss_M, rank_M = distribution_loss(
        normed_MD, true_MD, head_VD, counted_M, config.loss, config.loss_rows, mesh
    )
    vloss_M = jnp.where(counted_M, smooth_l1(state_MD, true_MD), 0.0)
    return Terms(ploss_M, vloss_M, ploss_M + config.vloss_weight * vloss_M, rank_M)

"""The loss on distributions of a draft that trains a head of its own (method.md 14).

As in `losses.py`, logits exist for a few positions at a time. Here the head has a gradient too, a
sum over positions, so the backward pass computes the logits again: six products with a head per
position, against three with a frozen head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from beagle_jax.training.losses import Part, compared, in_parts
from beagle_jax.training.per_device import OwnShare, over_rows


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def own_head_loss(
    state_MD: jax.Array,
    draft_head_VD: jax.Array,
    true_MI: jax.Array,
    head_VI: jax.Array,
    counted_M: jax.Array,
    kind: str,
    chunk: int,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Computes the divergence of target p and draft q over the draft's vocabulary, per position.

    Both distributions are normalised over the tokens that the draft scores. Differentiable in
    `state_MD` and `draft_head_VD`; target states [M, I] and the target's rows are frozen. See
    `losses.distribution_loss` for the other arguments and the result, (distance [M], rank [M]).
    """
    on_rows = over_rows(partial(_forward, kind, chunk), head_VI.shape[0], mesh)
    return on_rows((draft_head_VD.astype(state_MD.dtype), head_VI), state_MD, true_MI, counted_M)


Heads = tuple[jax.Array, jax.Array]  # the draft's [V, d], and the target's rows [V, I]


def _forward(
    kind: str,
    chunk: int,
    share: OwnShare,
    heads: Heads,
    state_MD: jax.Array,
    true_MI: jax.Array,
    counted_M: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes distance and rank of one device's positions."""
    draft_head_VD, head_VI = heads

    def step(carry: tuple[jax.Array, jax.Array], part: Part) -> tuple[jax.Array, jax.Array]:
        states = part.rows(state_MD), part.rows(true_MI)
        distance_R, rank_R, _ = compared(kind, *states, draft_head_VD, head_VI, share)
        return part.put(carry[0], distance_R), part.put(carry[1], rank_R)

    M = len(state_MD)
    zeros = (jnp.zeros(M, jnp.float32), jnp.zeros(M, jnp.int32))
    return in_parts(chunk, share, counted_M, zeros, step)


def _backward(
    kind: str,
    chunk: int,
    share: OwnShare,
    heads: Heads,
    state_MD: jax.Array,
    true_MI: jax.Array,
    counted_M: jax.Array,
    slope_M: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients of one device's states, and of its part of the head.

    slope_M: the gradient of the result with respect to each position's distance.
    """
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    draft_head_VD, head_VI = heads

    def step(carry: tuple[jax.Array, jax.Array], part: Part) -> tuple[jax.Array, jax.Array]:
        states, head = carry
        state_RD = part.rows(state_MD)
        true_RI = part.rows(true_MI)
        _, _, slope_RV = compared(kind, state_RD, true_RI, draft_head_VD, head_VI, share)
        # Positions that only fill up a part must not reach the head.
        scale_R = jnp.where(part.live_R, part.rows(slope_M), 0.0)
        slope_RV = (slope_RV * scale_R[:, None]).astype(state_RD.dtype)
        of_state_RD = jax.lax.psum(product("RV,VD->RD", slope_RV, draft_head_VD), share.vocabulary)
        of_head_VD = product("RV,RD->VD", slope_RV, state_RD)
        return part.put(states, of_state_RD.astype(states.dtype)), head + of_head_VD

    zeros = (jnp.zeros_like(state_MD), jnp.zeros(draft_head_VD.shape, jnp.float32))
    states, head = in_parts(chunk, share, counted_M, zeros, step)
    return states, jax.lax.psum(head, share.rows)


Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _vjp_forward(
    state_MD: jax.Array,
    draft_head_VD: jax.Array,
    true_MI: jax.Array,
    head_VI: jax.Array,
    counted_M: jax.Array,
    kind: str,
    chunk: int,
    mesh: Mesh,
) -> tuple[tuple[jax.Array, jax.Array], Arrays]:
    arrays = (state_MD, draft_head_VD, true_MI, head_VI, counted_M)
    return own_head_loss(*arrays, kind, chunk, mesh), arrays


def _vjp_backward(
    kind: str, chunk: int, mesh: Mesh, arrays: Arrays, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    state_MD, draft_head_VD, true_MI, head_VI, counted_M = arrays
    on_rows = over_rows(partial(_backward, kind, chunk), head_VI.shape[0], mesh, gives_head=True)
    heads = (draft_head_VD.astype(state_MD.dtype), head_VI)
    states, head = on_rows(heads, state_MD, true_MI, counted_M, cotangents[0])
    return states, head.astype(draft_head_VD.dtype), None, None, None


own_head_loss.defvjp(_vjp_forward, _vjp_backward)

"""Verification: which drafted tokens the target accepts, and the token it adds itself (method.md
6.6).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.decoding.nodes import Nodes


class Accepted(NamedTuple):
    """What one round found, per sequence."""

    path_BP1: jax.Array  # nodes from the root along the accepted path; the last one repeats
    count_B: jax.Array  # accepted draft tokens a, 0..P
    token_BP1: jax.Array  # the a accepted tokens, then the target's own next token, then left-overs
    bonus_B: jax.Array  # that next token: the new root


def accept_matching(nodes: Nodes, wanted_BW: jax.Array, depth: int) -> Accepted:
    """wanted_BW: the target's own choice after each node, greedy or drawn. depth: P, of the deepest
    possible node.

    A node is accepted iff it and all its ancestors are what the target wanted after their parents.
    Children of a node differ in their tokens, so at most one path matches and the deepest accepted
    node is unique. With drawn choices this is EAGLE-2's rule: a child is accepted with the target's
    probability of its token.
    """
    matches_BW = (
        (nodes.token_BW == jnp.take_along_axis(wanted_BW, nodes.parent_BW, axis=1))
        .at[:, 0]
        .set(True)
    )
    accepted_BW = (matches_BW[:, None, :] | ~nodes.above_BWW).all(axis=-1)
    last_B = jnp.argmax(jnp.where(accepted_BW, nodes.depth_BW, -1), axis=-1)
    count_B = jnp.take_along_axis(nodes.depth_BW, last_B[:, None], axis=1)[:, 0]
    bonus_B = jnp.take_along_axis(wanted_BW, last_B[:, None], axis=1)[:, 0]
    return _accepted(nodes, last_B, count_B, bonus_B, depth)


def _accepted(
    nodes: Nodes, last_B: jax.Array, count_B: jax.Array, bonus_B: jax.Array, depth: int
) -> Accepted:
    above_BW = jnp.take_along_axis(nodes.above_BWW, last_B[:, None, None], axis=1)[:, 0]
    step_1P = jnp.arange(depth + 1)[None]
    at_depth_BPW = above_BW[:, None] & (nodes.depth_BW[:, None] == step_1P[..., None])
    path_BP1 = jnp.where(
        step_1P <= count_B[:, None], jnp.argmax(at_depth_BPW, axis=-1), last_B[:, None]
    )
    drafted_BP = jnp.take_along_axis(nodes.token_BW, path_BP1[:, 1:], axis=1)
    token_BP1 = jnp.pad(drafted_BP, ((0, 0), (0, 1)))
    token_BP1 = jnp.where(step_1P == count_B[:, None], bonus_B[:, None], token_BP1)
    return Accepted(path_BP1, count_B, token_BP1, bonus_B)


def accept_by_ratio(
    nodes: Nodes,
    target_BWV: jax.Array,
    draft_BPV: jax.Array,
    uniform_BP: jax.Array,
    noise_BWV: jax.Array,
) -> Accepted:
    """Leviathan's rule for a chain whose tokens were drawn from the draft: accept with min(1, p /
    q).

    target_BWV, draft_BPV: filtered logits of both over the full vocabulary. uniform_BP: in [0, 1).
    noise_BWV: Gumbel noise of the places after each node, for the token that the target adds: drawn
    from the normalised max(0, p - q) at the first rejection, from p when everything was accepted.
    """
    P = draft_BPV.shape[1]
    p_BWV, q_BPV = jax.nn.softmax(target_BWV, axis=-1), jax.nn.softmax(draft_BPV, axis=-1)

    def of_token(x_BPV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BPV, nodes.token_BW[:, 1:, None], axis=-1)[..., 0]

    # Strictly below: a token that the target never writes (p = 0) is rejected even when the draw is
    # exactly 0.
    kept_BP = uniform_BP * of_token(q_BPV) < of_token(p_BWV[:, :P])
    count_B = jnp.cumprod(kept_BP, axis=1).sum(axis=1)

    def at_last(x_BWV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BWV, count_B[:, None, None], axis=1)[:, 0]

    p_BV, q_BV = at_last(p_BWV), at_last(jnp.pad(q_BPV, ((0, 0), (0, 1), (0, 0))))
    residual_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # Rounding alone can leave nothing; then p and q are the same, and p will do.
    residual_BV = jnp.where(residual_BV.sum(axis=-1, keepdims=True) > 0, residual_BV, p_BV)
    bonus_B = jnp.argmax(jnp.log(residual_BV) + at_last(noise_BWV), axis=-1).astype(jnp.int32)
    return _accepted(nodes, count_B, count_B, bonus_B, P)

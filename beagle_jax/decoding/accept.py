"""Acceptance of drafted tokens, and the token that the target adds (method.md 6.6)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray
from beagle_jax.decoding.nodes import Nodes


class Accepted(NamedTuple):
    """The accepted path of one round, per sequence."""

    path_BP1: jax.Array  # nodes from the root along the accepted path; the last one repeats
    count_B: jax.Array  # accepted draft tokens a, 0..P
    token_BP1: jax.Array  # the a accepted tokens, then the target's next token; the rest is unused
    bonus_B: jax.Array  # the target's next token, which becomes the new root


def accept_matching(
    nodes: Nodes, wanted_BW: jax.Array, depth: int, drafts_B: AnyArray | None = None
) -> Accepted:
    """Accepts the longest path that the target itself would choose.

    wanted_BW: the target's choice after each node, greedy or drawn. depth: P, the largest depth
    that a node can have. drafts_B: where it is False, the root alone is accepted.

    A node is accepted iff it and all its ancestors are the target's choices after their parents.
    Children of a node differ in their tokens, so at most one path matches and the deepest accepted
    node is unique. (A looked-up chain may repeat a path of the tree; the deeper of both ends is
    taken.) With drawn choices this is EAGLE-2's rule: a child is accepted with the target's
    probability of its token.
    """
    matches_BW = nodes.token_BW == jnp.take_along_axis(wanted_BW, nodes.parent_BW, axis=1)
    if drafts_B is not None:
        matches_BW &= drafts_B[:, None]
    matches_BW = matches_BW.at[:, 0].set(True)
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
    drafts_B: AnyArray | None = None,
) -> Accepted:
    """Accepts each token of a drawn chain with probability min(1, p / q) (Leviathan et al.).

    target_BWV, draft_BPV: filtered logits over the full vocabulary; p and q are their softmax.
    uniform_BP: one number in [0, 1) per draft. noise_BWV: Gumbel noise of the place after each
    node. It draws the token that the target adds: from the normalised max(0, p - q) after the first
    rejection, from p if every draft was accepted. drafts_B: where it is False, no draft is accepted
    and the token is drawn from p, as plain decoding draws it.
    """
    P = draft_BPV.shape[1]
    p_BWV, q_BPV = jax.nn.softmax(target_BWV, axis=-1), jax.nn.softmax(draft_BPV, axis=-1)

    def of_token(x_BPV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BPV, nodes.token_BW[:, 1:, None], axis=-1)[..., 0]

    # The comparison is strict: a token with p = 0 is rejected even if the draw is exactly 0.
    kept_BP = uniform_BP * of_token(q_BPV) < of_token(p_BWV[:, :P])
    if drafts_B is not None:
        kept_BP &= drafts_B[:, None]
    count_B = jnp.cumprod(kept_BP, axis=1).sum(axis=1)

    def at_last(x_BWV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BWV, count_B[:, None, None], axis=1)[:, 0]

    p_BV, q_BV = at_last(p_BWV), at_last(jnp.pad(q_BPV, ((0, 0), (0, 1), (0, 0))))
    residual_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # Rounding can make the residual zero everywhere. Then p equals q, and p is used instead.
    residual_BV = jnp.where(residual_BV.sum(axis=-1, keepdims=True) > 0, residual_BV, p_BV)
    score_BV = jnp.log(residual_BV)
    if drafts_B is not None:
        score_BV = jnp.where(drafts_B[:, None], score_BV, at_last(target_BWV))
    bonus_B = jnp.argmax(score_BV + at_last(noise_BWV), axis=-1).astype(jnp.int32)
    return _accepted(nodes, count_B, count_B, bonus_B, P)

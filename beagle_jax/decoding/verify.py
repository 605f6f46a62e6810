"""Greedy verification: the longest drafted path that the target would have written itself (method.md 6.6)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.decoding.tree import Tree


class Accepted(NamedTuple):
    """What one round found, per sequence."""

    path_BP1: jax.Array  # nodes from the root along the accepted path; the last one repeats
    count_B: jax.Array  # accepted draft tokens a, 0..P
    token_BP1: jax.Array  # the a accepted tokens, then the target's own next token, then left-overs
    bonus_B: jax.Array  # that next token: the new root


def accept_greedy(tree: Tree, token_BW: jax.Array, best_BW: jax.Array) -> Accepted:
    """best_BW: the target's argmax after each node. A node is accepted iff it and all its ancestors match.

    Children of a node differ in their tokens, so at most one path matches and the deepest accepted node is unique.
    """
    matches_BW = (token_BW == best_BW[:, tree.parent_W]).at[:, 0].set(True)
    above_WW = jnp.asarray(tree.ancestors_or_self_WW)
    accepted_BW = (matches_BW[:, None, :] | ~above_WW[None]).all(axis=-1)
    depth_W = jnp.asarray(tree.depth_W)
    last_B = jnp.argmax(jnp.where(accepted_BW, depth_W[None], -1), axis=-1)
    path_BP1 = jnp.asarray(tree.path_WP1)[last_B]
    count_B = depth_W[last_B]
    bonus_B = jnp.take_along_axis(best_BW, last_B[:, None], axis=1)[:, 0]
    drafted_BP = jnp.take_along_axis(token_BW, path_BP1[:, 1:], axis=1)
    token_BP1 = jnp.pad(drafted_BP, ((0, 0), (0, 1)))
    step_P1 = jnp.arange(tree.depth + 1)[None]
    token_BP1 = jnp.where(step_P1 == count_B[:, None], bonus_B[:, None], token_BP1)
    return Accepted(path_BP1, count_B, token_BP1, bonus_B)

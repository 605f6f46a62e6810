"""A drafted tree as arrays: one row of W nodes for each sequence, the root first."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Nodes(NamedTuple):
    """A drafted tree of W nodes; node 0 is the root, parents precede children."""

    token_BW: jax.Array
    parent_BW: jax.Array  # the root is its own parent
    depth_BW: jax.Array
    # verify mask: True where the column's node is the row's node or one of its ancestors
    above_BWW: jax.Array
    # cumulative log-probability under the draft; zero in trees that need no scores
    score_BW: jax.Array


def chain_nodes(token_BW: jax.Array) -> Nodes:
    """Returns a chain of tokens, the root first. One token is the tree of plain decoding."""
    B, W = token_BW.shape
    depth_BW = jnp.broadcast_to(jnp.arange(W)[None], (B, W))
    above_BWW = jnp.broadcast_to(jnp.tril(jnp.ones((W, W), bool))[None], (B, W, W))
    score_BW = jnp.zeros((B, W), jnp.float32)
    return Nodes(token_BW, jnp.maximum(depth_BW - 1, 0), depth_BW, above_BWW, score_BW)


def chosen_nodes(
    chosen_BW: jax.Array,
    token_BZ: jax.Array,
    parent_BZ: jax.Array,
    depth_BZ: jax.Array,
    score_BZ: jax.Array,
    levels: int,
) -> Nodes:
    """Returns the chosen candidates as a tree: adds the root and renumbers parents."""
    chosen_BW = jnp.pad(chosen_BW, ((0, 0), (1, 0)))
    B, W = chosen_BW.shape

    def pick(x_BZ: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BZ, chosen_BW, axis=1)

    node_BZ = (
        jnp.zeros_like(token_BZ).at[jnp.arange(B)[:, None], chosen_BW].set(jnp.arange(W)[None])
    )
    parent_BW = jnp.take_along_axis(node_BZ, pick(parent_BZ), axis=1)
    walk_BW = jnp.broadcast_to(jnp.arange(W)[None], (B, W))
    above_BWW = walk_BW[..., None] == jnp.arange(W)[None, None]
    for _ in range(levels):
        walk_BW = jnp.take_along_axis(parent_BW, walk_BW, axis=1)
        above_BWW |= walk_BW[..., None] == jnp.arange(W)[None, None]
    return Nodes(pick(token_BZ), parent_BW, pick(depth_BZ), above_BWW, pick(score_BZ))

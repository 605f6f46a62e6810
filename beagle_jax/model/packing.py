"""Several chats in one row: which chat each token, query and window belongs to, and where in it.

The chats of a row lie one behind another from its start; length_BC has the tokens of each, 0 where
a row has fewer than C chats. Of a chat only the positions from first_BC on are queried, and the
queries of a row's chats lie one behind another too. A row of one chat is C = 1. Nothing here knows
what a window is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """Of X things that lie chat behind chat."""

    chat_BX: jax.Array  # whose it is
    place_BX: jax.Array  # counted from that chat's first


class Queries(NamedTuple):
    """Of the T queries of each row. Those past the last chat's end go on as if it did; they never
    count.
    """

    chat_BT: jax.Array
    place_BT: jax.Array  # counted from the chat's first query: windows are
    position_BT: jax.Array  # in the chat: RoPE turns by it
    slot_BT: jax.Array  # in the row


def places(count: int, size_BC: jax.Array) -> Places:
    """Where the first `count` things of each row are, size_BC of which belong to each chat; what is
    left over is the last chat's.

    sizes 3 0 2, count 6:   chats 0 0 0 2 2 2, places 0 1 2 0 1 2
    """
    end_BC = jnp.cumsum(size_BC, axis=1)
    index_1X = jnp.arange(count)[None]
    chat_BX = jnp.minimum(
        jnp.sum(index_1X[..., None] >= end_BC[:, None], axis=2), size_BC.shape[1] - 1
    )
    return Places(chat_BX, index_1X - of_row(end_BC - size_BC, chat_BX))


def queries(count: int, length_BC: jax.Array, first_BC: jax.Array) -> Queries:
    """The first `count` queries of each row."""
    chat_BT, place_BT = places(count, length_BC - first_BC)
    position_BT = of_row(first_BC, chat_BT) + place_BT
    begin_BC = jnp.cumsum(length_BC, axis=1) - length_BC
    return Queries(chat_BT, place_BT, position_BT, of_row(begin_BC, chat_BT) + position_BT)


def of_row(x: jax.Array, index_BX: jax.Array) -> jax.Array:
    """x [B, S, ..] of each row at that row's own indices: [B, X, ..]; the nearest end where an
    index is outside.
    """
    index_BX = jnp.clip(index_BX, 0, x.shape[1] - 1)
    # Row by row, so that a device looks into its own rows only.
    return jax.vmap(lambda x_S, index_X: x_S[index_X])(x, index_BX)

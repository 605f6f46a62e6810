"""Packed chats: the chat of each token, query and window in a row, and its place there.

The chats of a row follow one another from its start. length_BC holds the tokens of each chat, 0 if
a row has fewer than C chats. Only the positions of a chat from first_BC on are queried, and the
queries of a row's chats follow one another too. A row with a single chat has C = 1. Windows are
defined elsewhere (model/masks.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray


class Places(NamedTuple):
    """Chat and place in it of X elements, which are ordered by chat."""

    chat_BX: jax.Array  # index of the element's chat
    place_BX: jax.Array  # index of the element in its chat


class Queries(NamedTuple):
    """Chat and positions of the T queries of each row.

    Padding queries continue the last chat's numbering; they never count in a loss.
    """

    chat_BT: jax.Array
    place_BT: jax.Array  # counted from the chat's first query, as windows are
    position_BT: jax.Array  # in the chat, for rotary embeddings
    slot_BT: jax.Array  # in the row


def places(count: int, size_BC: AnyArray) -> Places:
    """Returns chat and place of the first `count` elements of each row.

    size_BC: elements of each chat. Padding elements continue the last chat.

    sizes 3 0 2, count 6:   chats 0 0 0 2 2 2, places 0 1 2 0 1 2
    """
    end_BC = jnp.cumsum(size_BC, axis=1)
    index_1X = jnp.arange(count)[None]
    chat_BX = jnp.minimum(
        jnp.sum(index_1X[..., None] >= end_BC[:, None], axis=2), size_BC.shape[1] - 1
    )
    return Places(chat_BX, index_1X - of_row(end_BC - size_BC, chat_BX))


def queries(count: int, length_BC: AnyArray, first_BC: AnyArray) -> Queries:
    """Returns the first `count` queries of each row."""
    chat_BT, place_BT = places(count, length_BC - first_BC)
    position_BT = of_row(first_BC, chat_BT) + place_BT
    begin_BC = jnp.cumsum(length_BC, axis=1) - length_BC
    return Queries(chat_BT, place_BT, position_BT, of_row(begin_BC, chat_BT) + position_BT)


def of_row(x: AnyArray, index_BX: AnyArray) -> jax.Array:
    """Gathers x [B, S, ..] at each row's own indices: [B, X, ..].

    An index out of range is clipped.
    """
    index_BX = jnp.clip(index_BX, 0, x.shape[1] - 1)
    # vmap over rows, so that each device reads only its own rows.
    return jax.vmap(lambda x_S, index_X: x_S[index_X])(x, index_BX)

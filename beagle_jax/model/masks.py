"""Attention masks: causal, early-block and tree masks. True means visible.

Each docstring draws an example. Positions are 0-based; windows and offsets are those of method.md
1: a window of size k starts at s(i), and r(i) = i - s(i).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray
from beagle_jax.model.packing import Queries, places, queries


def causal_mask(length_B: jax.Array, width: int) -> jax.Array:
    """Mask [B, T, T] of right-padded tokens for the target.

    A query sees keys up to itself, except padding.

    width 3, length 2:   query 0 sees 0; query 1 sees 0 1; query 2 (padding) sees 0 1.
    """
    position_T = jnp.arange(width)
    causal_TT = position_T[:, None] >= position_T[None, :]
    return causal_TT[None] & (position_T[None, None, :] < length_B[:, None, None])


def within_window(position_BT: jax.Array, key_position_BS: jax.Array, window: int) -> jax.Array:
    """Mask [B, T, S] of a sliding window: the key is fewer than `window` tokens back.

    It does not hide later keys; the causal mask does.

    window 3:   query at 4 sees keys at 2 3 4, and all later ones; at 1 it sees all.
    """
    return position_BT[:, :, None] - key_position_BS[:, None, :] < window


def window_start(position: jax.Array, window: int, offset: jax.Array) -> jax.Array:
    """s(i): first position of i's window (method.md 3.1, 12.6).

    A position before the first window is its own start.

    window 3, offset 2:   i     0 1 2 3 4 5 6 7
                          s(i)  0 1 2 2 2 5 5 5
    """
    start = offset + window * ((position - offset) // window)
    return jnp.where(position < offset, position, start)


def early_block_mask(
    length_BC: AnyArray,
    width: int,
    window: int,
    offset: jax.Array,
    first_BC: AnyArray | None = None,
    count: int | None = None,
    own: Callable[[Queries], Queries] | None = None,
) -> jax.Array:
    """Mask [B, T, L] over true states, for the early stage (method.md 3.1).

    A query sees the states of its own chat before the start of its window.

    length_BC: tokens of each chat of a row (model/packing.py). first_BC, count: return only `count`
    queries, which are the positions from first_BC on of each chat, in windows counted from there;
    None: all positions. own: picks the queries that this device computes; None: all.

    width 8, window 3, offset 2 (the left half of the example in method.md 4.4):
        query 0: nothing      query 2, 3, 4: 0 1
        query 1: 0            query 5, 6, 7: 0 1 2 3 4
    the same row with chats of 5 and 3 tokens:
        query 5: nothing      query 6: 5      query 7: 5 6
    """
    query = queries(
        count or width, length_BC, jnp.zeros_like(length_BC) if first_BC is None else first_BC
    )
    query = query if own is None else own(query)
    start_BT = query.position_BT - query.place_BT + window_start(query.place_BT, window, offset)
    return keys_before(query.chat_BT, start_BT, length_BC, width)


def keys_before(
    chat_BT: jax.Array, start_BT: jax.Array, length_BC: AnyArray, width: int
) -> jax.Array:
    """Mask [B, T, L] over true states: before start_BT in the query's own chat.

    Padding is hidden.
    """
    key_chat_BL, key_BL = _keys(length_BC, width)
    return (key_chat_BL[:, None] == chat_BT[..., None]) & (key_BL[:, None] < start_BT[..., None])


def chats_mask(length_BC: AnyArray, width: int) -> jax.Array:
    """Mask [B, L, L] of packed chats for the target: causal within each chat.

    Padding keys are hidden.

    width 6, chats of 2 and 3 tokens:
        0: 0   1: 0 1   2: 2   3: 2 3   4: 2 3 4   5 (padding): 2 3 4
    """
    chat_BL, _ = places(width, length_BC)
    key_chat_BL, _ = _keys(length_BC, width)
    return causal_mask(length_BC.sum(axis=1), width) & (key_chat_BL[:, None] == chat_BL[..., None])


def _keys(length_BC: AnyArray, width: int) -> tuple[jax.Array, jax.Array]:
    """Returns each token's chat and its position in it [B, L]; padding has chat -1."""
    chat_BL, position_BL = places(width, length_BC)
    live_BL = jnp.arange(width)[None] < length_BC.sum(axis=1, keepdims=True)
    return jnp.where(live_BL, chat_BL, -1), position_BL

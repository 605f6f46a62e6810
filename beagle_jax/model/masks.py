"""Who sees whom: causal, early-block and tree masks. True means visible. Each function draws its example.

Positions are 0-based, windows and offsets as in method.md 1: a window of size k starts at s(i), r(i) = i - s(i).
"""

import jax
import jax.numpy as jnp


def causal_mask(length_B: jax.Array, width: int) -> jax.Array:
    """Mask [B, T, T] of right-padded tokens for the target: key <= query, and the key is not padding.

    width 3, length 2:   query 0 sees 0; query 1 sees 0 1; query 2 (padding) sees 0 1.
    """
    position_T = jnp.arange(width)
    causal_TT = position_T[:, None] >= position_T[None, :]
    return causal_TT[None] & (position_T[None, None, :] < length_B[:, None, None])


def within_window(position_BT: jax.Array, key_position_BS: jax.Array, window: int) -> jax.Array:
    """Mask [B, T, S] of a sliding window: the key is fewer than `window` tokens back. Later keys are not its concern.

    window 3:   query at 4 sees keys at 2 3 4, and whatever comes after; at 1 it sees all.
    """
    return position_BT[:, :, None] - key_position_BS[:, None, :] < window


def window_start(position: jax.Array, window: int, offset: jax.Array) -> jax.Array:
    """s(i): first position of i's window; i itself before the first window (method.md 3.1, 12.6).

    window 3, offset 2:   i     0 1 2 3 4 5 6 7
                          s(i)  0 1 2 2 2 5 5 5
    """
    start = offset + window * ((position - offset) // window)
    return jnp.where(position < offset, position, start)


def early_block_mask(
    length_B: jax.Array,
    width: int,
    window: int,
    offset: jax.Array,
    first_B: jax.Array | None = None,
    queries: int | None = None,
) -> jax.Array:
    """Mask [B, T, L] over true states: key j < s(i), and the key is not padding (method.md 3.1).

    first_B, queries: ask only for `queries` positions from first_B on, in windows counted from there; all if None.

    width 8, window 3, offset 2 (the left half of example 4.4):
        query 0: nothing      query 2, 3, 4: 0 1
        query 1: 0            query 5, 6, 7: 0 1 2 3 4
    """
    start_T = window_start(jnp.arange(queries or width), window, offset)
    start_BT = start_T[None] + (jnp.zeros_like(length_B) if first_B is None else first_B)[:, None]
    return keys_before(start_BT, length_B, width)


def keys_before(start_BT: jax.Array, length_B: jax.Array, width: int) -> jax.Array:
    """Mask [B, T, L] over true states: key < the query's window start, and the key is not padding."""
    key_11L = jnp.arange(width)[None, None]
    return (key_11L < start_BT[..., None]) & (key_11L < length_B[:, None, None])

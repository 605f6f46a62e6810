"""Key/value rows of past tokens: fixed capacity, a length per sequence, written in place when
donated.

Knows nothing of models or decoding. Slots at or past a sequence's length hold zeros or left-overs
and are masked by the length, never by their content. Memory is zeroed, not empty: 0 x NaN would be
NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Above this many sequences one scatter beats a slice update per sequence.
_UNROLL_ROWS = 8


class KVRows(NamedTuple):
    """Keys (rotated) and values of some tokens in one layer.

    Keys keep the tokens last: the score product then runs three times faster on a CPU (measured, 64
    sequences).
    """

    k_BKHS: jax.Array
    v_BKSH: jax.Array


def round_up(length: int, multiple: int) -> int:
    """The next multiple: capacities and padded lengths come in steps, as each is compiled."""
    return -(-int(length) // multiple) * multiple


def empty_rows(
    batch: int, num_kv_heads: int, capacity: int, head_dim: int, dtype: jnp.dtype
) -> KVRows:
    """Zeroed key and value rows [batch, K, capacity, H]."""
    k_BKHS = jnp.zeros((batch, num_kv_heads, head_dim, capacity), dtype)
    return KVRows(k_BKHS, jnp.zeros((batch, num_kv_heads, capacity, head_dim), dtype))


def write_rows(cache: KVRows, rows: KVRows, start_B: jax.Array) -> KVRows:
    """Writes rows of T tokens at slots start_B .. start_B + T - 1 of each sequence.

    The caller sees to start + T <= S: a slice update past the end would be clamped onto committed
    rows.
    """
    return KVRows(
        _write(cache.k_BKHS, rows.k_BKHS, start_B, 3), _write(cache.v_BKSH, rows.v_BKSH, start_B, 2)
    )


def _write(cache: jax.Array, rows: jax.Array, start_B: jax.Array, token_axis: int) -> jax.Array:
    rows = rows.astype(cache.dtype)

    def corner(row, start):
        return tuple(start if axis == token_axis else row if axis == 0 else 0 for axis in range(4))

    if rows.shape[0] <= _UNROLL_ROWS:
        for row in range(rows.shape[0]):
            cache = jax.lax.dynamic_update_slice(
                cache, rows[row : row + 1], corner(row, start_B[row])
            )
        return cache

    def update(one, new, start):
        return jax.lax.dynamic_update_slice(one, new, corner(0, start)[1:])

    return jax.vmap(update)(cache, rows, start_B)


def take_rows(rows: KVRows, index_BT: jax.Array) -> KVRows:
    """Picks the rows of T tokens by index along the token axis, per sequence."""
    k_BKHT = jnp.take_along_axis(rows.k_BKHS, index_BT[:, None, None, :], axis=3)
    return KVRows(k_BKHT, jnp.take_along_axis(rows.v_BKSH, index_BT[:, None, :, None], axis=2))


def append_rows(rows: KVRows | None, more: KVRows) -> KVRows:
    """`rows` followed by `more`, in a new array; None stands for no rows."""
    if rows is None:
        return more
    k_BKHS = jnp.concatenate([rows.k_BKHS, more.k_BKHS], axis=3)
    return KVRows(k_BKHS, jnp.concatenate([rows.v_BKSH, more.v_BKSH], axis=2))


def visible_slots(length_B: jax.Array, caches: Sequence[KVRows]) -> jax.Array:
    """Mask [B, S] of these caches' slots (no slots if there is no cache): those below each
    sequence's length.
    """
    capacity = caches[0].v_BKSH.shape[2] if caches else 0
    return jnp.arange(capacity)[None, :] < length_B[:, None]


def write_all(caches: Sequence[KVRows], rows: Sequence[KVRows], start_B: jax.Array) -> list[KVRows]:
    """`write_rows` for every layer."""
    return [write_rows(cache, new, start_B) for cache, new in zip(caches, rows, strict=True)]

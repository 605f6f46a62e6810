"""Key/value rows of past tokens: fixed capacity, a length per sequence, written in place when
donated.

Knows nothing of models or decoding. Slots at or past a sequence's length hold zeros or left-overs
and are masked by the length, never by their content. Memory is zeroed, not empty: 0 x NaN would be
NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

# Above this many sequences one scatter beats a slice update per sequence (jax_notes C.3).
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


def write_rows(
    cache: KVRows, rows: KVRows, start_R: jax.Array, row_R: jax.Array | None = None
) -> KVRows:
    """Writes rows of T tokens at slots start_R .. start_R + T - 1 of each sequence, or of the
    sequences row_R.

    The caller sees to start + T <= S: a slice update past the end would be clamped onto committed
    rows. The same sequence may stand in row_R twice if its rows are the same.
    """
    return KVRows(
        _write(cache.k_BKHS, rows.k_BKHS, start_R, row_R, 3),
        _write(cache.v_BKSH, rows.v_BKSH, start_R, row_R, 2),
    )


def _write(
    cache: jax.Array,
    rows: jax.Array,
    start_R: jax.Array,
    row_R: jax.Array | None,
    token_axis: int,
) -> jax.Array:
    rows = rows.astype(cache.dtype)

    def corner(row, start):
        return tuple(start if axis == token_axis else row if axis == 0 else 0 for axis in range(4))

    if rows.shape[0] <= _UNROLL_ROWS:
        for line in range(rows.shape[0]):
            row = line if row_R is None else row_R[line]
            cache = jax.lax.dynamic_update_slice(
                cache, rows[line : line + 1], corner(row, start_R[line])
            )
        return cache
    if row_R is None:
        update = lambda old, new, start: jax.lax.dynamic_update_slice(
            old, new, corner(0, start)[1:]
        )
        return jax.vmap(update)(cache, rows, start_R)
    slots = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, token_axis),
    )
    return jax.lax.scatter(cache, jnp.stack([row_R, start_R], axis=1), rows, slots)


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The rows of every layer, and how many tokens of each sequence they hold: slot s holds
    position s.
    """

    layers: list[KVRows]
    length_B: jax.Array

    def with_(self, **changes: Any) -> Self:
        """The cache with other fields."""
        return replace(self, **changes)

    @property
    def capacity(self) -> int:
        """Slots of each sequence."""
        return self.layers[0].v_BKSH.shape[2] if self.layers else 0

    def visible(self) -> jax.Array:
        """Mask [B, S] of the slots that hold tokens."""
        return visible_slots(self.length_B, self.layers)

    def of_rows(self, row_R: jax.Array) -> list[KVRows]:
        """A copy of some sequences' rows."""
        return [KVRows(layer.k_BKHS[row_R], layer.v_BKSH[row_R]) for layer in self.layers]

    def put(self, rows: Sequence[KVRows], row_R: jax.Array, start_R: jax.Array) -> Self:
        """Writes a chunk of T tokens of the sequences row_R, from position start_R on."""
        layers = [
            write_rows(layer, new, start_R, row_R)
            for layer, new in zip(self.layers, rows, strict=True)
        ]
        return replace(self, layers=layers)

    def append(self, rows: Sequence[KVRows], bonus_B: jax.Array) -> Self:
        """Writes rows of T tokens after those that every sequence holds; `length_B` decides later
        how many of them count.

        bonus_B: the round's chosen tokens, never negative.
        """
        # Where the rows go is made to depend on the chosen token, so that XLA must order every
        # write after all reads and can do it in place. Without drafts nothing else ties the two,
        # and it would copy the caches each round.
        start_B = jnp.where(bonus_B < 0, 0, self.length_B)
        return replace(self, layers=write_all(self.layers, rows, start_B))

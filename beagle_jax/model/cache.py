"""The key/value cache: a fixed number of slots, and a length per sequence.

Donated caches are written in place. Slots at or past a sequence's length hold zeros or old values.
The mask depends only on the length, not on what the slots hold. Masked slots must hold finite
values, because 0 x NaN would be NaN: memory is zeroed, and values that are not finite are stored as
zeros. A token with such values is unusable itself (`decoding/round.py`), and its slot goes to the
next text of the sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray

# Above this many sequences, one scatter is faster than a slice update per sequence.
_UNROLL_ROWS = 8


class KVRows(NamedTuple):
    """Rotated keys, and values, of some tokens in one layer.

    The token axis of keys is last. On a CPU with two cores, the score product of 64 sequences was
    then three times as fast; on accelerators the order has not been measured.
    """

    k_BKHS: jax.Array
    v_BKSH: jax.Array


def round_up(length: int, multiple: int) -> int:
    """Rounds up to a multiple, so that few capacities and padded lengths are compiled."""
    return -(-int(length) // multiple) * multiple


def empty_rows(
    batch: int, num_kv_heads: int, capacity: int, head_dim: int, dtype: jnp.dtype
) -> KVRows:
    """Returns zeroed keys and values with [batch, K, capacity, H] elements."""
    k_BKHS = jnp.zeros((batch, num_kv_heads, head_dim, capacity), dtype)
    return KVRows(k_BKHS, jnp.zeros((batch, num_kv_heads, capacity, head_dim), dtype))


def write_rows(
    cache: KVRows, rows: KVRows, start_R: AnyArray, row_R: AnyArray | None = None
) -> KVRows:
    """Writes keys and values of T tokens at slots start_R .. start_R + T - 1.

    They go to every sequence, or to the sequences row_R. The caller ensures start + T <= S:
    `dynamic_update_slice` would move a write past the end back onto valid slots. A sequence may
    appear in row_R twice if both writes are the same. Values that are not finite become zeros.
    """
    return KVRows(
        _write(cache.k_BKHS, rows.k_BKHS, start_R, row_R, 3),
        _write(cache.v_BKSH, finite(rows.v_BKSH), start_R, row_R, 2),
    )


def finite(values: jax.Array) -> jax.Array:
    """Returns the values, with zeros in place of NaN and infinity."""
    return jnp.where(jnp.isfinite(values), values, 0)


def _write(
    cache: jax.Array,
    rows: jax.Array,
    start_R: AnyArray,
    row_R: AnyArray | None,
    token_axis: int,
) -> jax.Array:
    rows = rows.astype(cache.dtype)

    def corner(row: AnyArray | int, start: AnyArray) -> tuple[AnyArray | int, ...]:
        return tuple(start if axis == token_axis else row if axis == 0 else 0 for axis in range(4))

    if rows.shape[0] <= _UNROLL_ROWS:
        for line in range(rows.shape[0]):
            row = line if row_R is None else row_R[line]
            cache = jax.lax.dynamic_update_slice(
                cache, rows[line : line + 1], corner(row, start_R[line])
            )
        return cache
    if row_R is None:

        def update(old: jax.Array, new: jax.Array, start: AnyArray) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, new, corner(0, start)[1:])

        return jax.vmap(update)(cache, rows, start_R)
    slots = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, token_axis),
    )
    return jax.lax.scatter(cache, jnp.stack([row_R, start_R], axis=1), rows, slots)


def take_rows(rows: KVRows, index_BT: jax.Array) -> KVRows:
    """Selects T tokens of each sequence by index along the token axis."""
    k_BKHT = jnp.take_along_axis(rows.k_BKHS, index_BT[:, None, None, :], axis=3)
    return KVRows(k_BKHT, jnp.take_along_axis(rows.v_BKSH, index_BT[:, None, :, None], axis=2))


def append_rows(rows: KVRows | None, more: KVRows) -> KVRows:
    """Concatenates along the token axis; None stands for no tokens."""
    if rows is None:
        return more
    k_BKHS = jnp.concatenate([rows.k_BKHS, more.k_BKHS], axis=3)
    return KVRows(k_BKHS, jnp.concatenate([rows.v_BKSH, more.v_BKSH], axis=2))


def visible_slots(length_B: jax.Array, caches: Sequence[KVRows]) -> jax.Array:
    """Mask [B, S] of the slots below each sequence's length; S = 0 without caches."""
    capacity = caches[0].v_BKSH.shape[2] if caches else 0
    return jnp.arange(capacity)[None, :] < length_B[:, None]


def write_all(caches: Sequence[KVRows], rows: Sequence[KVRows], start_B: AnyArray) -> list[KVRows]:
    """Applies `write_rows` to every layer."""
    return [write_rows(cache, new, start_B) for cache, new in zip(caches, rows, strict=True)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, and the number of tokens in each sequence.

    Slot s holds position s.
    """

    layers: list[KVRows]
    length_B: jax.Array

    def with_(self, **changes: Any) -> Self:
        """Returns the cache with other fields."""
        return replace(self, **changes)

    @property
    def capacity(self) -> int:
        """Number of slots per sequence."""
        return self.layers[0].v_BKSH.shape[2] if self.layers else 0

    def visible(self) -> jax.Array:
        """Mask [B, S] of the slots that hold tokens."""
        return visible_slots(self.length_B, self.layers)

    def positions(self) -> jax.Array | None:
        """Position [B, S] of the token in each slot; None if it is the slot's number."""
        return None

    def past(self, row_R: AnyArray, length: AnyArray) -> tuple[list[KVRows], jax.Array]:
        """Copies some sequences' slots, with a mask [R, S] of their first `length` tokens.

        These tokens belong to prompts.
        """
        layers = [KVRows(layer.k_BKHS[row_R], layer.v_BKSH[row_R]) for layer in self.layers]
        return layers, visible_slots(jnp.broadcast_to(length, row_R.shape), layers)

    def put(self, rows: Sequence[KVRows], row_R: AnyArray, start: AnyArray) -> Self:
        """Writes a chunk of T prompt tokens to the sequences row_R, from position `start` on."""
        start_R = jnp.broadcast_to(start, row_R.shape)
        layers = [
            write_rows(layer, new, start_R, row_R)
            for layer, new in zip(self.layers, rows, strict=True)
        ]
        return replace(self, layers=layers)

    def holding(self, row_R: AnyArray, length_R: AnyArray) -> Self:
        """Returns the cache with exactly length_R prompt tokens in the sequences row_R."""
        return replace(self, length_B=self.length_B.at[row_R].set(length_R))

    def append(self, rows: Sequence[KVRows], bonus_B: jax.Array) -> Self:
        """Writes T tokens after those that each sequence holds.

        `length_B` decides later how many of them count.

        bonus_B: the round's bonus tokens, never negative.
        """
        # The start depends on the bonus token, so that XLA must order every write after all reads
        # and can write in place. Without drafts, no other dependency orders them, and XLA would
        # copy the caches in each round.
        start_B = jnp.where(bonus_B < 0, 0, self.length_B)
        return replace(self, layers=write_all(self.layers, rows, start_B))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingCache(KVCache):
    """A cache for rounds of one token.

    Its first `ring` slots are a ring that all sequences share; prompts are stored behind it. Every
    round writes the same slot for each sequence, so the write is a slice and not a scatter. On two
    Intel Xeon cores (2.3 GHz), the scatter took 0.3 s of a step's 0.9 s (256 rows of SmolLM2-135M,
    `benchmarks/writing_answers.py`). An unfinished sequence has
    taken part in every round since it was admitted, so the newest slots of the ring hold its
    tokens, and their order gives the positions.

        ring of 4, 6 rounds so far; a sequence with a prompt of 2 tokens and 3 of its answer:
        slot       0  1  2  3 | 4  5
        round      4  5  2  3 |          the next round writes slot 2
        position   3  4  -  2 | 0  1
    """

    prompt_B: jax.Array  # tokens of each prompt
    rounds: jax.Array  # so far
    ring: int = field(metadata={"static": True})

    def visible(self) -> jax.Array:
        """Mask [B, S] of the slots that hold tokens."""
        own_B = self.length_B - self.prompt_B
        slot_1S = jnp.arange(self.capacity)[None]
        own_BS = (slot_1S < self.ring) & (self._age_1S() < own_B[:, None])
        prompt_BS = (slot_1S >= self.ring) & (slot_1S - self.ring < self.prompt_B[:, None])
        return own_BS | prompt_BS

    def positions(self) -> jax.Array | None:
        """Position [B, S] of the token in each visible slot."""
        slot_1S = jnp.arange(self.capacity)[None]
        own_BS = self.length_B[:, None] - 1 - self._age_1S()
        return jnp.where(slot_1S < self.ring, own_BS, slot_1S - self.ring)

    def past(self, row_R: AnyArray, length: AnyArray) -> tuple[list[KVRows], jax.Array]:
        """Copies some sequences' prompts, with a mask [R, S] of their first `length` tokens."""
        layers = [
            KVRows(layer.k_BKHS[row_R, :, :, self.ring :], layer.v_BKSH[row_R, :, self.ring :])
            for layer in self.layers
        ]
        return layers, visible_slots(jnp.broadcast_to(length, row_R.shape), layers)

    def put(self, rows: Sequence[KVRows], row_R: AnyArray, start: AnyArray) -> Self:
        """Writes a chunk of T prompt tokens to the sequences row_R, from position `start` on."""
        return super().put(rows, row_R, self.ring + start)

    def holding(self, row_R: AnyArray, length_R: AnyArray) -> Self:
        """Returns the cache with exactly length_R prompt tokens in the sequences row_R."""
        held = super().holding(row_R, length_R)
        return replace(held, prompt_B=self.prompt_B.at[row_R].set(length_R))

    def append(self, rows: Sequence[KVRows], bonus_B: jax.Array) -> Self:
        """Writes one token of each sequence to the ring's next slot."""
        # The slot depends on the bonus tokens for the same reason as in KVCache.append.
        slot = jnp.where((bonus_B < 0).any(), 0, self.rounds % self.ring)
        layers = [
            KVRows(
                _write_slot(layer.k_BKHS, new.k_BKHS, slot, 3),
                _write_slot(layer.v_BKSH, finite(new.v_BKSH), slot, 2),
            )
            for layer, new in zip(self.layers, rows, strict=True)
        ]
        return replace(self, layers=layers, rounds=self.rounds + 1)

    def resized(self, row_R: AnyArray, room: int) -> Self:
        """Keeps only the sequences row_R, with room for prompts of `room` tokens or more."""
        more = max(0, self.ring + room - self.capacity)
        layers = [
            KVRows(
                jnp.pad(layer.k_BKHS[row_R], ((0, 0), (0, 0), (0, 0), (0, more))),
                jnp.pad(layer.v_BKSH[row_R], ((0, 0), (0, 0), (0, more), (0, 0))),
            )
            for layer in self.layers
        ]
        return replace(
            self, layers=layers, length_B=self.length_B[row_R], prompt_B=self.prompt_B[row_R]
        )

    def _age_1S(self) -> jax.Array:
        """Number of rounds since each slot of the ring was written."""
        return (self.rounds - 1 - jnp.arange(self.capacity)[None]) % self.ring


def _write_slot(cache: jax.Array, rows: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cache, rows.astype(cache.dtype), slot, axis)


def repeated(rows: Sequence[KVRows], count: int) -> list[KVRows]:
    """Repeats one sequence's keys and values `count` times along the batch."""
    return [
        KVRows(jnp.repeat(layer.k_BKHS, count, 0), jnp.repeat(layer.v_BKSH, count, 0))
        for layer in rows
    ]

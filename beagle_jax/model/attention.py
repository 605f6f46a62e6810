"""Masked attention, over all keys at once or in blocks of them.

Attention has two steps, so that keys may be in several places (a cache and the new tokens, or true
and predicted states): `partial_attention` over each place, then `merge_attention`. Together they
equal one softmax over all keys. A query that sees no key gets zeros (method.md 2.5).

Many keys are computed in blocks: float32 scores of a block are all that is in memory, forward and
backward, and blocks after the last visible key are not read.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Score of a masked key. It is finite, because a query that sees no key would compute inf - inf.
MASKED_SCORE = -1e30
# Keys that are computed at once where there are many; scores of all keys would fill the memory.
BLOCK = 256
MANY_KEYS, _MANY_QUERIES = 1024, 64
# Fewer rows of a product than this are padded on TPUs. libtpu would compute them without its matrix
# units, in another order of keys and values than products of more rows, and turn whole caches at
# the beginning and end of each call of a program (benchmarks/in_place.py).
_TPU_ROWS = 8


class PartialAttention(NamedTuple):
    """Unnormalised attention over some of the keys (log-sum-exp form, method.md 4.5b)."""

    out_BKGTH: jax.Array  # sum over visible keys of exp(score - peak) * value
    peak_BKGT: jax.Array  # highest visible score, MASKED_SCORE where none is visible
    total_BKGT: jax.Array  # sum over visible keys of exp(score - peak)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Squeezes x into -cap..cap with a tanh; None leaves x unchanged.

    Values small against the cap hardly change.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def partial_attention(
    q_BKGTH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    mask: jax.Array | bool,
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> PartialAttention:
    """Softmax numerator and denominator over one set of keys, in blocks if both are many.

    mask: True where the query sees the key, broadcastable to [B, K, G, T, S]. scale: factor of the
    scores; None: H ** -0.5. cap: limit of the scaled scores (`soft_cap`).
    """
    scaled_BKGTH = q_BKGTH * (q_BKGTH.shape[-1] ** -0.5 if scale is None else scale)
    operands = scaled_BKGTH, k_BKHS, v_BKSH, mask
    if k_BKHS.shape[-1] < MANY_KEYS or isinstance(mask, bool):
        return PartialAttention(*_at_once(cap, *operands))
    in_blocks = partial(_in_blocks, cap)
    if q_BKGTH.shape[-2] >= _MANY_QUERIES:
        return PartialAttention(*in_blocks(*operands))
    # Few queries: scores take no memory, but on a CPU the time of a step follows the keys that are
    # read (benchmarks/live_attention.py). Elsewhere that is not measured yet.
    at_once, on_tpu = partial(_at_once, cap), partial(_at_once, cap, least_rows=_TPU_ROWS)
    chosen = jax.lax.platform_dependent(*operands, cpu=in_blocks, tpu=on_tpu, default=at_once)
    return PartialAttention(*chosen)


def _at_once(
    cap: float | None,
    q_BKGTH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    mask: jax.Array | bool,
    *,
    least_rows: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three parts of `PartialAttention`, from the scores of all keys.

    least_rows: of both products, which are padded to it.
    """
    score = _scores(q_BKGTH, k_BKHS, mask, cap, least_rows)
    # The peak cancels in the merge, so it needs no gradient.
    peak = jax.lax.stop_gradient(score.max(axis=-1))
    weight = jnp.where(mask, jnp.exp(score - peak[..., None]), 0.0)
    return _weighted(weight, v_BKSH, least_rows), peak, weight.sum(axis=-1)


def _padded_product(
    equation: str,
    x_BKMI: jax.Array,
    y: jax.Array,
    least_rows: int,
    dtype: DTypeLike | None,
) -> jax.Array:
    """Multiplies M rows with keys or values, padded to at least `least_rows` rows."""
    M = x_BKMI.shape[2]
    if least_rows <= M:
        return jnp.einsum(equation, x_BKMI, y, preferred_element_type=dtype)
    x_BKMI = jnp.pad(x_BKMI, ((0, 0), (0, 0), (0, least_rows - M), (0, 0)))
    # Without the barriers, XLA would remove the padding again.
    x_BKMI = jax.lax.optimization_barrier(x_BKMI)
    out_BKMO = jnp.einsum(equation, x_BKMI, y, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(out_BKMO)[:, :, :M]


def _scores(
    q_BKGTH: jax.Array,
    k_BKHS: jax.Array,
    mask: jax.Array | bool,
    cap: float | None,
    least_rows: int = 1,
) -> jax.Array:
    """Float32 scores [B, K, G, T, S] of scaled queries."""
    B, K, G, T, H = q_BKGTH.shape
    q_BKMH = q_BKGTH.reshape(B, K, G * T, H)
    score_BKMS = _padded_product("BKMH,BKHS->BKMS", q_BKMH, k_BKHS, least_rows, jnp.float32)
    return jnp.where(mask, soft_cap(score_BKMS, cap).reshape(B, K, G, T, -1), MASKED_SCORE)


def _weighted(weight_BKGTS: jax.Array, v_BKSH: jax.Array, least_rows: int = 1) -> jax.Array:
    """Float32 sums of values [B, K, G, T, H]."""
    B, K, G, T, S = weight_BKGTS.shape
    # The sum is not normalised yet: over many keys it exceeds 65504, the largest float16.
    wide = jnp.float32 if v_BKSH.dtype == jnp.float16 else None
    weight_BKMS = weight_BKGTS.reshape(B, K, G * T, S).astype(v_BKSH.dtype)
    out_BKMH = _padded_product("BKMS,BKSH->BKMH", weight_BKMS, v_BKSH, least_rows, wide)
    return out_BKMH.reshape(B, K, G, T, -1).astype(jnp.float32)


class _Block(NamedTuple):
    """BLOCK keys and values from slot `start` on, and which queries see them."""

    start: jax.Array
    k_BKHS: jax.Array
    v_BKSH: jax.Array
    mask: jax.Array


def _block(index: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask: jax.Array) -> _Block:
    """Cuts out a block; the last one ends with the keys, and hides those of the block before."""
    start = jnp.minimum(index * BLOCK, k_BKHS.shape[-1] - BLOCK)
    own_S = start + jnp.arange(BLOCK) >= index * BLOCK
    return _Block(
        start,
        jax.lax.dynamic_slice_in_dim(k_BKHS, start, BLOCK, axis=3),
        jax.lax.dynamic_slice_in_dim(v_BKSH, start, BLOCK, axis=2),
        jax.lax.dynamic_slice_in_dim(mask, start, BLOCK, axis=4) & own_S[None, None, None, None],
    )


def _blocks(mask: jax.Array) -> jax.Array:
    """Number of blocks up to the last key that any query sees."""
    seen_S = mask.any(axis=(0, 1, 2, 3))
    return -(-jnp.max(jnp.where(seen_S, jnp.arange(len(seen_S)) + 1, 0)) // BLOCK)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(
    cap: float | None, q_BKGTH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three parts of `PartialAttention`, computed with an online softmax over blocks."""

    def add(index: jax.Array, sums: tuple) -> tuple:
        out, peak, total = sums
        block = _block(index, k_BKHS, v_BKSH, mask)
        score = _scores(q_BKGTH, block.k_BKHS, block.mask, cap)
        higher = jnp.maximum(peak, score.max(axis=-1))
        weight = jnp.where(block.mask, jnp.exp(score - higher[..., None]), 0.0)
        rescaled = jnp.exp(peak - higher)
        out = out * rescaled[..., None] + _weighted(weight, block.v_BKSH)
        return out, higher, total * rescaled + weight.sum(axis=-1)

    shape = q_BKGTH.shape[:-1]
    nothing = (
        jnp.zeros((*shape, v_BKSH.shape[-1]), jnp.float32),
        jnp.full(shape, MASKED_SCORE, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    return jax.lax.fori_loop(0, _blocks(mask), add, nothing)


def _in_blocks_forward(
    cap: float | None, q_BKGTH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, mask: jax.Array
) -> tuple[tuple, tuple]:
    parts = _in_blocks(cap, q_BKGTH, k_BKHS, v_BKSH, mask)
    return parts, (q_BKGTH, k_BKHS, v_BKSH, mask, parts[1])


def _in_blocks_backward(cap: float | None, residuals: tuple, gradients: tuple) -> tuple:
    """Computes each block's weights again; the peak is a constant (it cancels in the merge)."""
    q_BKGTH, k_BKHS, v_BKSH, mask, peak = residuals
    of_out, _, of_total = gradients

    def add(index: jax.Array, sums: tuple) -> tuple:
        block = _block(index, k_BKHS, v_BKSH, mask)

        def parts(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            score = _scores(q, k, block.mask, cap)
            weight = jnp.where(block.mask, jnp.exp(score - peak[..., None]), 0.0)
            return _weighted(weight, v), weight.sum(axis=-1)

        _, pull = jax.vjp(parts, q_BKGTH, block.k_BKHS, block.v_BKSH)
        of_q, of_k, of_v = pull((of_out, of_total))
        sum_q, sum_k, sum_v = sums
        return (
            sum_q + of_q,
            _added(sum_k, of_k, block.start, axis=3),
            _added(sum_v, of_v, block.start, axis=2),
        )

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_BKGTH, k_BKHS, v_BKSH))
    of_q, of_k, of_v = jax.lax.fori_loop(0, _blocks(mask), add, zeros)
    cast = of_q.astype(q_BKGTH.dtype), of_k.astype(k_BKHS.dtype), of_v.astype(v_BKSH.dtype)
    return *cast, None


def _added(total: jax.Array, part: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    there = jax.lax.dynamic_slice_in_dim(total, start, BLOCK, axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(total, there + part, start, axis=axis)


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def merge_attention(*parts: PartialAttention) -> jax.Array:
    """Normalised attention over the union of the parts' keys, float32 [B, K, G, T, H].

    Zeros for a query that sees no key in any part.
    """
    peak = parts[0].peak_BKGT
    for part in parts[1:]:
        peak = jnp.maximum(peak, part.peak_BKGT)
    # A part without visible keys has total 0, and a finite scale: exp(MASKED - MASKED) is 1.
    scales = [jnp.exp(part.peak_BKGT - peak) for part in parts]
    total = sum(part.total_BKGT * scale for part, scale in zip(parts, scales, strict=True))
    out = sum(part.out_BKGTH * scale[..., None] for part, scale in zip(parts, scales, strict=True))
    assert not isinstance(total, int)  # there is at least one part
    # Not `total > 0`, which is False for NaN: a query that sees a key of NaN gets NaN, and only one
    # that sees no key gets zeros.
    seen = ~(total <= 0)
    # The inner `where` keeps zero out of the division, so neither value nor gradient can be NaN
    # (method.md 2.5).
    return jnp.where(seen[..., None], out / jnp.where(seen, total, 1.0)[..., None], 0.0)

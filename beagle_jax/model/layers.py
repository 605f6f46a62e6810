"""Norm, rotary embedding and masked attention as pure functions.

Attention has two steps, so that keys may be in several places (a cache and the new tokens, or true
and predicted states): `partial_attention` over each place, then `merge_attention`. Together they
equal one softmax over all keys. A query that sees no key gets zeros (method.md 2.5).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Score of a masked key. It is finite, because a query that sees no key would compute inf - inf.
MASKED_SCORE = -1e30


def rms_norm(
    x: jax.Array, weight_D: jax.Array, eps: float, axis: int = -1, *, offset: float = 0.0
) -> jax.Array:
    """Root-mean-square norm over `axis` of width D, computed in float32.

    The result is cast back before it is multiplied by the weight, as in Hugging Face's Llama. If
    offset is not 0, it is multiplied by offset + weight and then cast (Gemma).
    """
    x_f32 = x.astype(jnp.float32)
    normed = x_f32 * jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=axis, keepdims=True) + eps)
    shape = [1] * x.ndim
    shape[axis] = weight_D.shape[0]
    weight = weight_D.reshape(shape)
    if offset:
        return (normed * (offset + weight.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * weight


class RopeScaling(NamedTuple):
    """Scaling of rotary frequencies for contexts longer than in pre-training. Hashable.

    If only the factor is given, scaling is linear. Otherwise it is Llama 3's: a wave that fits
    fewer than low_freq_factor times in `original_positions` is slowed by the factor, a wave that
    fits more than high_freq_factor times is unchanged, and waves in between are blended.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_positions: float | None = None  # tokens; None: linear


class RopeFactors(NamedTuple):
    """Divisors of the rotary frequencies, [H / 2] numbers. Hashable."""

    factors: tuple[float, ...]


def rope_tables(
    positions: jax.Array,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | RopeFactors | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns float32 cosines and sines [*positions.shape, head_dim] of the rotary embedding.

    Pairs are half-split.
    """
    frequency = rope_frequencies(head_dim, theta, scaling)
    # Angles are float32, because bfloat16 would round position 257 to 256.
    angle = positions[..., None].astype(jnp.float32) * jnp.expand_dims(
        frequency, range(positions.ndim)
    )
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | RopeFactors | None = None
) -> jax.Array:
    """Angle per position of each rotary pair, float32 [H / 2], in radians."""
    frequency = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if isinstance(scaling, RopeFactors):
        return frequency / jnp.asarray(scaling.factors, jnp.float32)
    return frequency if scaling is None else _scaled(frequency, scaling)


def _scaled(frequency: jax.Array, scaling: RopeScaling) -> jax.Array:
    slow = frequency / scaling.factor
    if scaling.original_positions is None:
        return slow
    waves = scaling.original_positions * frequency / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unscaled_share = jnp.clip((waves - low) / (high - low), 0.0, 1.0)
    return (1 - unscaled_share) * slow + unscaled_share * frequency


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the last axis of x (head width, half-split pairs).

    cos and sin broadcast against x.
    """
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + rotated * sin).astype(x.dtype)


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
    """Softmax numerator and denominator over one set of keys.

    mask: True where the query sees the key, broadcastable to [B, K, G, T, S]. scale: factor of the
    scores; None: H ** -0.5. cap: limit of the scaled scores (`soft_cap`).
    """
    B, K, G, T, H = q_BKGTH.shape
    q_BKMH = q_BKGTH.reshape(B, K, G * T, H) * (H**-0.5 if scale is None else scale)
    score = jnp.einsum("BKMH,BKHS->BKMS", q_BKMH, k_BKHS, preferred_element_type=jnp.float32)
    score = soft_cap(score, cap)
    score = jnp.where(mask, score.reshape(B, K, G, T, -1), MASKED_SCORE)
    # The peak cancels in the merge, so it needs no gradient.
    peak = jax.lax.stop_gradient(score.max(axis=-1))
    weight = jnp.where(mask, jnp.exp(score - peak[..., None]), 0.0)
    # The sum is not normalised yet: over many keys it exceeds 65504, the largest float16.
    wide = jnp.float32 if v_BKSH.dtype == jnp.float16 else None
    out_BKMH = jnp.einsum(
        "BKMS,BKSH->BKMH",
        weight.reshape(B, K, G * T, -1).astype(v_BKSH.dtype),
        v_BKSH,
        preferred_element_type=wide,
    )
    return PartialAttention(
        out_BKMH.reshape(B, K, G, T, H).astype(jnp.float32), peak, weight.sum(axis=-1)
    )


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
    seen = total > 0
    # The inner `where` keeps zero out of the division, so neither value nor gradient can be NaN
    # (method.md 2.5).
    return jnp.where(seen[..., None], out / jnp.where(seen, total, 1.0)[..., None], 0.0)


def split_heads(x_BTF: jax.Array, num_kv_heads: int, head_dim: int) -> jax.Array:
    """Splits heads: [B, T, N*H] -> [B, K, G, T, H].

    Keys and values have G = 1; callers drop that axis by indexing.
    """
    B, T, F = x_BTF.shape
    grouped = x_BTF.reshape(B, T, num_kv_heads, F // (num_kv_heads * head_dim), head_dim)
    return grouped.transpose(0, 2, 3, 1, 4)


def join_heads(out_BKGTH: jax.Array) -> jax.Array:
    """Joins heads: [B, K, G, T, H] -> [B, T, N*H], the inverse of `split_heads`."""
    B, K, G, T, H = out_BKGTH.shape
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G * H)

"""Norm, rotary embedding and heads as pure functions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
    """Divisors of the rotary frequencies, one for each rotated pair. Hashable."""

    factors: tuple[float, ...]
    scale: float = 1.0  # of cosines and sines, and so of scores, which get its square


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
    scale = scaling.scale if isinstance(scaling, RopeFactors) else 1.0
    if scale != 1.0:
        return jnp.cos(angle) * scale, jnp.sin(angle) * scale
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

    cos and sin broadcast against x, or are narrower: then the end of the head stays as it is.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return jnp.concatenate([apply_rope(x[..., :width], cos, sin), x[..., width:]], axis=-1)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * cos + rotated * sin).astype(x.dtype)


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

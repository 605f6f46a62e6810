"""Norm, rotary embedding and attention in two halves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beagle_jax.model.attention import merge_attention, partial_attention, soft_cap
from beagle_jax.model.layers import apply_rope, rms_norm, rope_tables

B, K, G, T, S, H = 2, 2, 3, 5, 9, 8


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, K, G, T, H))
    k = jax.random.normal(keys[1], (B, K, H, S))
    v = jax.random.normal(keys[2], (B, K, S, H))
    mask = (
        jax.random.bernoulli(keys[3], 0.6, (B, 1, 1, T, S))
        .at[:, :, :, 0]
        .set(False)
        .at[:, :, :, 1, 0]
        .set(True)
    )
    return q, k, v, mask


@jax.jit
def _reference(q, k, v, mask):
    """Calls jax.nn.dot_product_attention, with zeros where nothing is visible."""
    out = jax.nn.dot_product_attention(
        q.reshape(B, K * G, T, H).swapaxes(1, 2),
        k.transpose(0, 3, 1, 2),
        v.swapaxes(1, 2),
        mask=mask[:, 0],
    )
    out = out.swapaxes(1, 2).reshape(B, K, G, T, H)
    return jnp.where(mask.any(axis=-1)[..., None], out, 0.0)


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_parts_merge_to_one_softmax(qkv, cut):
    q, k, v, mask = qkv
    pieces = [slice(0, cut), slice(cut, S)] if 0 < cut < S else [slice(0, S)]

    def part(q, k, v, mask, piece):
        return partial_attention(q, k[..., piece], v[:, :, piece], mask[..., piece])

    merged = jax.jit(lambda *qkv: merge_attention(*[part(*qkv, piece) for piece in pieces]))(
        q, k, v, mask
    )
    np.testing.assert_allclose(merged, _reference(q, k, v, mask), atol=1e-5)


def test_planted_bug_merge_without_peaks(qkv):
    q, k, v, mask = qkv
    parts = [
        partial_attention(q, k[..., piece] * 3, v[:, :, piece], mask[..., piece])
        for piece in (slice(0, 4), slice(4, S))
    ]
    forgot = [part._replace(peak_BKGT=jnp.zeros_like(part.peak_BKGT)) for part in parts]
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            merge_attention(*forgot), _reference(q, k * 3, v, mask), atol=1e-5
        )


def test_row_that_sees_nothing_is_zero_and_finite(qkv):
    q, k, v, mask = qkv
    run = jax.jit(
        lambda q, k, v: merge_attention(
            partial_attention(q, k[..., :4], v[:, :, :4], mask[..., :4]),
            partial_attention(q, k[..., 4:], v[:, :, 4:], mask[..., 4:]),
        )
    )
    assert float(jnp.abs(run(q, k, v)[:, :, :, 0]).max()) == 0.0
    gradients = jax.jit(jax.grad(lambda *qkv: jnp.sum(jnp.sin(run(*qkv))), argnums=(0, 1, 2)))(
        q, k, v
    )
    assert all(bool(jnp.isfinite(gradient).all()) for gradient in gradients)
    assert float(jnp.abs(gradients[0][:, :, :, 0]).max()) == 0.0


def test_rms_norm_on_any_axis():
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    weight = np.linspace(0.5, 2, 6, dtype=np.float32)
    expected = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(
        rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-5), expected, atol=1e-6
    )
    np.testing.assert_allclose(
        rms_norm(jnp.asarray(x.T), jnp.asarray(weight), 1e-5, axis=0), expected.T, atol=1e-6
    )


def test_rope_rotates_half_split_pairs():
    x = np.random.default_rng(1).standard_normal((3, 8))
    cos, sin = rope_tables(jnp.array([0, 5, 300]), 8, 100.0)
    expected = np.zeros_like(x)
    for line, position in enumerate((0, 5, 300)):
        for pair in range(4):
            angle = position / 100.0 ** (pair / 4)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            expected[line, [pair, pair + 4]] = turn @ x[line, [pair, pair + 4]]
    # Angle 300 in float32.
    np.testing.assert_allclose(
        apply_rope(jnp.asarray(x, jnp.float32), cos, sin), expected, atol=1e-4
    )


def test_norm_with_one_added_keeps_small_weights_in_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.bfloat16)
    # 1 + 2**-9 is no bfloat16: the sum has to be made in float32.
    weight = jnp.full(6, 2.0**-9, jnp.bfloat16)
    normed = np.asarray(rms_norm(x.astype(jnp.float32), jnp.ones(6), 1e-5))
    expected = jnp.asarray(normed * (1 + 2.0**-9), jnp.bfloat16)
    np.testing.assert_array_equal(rms_norm(x, weight, 1e-5, offset=1.0), expected)
    # Planted: added before, and lost.
    rounded = rms_norm(x, (1 + weight).astype(jnp.bfloat16), 1e-5)
    assert (rounded != expected).any()


def test_soft_cap():
    x = jnp.array([-100.0, 0.01, 2.0])
    np.testing.assert_allclose(
        soft_cap(x, 4.0), 4 * np.tanh(np.array([-25, 0.0025, 0.5])), atol=1e-6
    )
    assert soft_cap(x, None) is x

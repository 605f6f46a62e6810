"""Attention in blocks of keys: numbers, gradients, dead blocks and memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beagle_jax.model import attention
from beagle_jax.model.attention import merge_attention, partial_attention

B, K, G, T, S, H = 2, 2, 3, 5, 23, 8


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """Blocks of 4 of 23 keys, so that the last block overlaps the one before it."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    monkeypatch.setattr(attention, "MANY_KEYS", 8)
    monkeypatch.setattr(attention, "_MANY_QUERIES", 2)


def arrays(dtype=jnp.float32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = (B, K, G, T, H), (B, K, H, S), (B, K, S, H)
    return tuple(jnp.asarray(3 * rng.standard_normal(shape), dtype) for shape in shapes)


def masks() -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    some = rng.random((B, 1, 1, T, S)) < 0.4
    some[0, :, :, 2] = False  # a query that sees nothing
    begins = np.arange(S) < 6
    return {
        "some": jnp.asarray(some),
        "nothing after the sixth": jnp.asarray(some & begins),
        "of slots": jnp.asarray(begins[None, None, None, None].repeat(B, 0)),
        "none": jnp.zeros((B, 1, 1, T, S), bool),
        "last": jnp.zeros((B, 1, 1, T, S), bool).at[..., -1].set(True),
    }


def whole(monkeypatch, *arguments, **more):
    """The same attention over all keys at once."""
    with monkeypatch.context() as patch:
        patch.setattr(attention, "MANY_KEYS", S + 1)
        return partial_attention(*arguments, **more)


def merged(attend, q, k, v, mask, **more) -> jax.Array:
    """Merges with a second set of keys, as callers do."""
    other = partial_attention(q, k[..., :3], v[:, :, :3], True)
    return merge_attention(attend(q, k, v, mask, **more), other)


def check_close(actual, expected, rtol: float = 2e-5) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-5)


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("cap", [None, 5.0])
def test_blocks_give_the_numbers_of_all_keys_at_once(monkeypatch, name, cap):
    mask = masks()[name]
    actual = partial_attention(*arrays(), mask, cap=cap, scale=0.3)
    check_close(actual, whole(monkeypatch, *arrays(), mask, cap=cap, scale=0.3))


@pytest.mark.parametrize("name", ["some", "nothing after the sixth", "of slots", "last"])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_gradients_are_those_of_all_keys_at_once(monkeypatch, name, cap):
    mask, weight = masks()[name], jax.random.normal(jax.random.key(2), (B, K, G, T, H))

    def loss(attend, q, k, v):
        return jnp.sum(weight * merged(attend, q, k, v, mask, cap=cap))

    actual, expected = (
        jax.grad(partial(loss, attend), argnums=(0, 1, 2))(*arrays())
        for attend in (partial_attention, partial(whole, monkeypatch))
    )
    check_close(actual, expected, rtol=1e-4)
    assert all(jnp.abs(gradient).max() > 0 for gradient in actual)


def overlapping(index, k_BKHS, v_BKSH, mask):
    """Planted bug: the last block counts the keys that it shares with the one before it twice."""
    block = RIGHT(index, k_BKHS, v_BKSH, jnp.ones_like(mask))
    cut = jax.lax.dynamic_slice_in_dim(mask, block.start, attention.BLOCK, axis=4)
    return block._replace(mask=cut)


def one_less(mask):
    """Planted bug: the last block with visible keys is left out."""
    return COUNT(mask) - 1


RIGHT, COUNT = attention._block, attention._blocks


@pytest.mark.parametrize(("name", "bug"), [("_block", overlapping), ("_blocks", one_less)])
def test_planted_bugs_are_seen(monkeypatch, name, bug):
    mask = masks()["some"]
    expected = whole(monkeypatch, *arrays(), mask)
    monkeypatch.setattr(attention, name, bug)
    with pytest.raises(AssertionError):
        check_close(partial_attention(*arrays(), mask), expected)


def test_keys_after_the_last_visible_one_are_not_read(monkeypatch):
    """Not even as zeros: their values may be anything."""
    q, k, v = arrays()
    mask = masks()["nothing after the sixth"]
    expected = whole(monkeypatch, q, k, v, mask)
    k, v = k.at[..., 8:].set(jnp.nan), v.at[:, :, 8:].set(jnp.nan)
    check_close(partial_attention(q, k, v, mask), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_of_short_dtypes_are_float32(monkeypatch, dtype):
    mask = masks()["some"]
    actual = partial_attention(*arrays(dtype), mask)
    assert all(part.dtype == jnp.float32 for part in actual)
    # 3e-2: bfloat16 weights have 8 bits, and the blocks' peaks differ from the whole's
    check = merge_attention(actual), merge_attention(whole(monkeypatch, *arrays(dtype), mask))
    np.testing.assert_allclose(*check, rtol=3e-2, atol=3e-2)


def test_scores_of_all_keys_are_never_in_memory(monkeypatch):
    """Forward and backward, at the real size of a block."""
    monkeypatch.undo()
    shape, many = jax.ShapeDtypeStruct, 4096
    k, v = shape((1, 1, H, many), jnp.float32), shape((1, 1, many, H), jnp.float32)
    q, mask = shape((1, 1, 1, many, H), jnp.float32), shape((1, 1, 1, many, many), bool)

    def planned(keys: int) -> int:
        def loss(q, k, v, mask):
            return jnp.sum(merge_attention(partial_attention(q, k, v, mask)))

        with monkeypatch.context() as patch:
            patch.setattr(attention, "MANY_KEYS", keys)
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * many * many
    assert planned(1024) < scores / 2 < scores < planned(many + 1)

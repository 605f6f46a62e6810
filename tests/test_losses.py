"""The chunked loss against the plain one, in value, gradient and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE

from beagle_jax.training import losses
from beagle_jax.training.losses import smooth_l1, soft_cross_entropy

M, D, V = 23, 12, 57


@pytest.fixture(scope="module")
def rows():
    keys = jax.random.split(jax.random.key(0), 4)
    counts = jax.random.bernoulli(keys[3], 0.6, (M,))
    return jax.random.normal(keys[0], (M, D)), jax.random.normal(keys[1], (M, D)), jax.random.normal(keys[2], (V, D)), counts


def _plain(state_MD, true_MD, head_VD, counts_M):
    p_MV, log_q_MV = jax.nn.softmax(true_MD @ head_VD.T), jax.nn.log_softmax(state_MD @ head_VD.T)
    return jnp.where(counts_M, -jnp.sum(p_MV * log_q_MV, axis=-1), 0.0)


def _compare(rows, chunk) -> None:
    state, true, head, counts = rows
    weight = jnp.linspace(0.5, 2.0, M)
    chunked = lambda s: soft_cross_entropy(s, true, head, counts, chunk, ONE_DEVICE)[0]
    np.testing.assert_allclose(chunked(state), _plain(state, true, head, counts), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda s: jnp.sum(weight * chunked(s)))(state)
    expected = jax.grad(lambda s: jnp.sum(weight * _plain(s, true, head, counts)))(state)
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    assert float(jnp.abs(gradient[~counts]).max()) == 0.0


@pytest.mark.parametrize("chunk", [1, 3, 23, 64])
def test_equals_plain_form(rows, chunk):
    _compare(rows, chunk)


def test_planted_bug_gradient_without_the_target(rows, monkeypatch):
    right = losses._rows

    def wrong(*arguments):
        ce, rank, gradient = right(*arguments)
        return ce, rank, gradient + 0.01

    monkeypatch.setattr(losses, "_rows", wrong)
    with pytest.raises(AssertionError):
        _compare(rows, 3)


def test_no_row_counts(rows):
    state, true, head, _ = rows
    none = jnp.zeros(M, bool)
    loss = lambda s: jnp.sum(soft_cross_entropy(s, true, head, none, 4, ONE_DEVICE)[0])
    assert float(loss(state)) == 0.0
    assert float(jnp.abs(jax.grad(loss)(state)).max()) == 0.0


def test_rank_of_the_targets_token(rows):
    state, true, head, counts = rows
    _, rank = soft_cross_entropy(state, true, head, counts, 4, ONE_DEVICE)
    best = np.asarray(true @ head.T).argmax(axis=1)
    draft = np.asarray(state @ head.T)
    expected = [(draft[i] > draft[i, best[i]]).sum() if counts[i] else 0 for i in range(M)]
    np.testing.assert_array_equal(rank, expected)


def test_logits_of_all_rows_never_exist_at_once():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 16), (512, 16), (4096, 16))]
    counts = jax.ShapeDtypeStruct((512,), bool)
    temporaries = lambda loss: (
        jax.jit(jax.grad(lambda s, t, h, c: jnp.sum(loss(s, t, h, c)))).lower(*shapes, counts).compile().memory_analysis()
    ).temp_size_in_bytes
    all_logits = 512 * 4096 * 4
    assert temporaries(lambda s, t, h, c: soft_cross_entropy(s, t, h, c, 32, ONE_DEVICE)[0]) < 0.5 * all_logits
    assert temporaries(_plain) >= all_logits  # the measure does see them where they exist


def test_smooth_l1():
    state = jnp.array([[0.5, -2.0, 0.0, 1.0]])
    np.testing.assert_allclose(smooth_l1(state, jnp.zeros((1, 4))), [(0.125 + 1.5 + 0.0 + 0.5) / 4], atol=1e-6)

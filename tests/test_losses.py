"""The chunked loss against the plain one, in value, gradient and memory."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE

from beagle_jax.training import losses
from beagle_jax.training.distances import DISTANCES, Distributions
from beagle_jax.training.losses import distribution_loss, smooth_l1

M, D, V = 23, 12, 57


@pytest.fixture(scope="module")
def rows():
    keys = jax.random.split(jax.random.key(0), 4)
    counts = jax.random.bernoulli(keys[3], 0.6, (M,))
    return (
        jax.random.normal(keys[0], (M, D)),
        jax.random.normal(keys[1], (M, D)),
        jax.random.normal(keys[2], (V, D)),
        counts,
    )


def _plain(state_MD, true_MD, head_VD, counted_M, kind="cross_entropy"):
    """Computes every option of `train.loss` by its formula, over whole logits.

    jax differentiates it.
    """
    log_p_MV, log_q_MV = (
        jax.nn.log_softmax(true_MD @ head_VD.T),
        jax.nn.log_softmax(state_MD @ head_VD.T),
    )
    p_MV, q_MV = jnp.exp(log_p_MV), jnp.exp(log_q_MV)
    acceptance_M = jnp.minimum(p_MV, q_MV).sum(axis=-1)
    kl_M = jnp.sum(p_MV * (log_p_MV - log_q_MV), axis=-1)
    weight_M = jnp.exp(-3 * jax.lax.stop_gradient(acceptance_M))
    distance_M = {
        "cross_entropy": -jnp.sum(p_MV * log_q_MV, axis=-1),
        "kl": kl_M,
        "reverse_kl": jnp.sum(q_MV * (log_q_MV - log_p_MV), axis=-1),
        "total_variation": 1 - acceptance_M,
        "lk_hybrid": weight_M * kl_M + (1 - weight_M) * (1 - acceptance_M),
    }[kind]
    return jnp.where(counted_M, distance_M, 0.0)


def _with_gradient(loss):
    """Returns a jitted function of `rows`: the gradient by state, and the summands.

    The gradient is that of a weighted sum of them.
    """

    def weighted(state, *rest):
        return (
            jnp.sum(jnp.linspace(0.5, 2.0, M) * (summed := loss(state, *rest))),
            summed,
        )

    return jax.jit(jax.grad(weighted, has_aux=True))


@lru_cache
def _by_formula(kind):
    return _with_gradient(partial(_plain, kind=kind))


def _compare(rows, chunk, kind="cross_entropy") -> None:
    counts = rows[3]
    gradient, values = _with_gradient(
        lambda *rows: distribution_loss(*rows, kind, chunk, ONE_DEVICE)[0]
    )(*rows)
    expected, by_formula = _by_formula(kind)(*rows)
    np.testing.assert_allclose(values, by_formula, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    assert float(jnp.abs(gradient[~counts]).max()) == 0.0 and float(jnp.abs(expected).max()) > 0.01


@pytest.mark.parametrize("chunk", [1, 3, 23, 64])
def test_equals_plain_form(rows, chunk):
    _compare(rows, chunk)


@pytest.mark.parametrize("kind", DISTANCES)
def test_every_option_equals_its_formula(rows, kind):
    _compare(rows, 8, kind)


@pytest.mark.parametrize("kind", DISTANCES)
def test_planted_bug_another_distance(rows, kind, monkeypatch):
    others = {
        "cross_entropy": "kl",
        "kl": "cross_entropy",
        "reverse_kl": "kl",
        "total_variation": "lk_hybrid",
        "lk_hybrid": "kl",
    }
    monkeypatch.setitem(DISTANCES, kind, DISTANCES[others[kind]])
    with pytest.raises(AssertionError):
        _compare(rows, 8, kind)


def test_distances_by_hand():
    """p = (1/2, 1/4, 1/4) and q = (1/4, 1/4, 1/2), to compute by hand."""
    p, q, ln2 = jnp.array([[0.5, 0.25, 0.25]]), jnp.array([[0.25, 0.25, 0.5]]), np.log(2)
    distances = {
        kind: float(f(Distributions(p, jnp.log(p), q, jnp.log(q), lambda x: x.sum(axis=-1)))[0][0])
        for kind, f in DISTANCES.items()
    }
    share = np.exp(-3 * 0.75)
    expected = {
        "cross_entropy": 1.75 * ln2,
        "kl": 0.25 * ln2,
        "reverse_kl": 0.25 * ln2,
        "total_variation": 0.25,
        "lk_hybrid": share * 0.25 * ln2 + (1 - share) * 0.25,
    }
    assert distances == pytest.approx(expected, rel=1e-5)


def test_planted_bug_gradient_without_the_target(rows, monkeypatch):
    right = losses._rows

    def wrong(*arguments):
        distance, rank, gradient = right(*arguments)
        return distance, rank, gradient + 0.01

    monkeypatch.setattr(losses, "_rows", wrong)
    with pytest.raises(AssertionError):
        _compare(rows, 3)


def test_no_row_counts(rows):
    state, true, head, _ = rows
    none = jnp.zeros(M, bool)

    def loss(s):
        return jnp.sum(distribution_loss(s, true, head, none, "cross_entropy", 4, ONE_DEVICE)[0])

    value, gradient = jax.jit(jax.value_and_grad(loss))(state)
    assert float(value) == 0.0 and not np.asarray(gradient).any()


def test_rank_of_the_targets_token(rows):
    state, true, head, counts = rows
    _, rank = distribution_loss(state, true, head, counts, "cross_entropy", 4, ONE_DEVICE)
    best = np.asarray(true @ head.T).argmax(axis=1)
    draft = np.asarray(state @ head.T)
    expected = [(draft[i] > draft[i, best[i]]).sum() if counts[i] else 0 for i in range(M)]
    np.testing.assert_array_equal(rank, expected)


def test_logits_of_all_rows_never_exist_at_once():
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 16), (512, 16), (4096, 16))
    ]
    counts = jax.ShapeDtypeStruct((512,), bool)

    def temporaries(loss):
        return (
            jax.jit(jax.grad(lambda s, t, h, c: jnp.sum(loss(s, t, h, c))))
            .lower(*shapes, counts)
            .compile()
            .memory_analysis()
        ).temp_size_in_bytes

    all_logits = 512 * 4096 * 4
    assert (
        temporaries(
            lambda s, t, h, c: distribution_loss(s, t, h, c, "lk_hybrid", 32, ONE_DEVICE)[0]
        )
        < 0.5 * all_logits
    )
    assert temporaries(_plain) >= all_logits  # the measure does see them where they exist


def test_smooth_l1():
    state = jnp.array([[0.5, -2.0, 0.0, 1.0]])
    np.testing.assert_allclose(
        smooth_l1(state, jnp.zeros((1, 4))), [(0.125 + 1.5 + 0.0 + 0.5) / 4], atol=1e-6
    )

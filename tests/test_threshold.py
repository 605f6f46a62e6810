"""The lowest kept logit is that of sorting all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beagle_jax.decoding import threshold
from beagle_jax.decoding.threshold import lowest_of

V = 700
RNG = np.random.default_rng(7)
LOGITS = {
    "normal": 3 * RNG.standard_normal((40, V)).astype(np.float32),
    "ties": RNG.integers(-4, 5, (40, V)).astype(np.float32),
    "all equal": np.full((2, V), -0.0, np.float32),
    "huge and removed": np.where(RNG.random((40, V)) < 0.5, -np.inf, 1e30).astype(np.float32)
    * RNG.random((40, V), np.float32),
    "tiny": 1e-42 * RNG.standard_normal((40, V)).astype(np.float32),
}


def by_sorting(logits_V: np.ndarray, top_k: int, top_p: float) -> float:
    """Tokens equal to the last one kept are kept too, by both filters."""
    sorted_V = np.sort(logits_V.astype(np.float64))[::-1]
    lowest = sorted_V[min(top_k or V, V) - 1]
    if top_p >= 1:
        return lowest
    kept_V = np.exp(sorted_V - sorted_V[0]) * (sorted_V >= lowest)
    before_V = (np.cumsum(kept_V) - kept_V) / kept_V.sum()
    larger_V = before_V[np.searchsorted(-sorted_V, -sorted_V)]  # before the first of equal ones
    return max(lowest, sorted_V[np.flatnonzero(larger_V < top_p)[-1]])


def check(kind: str) -> None:
    """Every row has settings of its own."""
    logits_MV = LOGITS[kind]
    M = len(logits_MV)
    top_k_M = RNG.choice([0, 1, 2, 17, 300, V, 2**31 - 1], M)
    top_p_M = RNG.choice([1e-6, 0.2, 0.9, 0.999, 1.0], M).astype(np.float32)
    lowest_M1 = jax.jit(lowest_of)(logits_MV, jnp.asarray(top_k_M), jnp.asarray(top_p_M))
    for logits_V, top_k, top_p, lowest in zip(
        logits_MV, top_k_M, top_p_M, np.asarray(lowest_M1)[:, 0], strict=True
    ):
        # Sums of float32 decide otherwise only where the probability is this near to top-p.
        shares = (top_p - 2e-7, top_p + 2e-7) if top_p < 1 else (1, 1)
        fewest, most = (by_sorting(logits_V, top_k, share) for share in shares)
        lowest = max(lowest, logits_V.min())  # below it, all are kept too
        assert np.float32(fewest) >= lowest >= np.float32(most)


@pytest.mark.parametrize("kind", LOGITS)
def test_it_is_that_of_sorting(kind):
    check(kind)


def test_each_filter_alone_and_none():
    logits_MV = jnp.asarray(LOGITS["normal"][:3])
    three = jnp.full(3, 3)
    assert (logits_MV >= lowest_of(logits_MV, three, None)).sum(axis=1).tolist() == [3] * 3
    half = jnp.full(3, 0.5)
    remains_MV = logits_MV >= lowest_of(logits_MV, None, half)
    share_M = jnp.where(remains_MV, jax.nn.softmax(logits_MV), 0).sum(axis=1)
    assert (share_M >= 0.5).all() and (share_M < 0.6).all()
    assert bool((logits_MV >= lowest_of(logits_MV, None, None)).all())


def test_planted_bug_bits_that_fall_as_negative_values_rise(monkeypatch):
    monkeypatch.setattr(
        threshold, "_ordered", lambda value: jax.lax.bitcast_convert_type(value, jnp.uint32)
    )
    jax.clear_caches()
    with pytest.raises(AssertionError):
        check("normal")

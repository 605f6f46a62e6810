"""The audit's false alarm rate equals the stated one, on numbers from numpy; bugs exceed it."""

import numpy as np
import pytest

from beagle_jax.evaluation.chance import (
    FALSE_ALARMS,
    Noise,
    allowed_distance,
    distance_from_uniform,
    noise_of,
)

RATE, TRIALS = 0.2, 2000
PLACES, V = 20, 50


def alarms(reach: float, rng: np.random.Generator) -> float:
    """Returns the share of audits with a false alarm.

    In a false alarm rounding alone lets a token win that is further below the best than `reach`.
    This is the worst case: at every position all other tokens are exactly that far below the best.
    """
    differences = rng.normal(0, 0.1, (TRIALS, PLACES, V))
    wins = differences[..., 1:].max(axis=-1) - reach > differences[..., 0]
    return wins.any(axis=1).mean()


def test_noise_explains_no_more_than_it_may():
    rng = np.random.default_rng(0)
    noise = noise_of(rng.normal(0, 0.1, (192, V)))
    assert noise.deviation == pytest.approx(0.1, rel=0.4) and 3.5 < noise.largest / 0.1 < 5
    # Three standard errors of so many trials; the bound is a sum over pairs that depend on each
    # other, so it is not reached.
    alarm_rate = alarms(Noise(0.5, 0.1).reach(PLACES * (V - 1), RATE), rng)
    assert RATE / 5 < alarm_rate < RATE + 3 * np.sqrt(RATE / TRIALS)
    # The noisiest place measured leaves some room.
    assert alarms(noise.reach(PLACES * (V - 1), RATE), rng) <= alarm_rate
    # Planted: a bound as if one pair were compared.
    assert alarms(Noise(0.5, 0.1).reach(1, RATE), rng) > 0.9


def test_noisy_places_count():
    """One position in ten is three times as noisy: the noisiest measured one decides."""
    rng = np.random.default_rng(1)
    width_T1 = np.where(np.arange(192) % 10, 0.1, 0.3)[:, None]
    noise = noise_of(rng.normal(0, 1, (192, V)) * width_T1)
    assert noise.deviation > 0.3 * 0.9
    # 1e-7 of a normal distribution lies beyond 5.2.
    assert noise.reach(1000) == pytest.approx(noise.deviation * np.sqrt(2) * 5.2, rel=0.01)


def test_what_moves_all_logits_alike_is_no_noise():
    differences_TV = np.random.default_rng(4).normal(0, 0.1, (192, V))
    shifted = noise_of(differences_TV + np.linspace(-1, 1, 192)[:, None])
    assert (
        shifted.deviation == pytest.approx(noise_of(differences_TV).deviation)
        and shifted.largest > 1
    )


def test_no_noise_explains_nothing():
    assert noise_of(np.zeros((3, 4))).reach(10) == 0


@pytest.mark.parametrize("count", [30, 300])
def test_uniform_numbers_are_refused_as_rarely_as_stated(count):
    rng, rate = np.random.default_rng(2), 0.05
    refused = [
        distance_from_uniform(rng.random(count)) > allowed_distance(count, rate)
        for _ in range(TRIALS)
    ]
    # The bound is for any count, and nearly reached by large ones.
    assert rate / 3 < np.mean(refused) < rate + 3 * np.sqrt(rate / TRIALS)


@pytest.mark.parametrize(
    "spoil", [lambda u: u**2, lambda u: 0.8 * u, lambda u: np.where(u < 0.5, u, 1.0)]
)
def test_other_numbers_are_refused(spoil):
    rng = np.random.default_rng(3)
    refused = [
        distance_from_uniform(spoil(rng.random(300))) > allowed_distance(300) for _ in range(100)
    ]
    assert (
        np.mean(refused) > 0.9
        and allowed_distance(300) == pytest.approx(2.225 / np.sqrt(300), rel=1e-3)
        and FALSE_ALARMS == 1e-4
    )


def test_the_distance_by_hand():
    assert distance_from_uniform(np.array([0.1, 0.9])) == pytest.approx(0.4)
    assert distance_from_uniform(np.array([0.5])) == pytest.approx(0.5) and distance_from_uniform(
        np.array([0.25, 0.75])
    ) == pytest.approx(0.25)

"""Spread over seeds and prompts, intervals and what they can show, against simulated runs."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import claims
import spread
from claims import HOLDS, compared, difference, verdict
from spread import Spread, influence, pooled, ratio, spread_of

SEEDS, PROMPTS = 5, 24
OF_SEED, OF_PROMPT, OF_REST = 0.04, 0.05, 0.05  # standard deviations of a tau


def trained(rng: np.random.Generator, gap: float, seeds: int = SEEDS) -> list[dict]:
    """Two runs whose tau differs by `gap`; their prompts are equally hard for both but in part."""
    hard_N, own_N = rng.normal(0, 0.3, PROMPTS), rng.normal(0, OF_PROMPT, PROMPTS)
    runs: list[dict] = [{}, {}]
    for seed in range(seeds):
        rounds_N = rng.integers(20, 40, PROMPTS)
        extra_N = gap + rng.normal(0, OF_SEED) + own_N + rng.normal(0, OF_REST, PROMPTS)
        for run, more_N in zip(runs, (extra_N, np.zeros(PROMPTS)), strict=True):
            run[seed] = [{"tokens": rounds_N * (1.5 + hard_N + more_N), "rounds": rounds_N}]
    return runs


def fractions(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    below_SN = rng.uniform(10, 20, (3, 7))
    return below_SN * rng.uniform(1, 2, (3, 7)), below_SN


def slopes_match(relative: bool) -> None:
    """The influence is the derivative of the difference by the weight of a seed and prompt."""
    rng = np.random.default_rng(3)
    more, less = fractions(rng), fractions(rng)

    def gap(weight_SN):
        own, other = (
            ratio((above * weight_SN, below * weight_SN)) for above, below in (more, less)
        )
        return own / other - 1 if relative else own - other

    slope_SN = np.zeros((3, 7))
    for place in np.ndindex(3, 7):
        step_SN = np.zeros((3, 7))
        step_SN[place] = 1e-5
        slope_SN[place] = (gap(1 + step_SN) - gap(1 - step_SN)) / 2e-5
    slopes_SN = spread.influence(more, less, relative=relative)
    np.testing.assert_allclose(slopes_SN / slopes_SN.size, slope_SN, rtol=1e-5, atol=1e-9)
    assert abs(slopes_SN.mean()) < 1e-12


@pytest.mark.parametrize("relative", [False, True])
def test_influence_is_a_derivative(relative):
    slopes_match(relative)


def test_planted_bug_the_other_side_is_left_out(monkeypatch):
    def without(more, less, *, relative):
        nothing = (np.zeros_like(less[0]), less[1])
        return influence(more, nothing, relative=False)

    monkeypatch.setattr(spread, "influence", without)
    with pytest.raises(AssertionError):
        slopes_match(False)


def covered(compare, runs: int = 300) -> float:
    """Share of simulated comparisons whose interval has the true difference."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(runs):
        more, less = trained(rng, 0.1)
        value = compare(more, [less], "tau")[0]
        inside += value.low < 0.1 < value.high
    return inside / runs


def test_an_interval_of_five_seeds_has_the_truth_nineteen_times_in_twenty():
    assert 0.93 <= covered(compared) <= 0.98


def test_planted_bug_a_bootstrap_of_five_seeds_is_too_narrow(monkeypatch):
    monkeypatch.setattr(claims, "_RESAMPLES", 200)
    assert covered(difference) < 0.92  # why plans with few seeds say `interval: t`


def shown(gap: float, rule: dict, runs: int = 300) -> float:
    """Share of simulated comparisons in which a claim holds."""
    rng = np.random.default_rng(1)
    values = [compared(*pair, "tau")[0] for pair in draws(rng, gap, runs)]
    return float(np.mean([verdict(value, **rule) == HOLDS for value in values]))


def draws(rng, gap, runs):
    for _ in range(runs):
        more, less = trained(rng, gap)
        yield more, [less]


def true_spread() -> Spread:
    return Spread(OF_SEED**2 + OF_REST**2 / PROMPTS, OF_PROMPT**2 / PROMPTS, PROMPTS)


def test_what_can_be_seen_is_seen_four_times_in_five():
    visible = true_spread().visible(SEEDS, alike=False)
    assert 0.74 <= shown(visible, {}) <= 0.87
    assert 0.74 <= shown(visible + 0.2, {"at_least": 0.2}) <= 0.87
    alike = true_spread().visible(SEEDS, alike=True)
    assert 0.74 <= shown(0.0, {"alike": alike}) <= 0.9


def test_planted_bug_seeds_do_not_count():
    blind = true_spread()._replace(of_seed=0.0)
    assert shown(blind.visible(SEEDS, alike=False), {}) < 0.6


def test_a_spread_is_split_into_seeds_and_prompts():
    rng = np.random.default_rng(2)
    splits = []
    for _ in range(200):
        of_seed_S1, of_prompt_N = rng.normal(0, 0.3, (SEEDS, 1)), rng.normal(0, 0.2, PROMPTS)
        splits.append(spread_of(of_seed_S1 + of_prompt_N + rng.normal(0, 0.1, (SEEDS, PROMPTS))))
    of_seed, of_prompts, _ = np.mean(splits, axis=0)
    assert of_seed == pytest.approx(0.3**2 + 0.1**2 / PROMPTS, rel=0.1)
    assert of_prompts == pytest.approx(0.2**2 / PROMPTS, rel=0.1)
    assert spread_of(np.zeros((3, 4))).half(3) == 0
    assert np.isnan(spread_of(np.zeros((1, 1))).half(1))
    single = spread_of(rng.normal(0, 0.2, (1, 4000)))
    assert single.half(1) == pytest.approx(1.96 * 0.2 / 4000**0.5, rel=0.05)


def test_more_seeds_show_less_until_prompts_are_the_limit():
    made = Spread(of_seed=0.01, of_prompts=0.0001, prompts=50)
    needed = made.seeds_for(0.1, alike=False)
    assert made.visible(needed, alike=False) <= 0.1 < made.visible(needed - 1, alike=False)
    assert made.seeds_for(0.02, alike=False) is None  # the prompts alone hide it
    assert made.visible(5, alike=True) > made.visible(5, alike=False)


def test_a_pilot_that_agrees_by_chance_has_the_usual_spread():
    lucky, usual = Spread(1e-8, 0.1, 9), Spread(0.02, 0.2, 9)
    first, second = pooled([lucky, usual])
    assert first == Spread((1e-8 + 0.02) / 2, 0.1, 9) and second == usual


def test_of_several_others_the_best_counts():
    rng = np.random.default_rng(5)
    more, less = trained(rng, 0.4)
    best = {
        seed: [{**points[0], "tokens": points[0]["tokens"] * 1.2}] for seed, points in less.items()
    }
    alone, both = (compared(more, others, "tau") for others in ([best], [less, best]))
    assert alone[0] == both[0] and alone[1] == both[1]
    assert compared(more, [less], "tau")[0].low > both[0].low

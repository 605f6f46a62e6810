"""Measures and verdicts of the figures, on hand-made results."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from experiment_cases import point, prompts, runs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import pictures
import plan as plans
from claims import FAILS, HOLDS, OPEN, Value, judged, value_of, verdict

pytestmark = pytest.mark.usefixtures("at_the_root")


@pytest.mark.parametrize(
    ("low", "high", "rule", "expected"),
    [
        (0.01, 0.2, {}, HOLDS),
        (-0.01, 0.2, {}, OPEN),
        (-0.2, -0.01, {}, FAILS),
        (0.01, 0.2, {"at_least": 0.3}, FAILS),
        (-0.02, 0.2, {"at_least": -0.03}, HOLDS),
        (-0.04, 0.2, {"at_least": -0.03}, OPEN),
        (-0.02, 0.02, {"alike": 0.03}, HOLDS),
        (-0.02, 0.04, {"alike": 0.03}, OPEN),
        (0.04, 0.06, {"alike": 0.03}, FAILS),
        (-0.06, -0.04, {"alike": 0.03}, FAILS),
        (np.nan, np.nan, {}, OPEN),
    ],
)
def test_a_verdict_is_of_the_whole_interval(low, high, rule, expected):
    assert verdict(Value((low + high) / 2, low, high), **rule) == expected


def test_measures_by_hand():
    first = point(
        [[6, 3, 1], [2, 2, 6]],
        seconds=[2.0, 3.0],
        plain_seconds=[4.0, 4.0],
        bytes=700,
        training_tokens_per_second=[10.0, 20.0],
    )
    other = point([[8, 2, 0], [10, 0, 0]])
    points = {0: [other, first]}
    expected = {
        "tau": (6 + 6 + 3 + 2 + 4 + 18) / 20,
        "curve": (39 + 12 + 10) / 40,
        "alpha_1": 12 / 20,
        "alpha_2": 7 / 12,
        "speedup": 8 / 5,
        "memory": 700,
        "training_speed": 15,
    }
    for measure, value in expected.items():
        assert value_of(points, measure).value == pytest.approx(value), measure
    assert value_of(points, "memory") == (700, 700, 700)
    written = {0: [{"written": [30, 20], "seconds": [2.0, 3.0], "plain_seconds": [4.0, 4.0]}]}
    assert (
        value_of(written, "tokens_per_second").value == 10
        and value_of(written, "plain_tokens_per_second").value == 50 / 8
    )


def test_an_interval_is_as_wide_as_theory_says():
    """The interval of a mean over many equal prompts is 1.96 standard errors to either side."""
    rng = np.random.default_rng(0)
    tokens = (10 + rng.normal(0, 2, 400)).tolist()
    interval = value_of({0: [{"tokens": tokens, "rounds": [10] * 400}]}, "tau")
    assert interval.high - interval.low == pytest.approx(
        2 * 1.96 * np.std(tokens) / 10 / 20, rel=0.1
    )


@pytest.mark.parametrize("measure", ["tau", "curve", "alpha_1", "alpha_2"])
def test_a_planted_result_flips_the_verdict(measure):
    claim = plans.Claim(figure="fig", says="a beats b", measure=measure, more="a", less=("b",))
    assert judged(claim, runs(a=0.9, b=0.5))["verdict"] == HOLDS
    assert judged(claim, runs(a=0.5, b=0.9))["verdict"] == FAILS
    same = runs(a=0.5)
    assert judged(claim, {"a": same["a"], "b": same["a"]})["verdict"] == OPEN
    assert judged(replace(claim, alike=0.02), {"a": same["a"], "b": same["a"]})["verdict"] == HOLDS


def test_the_best_of_several_is_what_counts():
    claim = plans.Claim(figure="fig", says="a is best", more="a", less=("b", "c"))
    assert judged(claim, runs(a=0.9, b=0.5, c=0.7))["verdict"] == HOLDS
    assert judged(claim, runs(a=0.9, b=0.5, c=1.3))["verdict"] == FAILS


def test_both_sides_are_drawn_together():
    """Prompts may differ widely: the difference of two equal runs is still certain.

    It would not be if the two sides were resampled separately.
    """
    hard = [[40, 0, 0]] * 12 + [[0, 0, 40]] * 12
    better = [[39, 1, 0]] * 12 + [[0, 0, 40]] * 12
    claim = plans.Claim(figure="fig", says="a beats b", more="a", less=("b",))
    assert judged(claim, {"a": {0: [point(better)]}, "b": {0: [point(hard)]}})["verdict"] == HOLDS
    assert value_of({0: [point(hard)]}, "tau").high - value_of({0: [point(hard)]}, "tau").low > 0.5


def test_a_depth_that_no_draft_reaches_decides_nothing(tmp_path):
    claim = plans.Claim(figure="fig", says="a beats b", measure="alpha_3", more="a", less=("b",))
    assert judged(claim, runs(a=0.9, b=0.5))["here"] == "nothing that both have"  # drafts of two
    curve = [{"step": 1, "tau": [1.5, 1.4, 1.6], "step_alpha": [[0.5, 0.4, 0.6]] * 2}]
    pictures.draw_curve("t", {"a": {"curve": curve}, "b": {"curve": curve}}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_not_run_or_cannot_be_decided_says_so():
    claim = plans.Claim(figure="fig", says="a beats b", more="a", less=("b",))
    line = judged(claim, runs(a=0.9))
    assert (line["verdict"], line["here"]) == (OPEN, "not run: b")
    line = judged(replace(claim, unless="too short"), runs(a=0.9, b=0.5))
    assert line["verdict"] == OPEN and line["here"].endswith("too short")
    other = {seed + 2: points for seed, points in runs(b=0.5)["b"].items()}
    assert judged(claim, {**runs(a=0.9), "b": other})["verdict"] == OPEN  # no seed in common
    short = {
        name: {0: [point(prompts(0.5, 0), training_tokens_per_second=logged)]}
        for name, logged in (("a", [5.0]), ("b", []))
    }
    assert (
        judged(replace(claim, measure="training_speed"), short)["here"] == "nothing that both have"
    )


def test_times_of_a_shared_machine_decide_nothing():
    """Training on a shared machine has no times; other trainings are compared without it."""
    claim = plans.Claim(
        figure="fig", says="a is faster", measure="training_speed", more="a", less=("b",)
    )
    logged = {
        name: {
            seed: [point(prompts(0.5, 0), training_tokens_per_second=lines)]
            for seed, lines in enumerate(times)
        }
        for name, times in (("a", [[9.0, 9.5], []]), ("b", [[5.0, 5.5], [99.0, 99.0]]))
    }
    line = judged(claim, logged)
    assert (line["verdict"], line["sides"]) == (HOLDS, [9.25, 5.25])
    assert judged(claim, {**logged, "a": {1: logged["a"][1]}})["here"] == "nothing that both have"


def test_a_run_with_one_seed_stands_beside_each_of_another_s():
    claim = plans.Claim(figure="fig", says="a beats b", more="a", less=("b",))
    line = judged(claim, {**runs(a=0.9), "b": {7: runs(b=0.5)["b"][0]}})
    assert (line["verdict"], line["seeds"]) == (HOLDS, 2)

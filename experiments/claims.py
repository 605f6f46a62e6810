"""Tests the paper's claims on our runs: measures with intervals, and a verdict per claim.

A measure of a run is a ratio of two sums over seeds and prompts. Its interval is a bootstrap: seeds
and prompts are resampled with replacement. Both sides of a comparison use the same resamples, so
the difficulty of a prompt cancels. A plan with `interval: t` judges its claims by Student's t
instead (spread.py), which is right for few seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from plan import Claim
from spread import Spread, influence, ratio, spread_of

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decidable here"
SMALLER = "smaller than what could be seen"  # an open claim with figures, and how small
RELATIVE = (
    "speedup",
    "training_speed",
    "memory",
)  # compared by ratio; the other measures by difference
_RESAMPLES = 2000

Points = Sequence[Mapping[str, Any]]  # measurements of one run with one seed, by step (run.py)


class Value(NamedTuple):
    """A measure with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def rounded(self) -> list[float]:
        """Value, low and high, rounded for a JSON file."""
        return [round(float(number), 4) for number in self]


def value_of(run: Mapping[int, Points], measure: str) -> Value:
    """Returns one measure of a run over all its seeds."""
    return _interval(_drawn([_fractions(run, measure, sorted(run))])[0])


def having(run: Mapping[int, Points], measure: str) -> dict[int, Points]:
    """Selects the seeds of a run that have a measure.

    Training that was too short or shared its machine has no speed.
    """
    return {seed: points for seed, points in run.items() if len(_fraction(points, measure)[0])}


def difference(
    more: Mapping[int, Points], less: Sequence[Mapping[int, Points]], measure: str
) -> tuple[Value, list[float], int]:
    """Compares the first run with the best of the others, on the seeds that all have.

    Returns the difference, both sides, and the number of seeds. A run with one seed is paired with
    each seed of the others. A seed without the measure does not count.
    """
    fractions, seeds = _paired(more, less, measure)
    if not seeds:
        return Value(np.nan, np.nan, np.nan), [np.nan, np.nan], 0
    drawn = _drawn(fractions)
    best_R = np.max(drawn[1:], axis=0)
    change_R = drawn[0] / best_R - 1 if measure in RELATIVE else drawn[0] - best_R
    return _interval(change_R), [float(drawn[0][0]), float(best_R[0])], seeds


def compared(
    more: Mapping[int, Points], less: Sequence[Mapping[int, Points]], measure: str
) -> tuple[Value, list[float], int, Spread | None]:
    """Compares like `difference`, by Student's t; also returns the spread.

    Of several others, the best counts: the interval covers those of all differences that may be
    the smallest.
    """
    fractions, seeds = _paired(more, less, measure)
    if not seeds:
        return Value(np.nan, np.nan, np.nan), [np.nan, np.nan], 0, None
    if measure == "training_speed":  # of log records: no prompts that both sides have
        fractions = [
            (above.sum(1, keepdims=True), below.sum(1, keepdims=True)) for above, below in fractions
        ]
    first, *others = fractions
    relative, made = measure in RELATIVE, []
    for other in others:
        spread = spread_of(influence(first, other, relative=relative))
        sides = [ratio(first), ratio(other)]
        change = sides[0] / sides[1] - 1 if relative else sides[0] - sides[1]
        half = spread.half(seeds)
        made.append((Value(change, change - half, change + half), sides, spread))
    smallest = min(made, key=lambda entry: entry[0].value)
    low, high = (min(getattr(value, end) for value, _, _ in made) for end in ("low", "high"))
    return Value(smallest[0].value, low, high), smallest[1], seeds, smallest[2]


def _paired(
    more: Mapping[int, Points], less: Sequence[Mapping[int, Points]], measure: str
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Returns the fractions of the runs on the seeds that all have, and the number of these."""
    several = [set(having(run, measure)) for run in (more, *less) if len(run) > 1]
    seeds = sorted(set.intersection(*several)) if several else [0]
    if not seeds or not all(having(run, measure) for run in (more, *less)):
        return [], 0
    paired = [run if len(run) > 1 else dict.fromkeys(seeds, *run.values()) for run in (more, *less)]
    return [_fractions(run, measure, seeds) for run in paired], len(seeds)


def verdict(value: Value, at_least: float = 0.0, alike: float | None = None) -> str:
    """Decides a claim from the interval of a difference.

    The claim: the difference is more than `at_least`, or with `alike`, within plus or minus
    `alike`.
    """
    if not np.isfinite(value).all():
        return OPEN
    inside, outside = (value.low > at_least, value.high < at_least)
    if alike is not None:
        inside, outside = (
            -alike < value.low and value.high < alike,
            value.low > alike or value.high < -alike,
        )
    return HOLDS if inside else FAILS if outside else OPEN


def judged(
    claim: Claim,
    runs: Mapping[str, Mapping[int, Points]],
    interval: str = "bootstrap",
    registered: float = 0.0,
) -> dict[str, Any]:
    """Returns one line of the table of claims, as plain values.

    interval: `Plan.interval`. registered: what the seeds can show by the pilot (power.py). An open
    claim says how small its difference from the margin is (`seen`): smaller than that, or than what
    these runs can show where they spread more than the pilot's.
    """
    line = {
        "figure": claim.figure,
        "says": claim.says,
        "measure": claim.measure,
        "more": claim.more,
        "less": list(claim.less),
    }
    missing = [name for name in (claim.more, *claim.less) if not runs.get(name)]
    if missing:
        return line | {"verdict": OPEN, "here": f"not run: {', '.join(missing)}"}
    pair = runs[claim.more], [runs[name] for name in claim.less]
    if interval == "t":
        gap, sides, seeds, spread = compared(*pair, claim.measure)
    else:
        gap, sides, seeds = difference(*pair, claim.measure)
        spread = None
    if not seeds:
        return line | {"verdict": OPEN, "here": "nothing that both have"}
    if not np.isfinite(gap).all():
        return line | {"verdict": OPEN, "here": "one number a side, whose spread is unknown"}
    said = OPEN if claim.unless else verdict(gap, claim.at_least, claim.alike)
    line |= {"difference": gap.rounded, "sides": [round(side, 4) for side in sides], "seeds": seeds}
    if said == OPEN and not claim.unless:
        own = shown_by(gap) if spread is None else spread.visible(seeds, alike=bool(claim.alike))
        line["seen"] = round(max(own, registered), 4)
    return line | {
        "verdict": said,
        "here": "; ".join(filter(None, (_sentence(claim, gap, sides, seeds), claim.unless))),
    }


def shown_by(gap: Value) -> float:
    """Smallest distance from a margin that an interval of this length shows four times in five."""
    return (gap.high - gap.low) / 2 * (1.96 + 0.84) / 1.96


def _sentence(claim: Claim, gap: Value, sides: Sequence[float], seeds: int) -> str:
    scale, unit = (100, " %") if claim.measure in RELATIVE else (1, "")
    digits = 1 if claim.measure in RELATIVE else 3
    figures = [f"{scale * number:+.{digits}f}" for number in gap]
    # sides of the measure `memory` are bytes
    left, right = (
        f"{number / 2**20:.1f} MB" if claim.measure == "memory" else f"{number:.3f}"
        for number in sides
    )
    return (
        f"{claim.measure.replace('_', ' ')} {left} against {right}: {figures[0]}{unit} "
        f"[{figures[1]}, {figures[2]}], {seeds} seed{'s' * (seeds > 1)}"
    )


def _fractions(
    run: Mapping[int, Points], measure: str, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns numerators and denominators [seeds, prompts] of a measure."""
    pairs = [_fraction(run[seed], measure) for seed in seeds]
    shared = min(len(above) for above, _ in pairs)  # a resumed run has logged fewer speeds
    above, below = (
        np.array([list(pair[side])[:shared] for pair in pairs], float) for side in (0, 1)
    )
    return above, below


def _fraction(points: Points, measure: str) -> tuple[Sequence[float], Sequence[float]]:
    last = points[-1]
    if measure == "tau":
        return last["tokens"], last["rounds"]
    if measure == "curve":  # tau over all measurements during training
        return np.sum([point["tokens"] for point in points], axis=0), np.sum(
            [point["rounds"] for point in points], axis=0
        )
    if measure.startswith(
        "alpha_"
    ):  # share of the rounds that accepted this depth among those that reached it
        depth = int(measure.removeprefix("alpha_"))
        reached_NP = np.array(last["accepted"])[:, ::-1].cumsum(axis=1)[:, ::-1]
        if depth >= reached_NP.shape[1]:
            return [], []  # no draft is this deep
        return reached_NP[:, depth], reached_NP[:, depth - 1]
    if measure == "speedup":
        return last["plain_seconds"], last["seconds"]
    if measure in ("tokens_per_second", "plain_tokens_per_second"):
        return last["written"], last["plain_seconds" if measure.startswith("plain") else "seconds"]
    if measure == "memory":
        return [last["bytes"]], [1.0]
    assert measure == "training_speed", measure  # plan.py refuses any other measure
    return last["training_tokens_per_second"], np.ones(len(last["training_tokens_per_second"]))


def _drawn(fractions: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Returns each ratio on the data, then on resampled seeds and prompts: [1 + resamples]."""
    ratios = []
    for above_SN, below_SN in fractions:
        draw_RS, draw_RN = (_draws(axis, count) for axis, count in enumerate(above_SN.shape))
        above_R, below_R = (
            np.einsum("rs,sn,rn->r", draw_RS, x_SN, draw_RN) for x_SN in (above_SN, below_SN)
        )
        ratios.append(np.where(below_R > 0, above_R, 0.0) / np.where(below_R > 0, below_R, 1.0))
    return ratios


def _draws(axis: int, count: int) -> np.ndarray:
    """Returns how often each of `count` was drawn, [1 + resamples, count].

    The first row draws each once. Every call returns the same.
    """
    rng = np.random.default_rng([axis, count])
    return np.concatenate(
        [
            np.ones((1, count), int),
            rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES),
        ]
    )


def _interval(value_R: np.ndarray) -> Value:
    return Value(
        float(value_R[0]), *(float(edge) for edge in np.percentile(value_R[1:], [2.5, 97.5]))
    )

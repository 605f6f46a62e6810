"""What a comparison of two runs can show: its spread over seeds and prompts.

A measure is a ratio of two sums over seeds and prompts. To first order, the difference of two such
ratios is a mean of one number per seed and prompt (`influence`), and that mean varies with the
seeds that were trained, with the prompts that were asked, and with the rest. Few seeds say little
about their own spread: Student's t takes that into account, whereas a bootstrap over five seeds
can leave the true difference outside its 95 % interval every seventh time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

_LEVEL = 0.975  # of the upper end of a 95 % interval
_POWER = 0.8  # how often a difference must show
_MOST_SEEDS = 100

Fractions = tuple[np.ndarray, np.ndarray]  # numerators and denominators [seeds, prompts]


class Spread(NamedTuple):
    """Variances of a difference."""

    of_seed: float  # of one seed's difference, over all prompts
    of_prompts: float  # of the mean over the prompts, from which ones were asked
    prompts: int

    def error(self, seeds: int) -> float:
        """Standard error of the mean over so many seeds."""
        return float(np.sqrt(self.of_seed / seeds + self.of_prompts))

    def freedom(self, seeds: int) -> float:
        """Degrees of freedom of the standard error, by Welch and Satterthwaite; inf if it is 0."""
        parts = [(self.of_seed / seeds, seeds - 1), (self.of_prompts, self.prompts - 1)]
        below = sum(part**2 / count for part, count in parts if count > 0)
        return float(sum(part for part, _ in parts) ** 2 / below) if below else np.inf

    def half(self, seeds: int) -> float:
        """Half the length of the 95 % interval."""
        return self._quantile(seeds, _LEVEL) * self.error(seeds)

    def visible(self, seeds: int, *, alike: bool) -> float:
        """Smallest distance from its margin at which a difference is decided four times in five.

        alike: the margins lie on both sides of a difference of zero, and the distance is theirs.
        """
        power = (1 + _POWER) / 2 if alike else _POWER
        both = self._quantile(seeds, _LEVEL) + self._quantile(seeds, power)
        return both * self.error(seeds)

    def seeds_for(self, effect: float, *, alike: bool) -> int | None:
        """Fewest seeds that show the effect; None if no number does, with these prompts."""
        counts = range(2, _MOST_SEEDS + 1)
        return next((n for n in counts if self.visible(n, alike=alike) <= effect), None)

    def _quantile(self, seeds: int, share: float) -> float:
        return float(student.ppf(share, self.freedom(seeds)))


def ratio(fractions: Fractions) -> float:
    """Returns a measure over all seeds and prompts."""
    above_SN, below_SN = fractions
    return float(above_SN.sum() / below_SN.sum()) if below_SN.sum() else 0.0


def influence(more: Fractions, less: Fractions, *, relative: bool) -> np.ndarray:
    """Returns how each seed and prompt moves the difference [seeds, prompts]; their mean is zero.

    relative: of the ratio of both measures.
    """
    own_SN, other_SN = (
        (above_SN - ratio((above_SN, below_SN)) * below_SN) / max(below_SN.mean(), 1e-30)
        for above_SN, below_SN in (more, less)
    )
    if not relative:
        return own_SN - other_SN
    base = ratio(less)
    return own_SN / base - other_SN * ratio(more) / base**2


def spread_of(influence_SN: np.ndarray) -> Spread:
    """Splits the variance of a difference into that of seeds and that of prompts.

    With one seed, all variance is that of prompts; of a single number it is unknown (nan).
    """
    seeds, prompts = influence_SN.shape
    if seeds == prompts == 1:
        return Spread(np.nan, np.nan, 1)
    of_seed = float(influence_SN.mean(1).var(ddof=1)) if seeds > 1 else 0.0
    if prompts == 1:
        return Spread(of_seed, 0.0, 1)
    by_prompt_N = influence_SN.mean(0)
    of_prompts = float(by_prompt_N.var(ddof=1))
    if seeds > 1:  # without what the seeds leave in each prompt's mean
        by_seed_S1 = influence_SN.mean(1, keepdims=True)
        rest_SN = influence_SN - by_prompt_N - by_seed_S1 + influence_SN.mean()
        of_rest = float((rest_SN**2).sum() / ((seeds - 1) * (prompts - 1)))
        of_prompts = max(of_prompts - of_rest / seeds, 0.0)
    return Spread(of_seed, of_prompts / prompts, prompts)


def pooled(spreads: Sequence[Spread]) -> list[Spread]:
    """Returns the spreads with at least the mean variance over seeds of all of them.

    Two or three seeds of a pilot may agree by chance; those of all comparisons seldom do.
    """
    mean = float(np.mean([spread.of_seed for spread in spreads]))
    return [spread._replace(of_seed=max(spread.of_seed, mean)) for spread in spreads]

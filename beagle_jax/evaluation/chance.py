"""Tolerances of the audit: rounding noise, measured, and chance, from a stated rate.

Two correct ways of computing a logit round differently. The difference is measured between a text
that is read in one forward pass and its last tokens read one by one. At one position, the
differences over the vocabulary are close to normally distributed. Their standard deviation is taken
at the noisiest position. Their mean is ignored: it is most of the noise in bfloat16, but it shifts
all logits alike and changes no choice.

If the two ways order two logits differently, the logits are no further apart than the difference of
their two errors, which has sqrt(2) times the standard deviation of one error. Among n compared
pairs, the probability that one pair is further apart than z sqrt(2) deviations is at most n Q(z),
where Q is the upper tail of the normal distribution. The audit chooses z so that this probability
is the false-alarm rate.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from beagle_jax.decoding.tree import Tree
from beagle_jax.evaluation.forced import forced_logits, forced_reads, forced_states, one_by_one
from beagle_jax.evaluation.replay import Grower
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

FALSE_ALARMS = 1e-4  # probability that a check fails although decoding is correct
_PLACES = 64  # last tokens of a text that are read one by one
_ROOTS = 16  # number of these positions at which a draft's scores are compared
_COPIES = 8  # copies of each path in the second computation


class Noise(NamedTuple):
    """Difference between two correct computations of logits or log-probabilities."""

    largest: float
    deviation: float  # their standard deviation over the vocabulary, at the noisiest position

    def reach(self, pairs: int, rate: float = FALSE_ALARMS) -> float:
        """Largest gap of two values that noise can reorder, with false-alarm rate `rate`.

        At this rate one of `pairs` pairs has a larger gap.
        """
        return self.deviation * math.sqrt(2) * -NormalDist().inv_cdf(rate / max(pairs, 1))


def noise_of(differences_TV: np.ndarray) -> Noise:
    """Measures noise from differences at T positions over V tokens."""
    return Noise(
        float(np.abs(differences_TV).max()),
        float(differences_TV.astype(np.float64).std(axis=1).max()),
    )


def logit_noise(target: Target, texts: Sequence[Sequence[int]]) -> Noise:
    """Measures the noise of the target's logits at the last positions of these texts."""
    differences = []
    for tokens in texts:
        _, logits_TV = one_by_one(target, tokens, _PLACES)
        first = len(tokens) - len(logits_TV)
        differences.append(
            logits_TV - forced_logits(target, forced_states(target, tokens), first, len(tokens))
        )
    return noise_of(np.concatenate(differences))


def score_noise(
    target: Target, draft: Draft, tree: Tree, tokens: Sequence[int], append_predicted: bool
) -> Noise:
    """Measures the noise of a draft's log-probabilities along a text, at all levels.

    One computation uses the target's states of the text read in one pass. The other uses the states
    of its tokens read one by one, for several copies of each path together: rounding of a matrix
    product depends on its number of rows.
    """
    at_once_LD = forced_reads(target, tokens, draft.taps)
    alone_TD, _ = one_by_one(target, tokens, _PLACES, draft.taps)
    first = len(tokens) - len(alone_TD)
    either = (at_once_LD, at_once_LD.at[first : len(tokens)].set(alone_TD))
    differences = []
    for root in np.unique(np.linspace(first + 1, len(tokens) - 1, _ROOTS).astype(int)).tolist():
        growers = [
            Grower(target, draft, tokens, states_LD, root, append_predicted) for states_LD in either
        ]
        for depth in range(min(tree.grown.depth, len(tokens) - root)):
            path = tuple(tokens[root + 1 : root + 1 + depth])
            differences.append(growers[0].scores(path) - growers[1].scores(path, copies=_COPIES))
    return noise_of(np.array(differences))


def distance_from_uniform(places: np.ndarray) -> float:
    """Largest distance between the empirical and the uniform distribution on [0, 1].

    This is the Kolmogorov-Smirnov statistic.
    """
    sorted_X, count = np.sort(places), len(places)
    return float(
        max(
            np.max(np.arange(1, count + 1) / count - sorted_X),
            np.max(sorted_X - np.arange(count) / count),
        )
    )


def allowed_distance(count: int, rate: float = FALSE_ALARMS) -> float:
    """Returns the distance that exceeds chance: its false-alarm probability is at most `rate`.

    For `count` numbers that are in fact uniform. Source: the Dvoretzky-Kiefer-Wolfowitz inequality
    with Massart's constant.
    """
    return math.sqrt(math.log(2 / rate) / (2 * count))

"""How far rounding and chance alone may move what the audit compares: measured on the spot, and
derived from a stated rate.

Rounding: two right ways of computing a logit differ a little. How much is measured between a text
that is read at once and its last tokens read one by one. At one place the differences are spread
over the vocabulary like a normal distribution; its standard deviation is taken at the noisiest of
the places (its mean, most of the noise in bfloat16, moves all logits alike and decides nothing).
Two logits that two ways order differently lie no further apart than their differences do, which
takes sqrt(2) such deviations. So of n pairs that are compared one lies further apart than z sqrt(2)
deviations with probability n Q(z) at most, Q being the normal distribution's upper tail: the audit
takes the z at which that is the rate of false alarms.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from beagle_jax.decoding.tree import Tree
from beagle_jax.evaluation.forced import forced_logits, forced_states, one_by_one
from beagle_jax.evaluation.replay import Grower
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

FALSE_ALARMS = 1e-4  # how often a check may fail right decoding
_PLACES = 64  # at the end of a text, that are read one by one
_ROOTS = 16  # of them, below which a draft's scores are compared
_COPIES = 8  # of each path, the second way


class Noise(NamedTuple):
    """Differences of two right ways of computing the same logits, or a draft's
    log-probabilities.
    """

    largest: float
    deviation: float  # their standard deviation over the vocabulary, at the noisiest place

    def reach(self, pairs: int, rate: float = FALSE_ALARMS) -> float:
        """How far two values may lie apart that the two ways order differently; one of so many
        pairs lies further at this rate.
        """
        return self.deviation * math.sqrt(2) * -NormalDist().inv_cdf(rate / max(pairs, 1))


def noise_of(differences_TV: np.ndarray) -> Noise:
    """Of T places; V differences at each."""
    return Noise(
        float(np.abs(differences_TV).max()),
        float(differences_TV.astype(np.float64).std(axis=1).max()),
    )


def logit_noise(target: Target, texts: Sequence[Sequence[int]]) -> Noise:
    """Of the target's logits, at the last places of these texts."""
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
    """Of a draft's log-probabilities along a text, at all its levels.

    One way reads the states of the text read at once; the other those of its tokens read one by
    one, for several copies of the path together: how a product is rounded depends on how many rows
    it has.
    """
    at_once_LD = forced_states(target, tokens)
    alone_TD, _ = one_by_one(target, tokens, _PLACES)
    first = len(tokens) - len(alone_TD)
    either = (at_once_LD, at_once_LD.at[first : len(tokens)].set(alone_TD))
    differences = []
    for root in np.unique(np.linspace(first + 1, len(tokens) - 1, _ROOTS).astype(int)).tolist():
        growers = [
            Grower(target, draft, tokens, states_LD, root, append_predicted) for states_LD in either
        ]
        for depth in range(min(tree.depth, len(tokens) - root)):
            path = tuple(tokens[root + 1 : root + 1 + depth])
            differences.append(growers[0].scores(path) - growers[1].scores(path, copies=_COPIES))
    return noise_of(np.array(differences))


def distance_from_uniform(places: np.ndarray) -> float:
    """Largest difference between the distribution of numbers in 0..1 and the uniform one
    (Kolmogorov and Smirnov).
    """
    sorted_N, count = np.sort(places), len(places)
    return float(
        max(
            np.max(np.arange(1, count + 1) / count - sorted_N),
            np.max(sorted_N - np.arange(count) / count),
        )
    )


def allowed_distance(count: int, rate: float = FALSE_ALARMS) -> float:
    """What that distance exceeds at this rate at most when so many numbers are uniform (Dvoretzky,
    Kiefer, Wolfowitz; Massart).
    """
    return math.sqrt(math.log(2 / rate) / (2 * count))

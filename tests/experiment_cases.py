"""Hand-made measurements of runs; importing this puts experiments/ on the path."""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PAPER = "experiments/paper.yaml"
sys.path.insert(0, str(ROOT / "experiments"))


def point(accepted: list[list[int]], step: int = 1, **more) -> dict:
    """Makes a measurement in which no round was cut short.

    accepted: for each prompt, how many rounds accepted 0, 1, .. drafts.
    """
    tokens = [sum(count * (drafts + 1) for drafts, count in enumerate(row)) for row in accepted]
    return {
        "step": step,
        "tokens": tokens,
        "rounds": [sum(row) for row in accepted],
        "accepted": accepted,
        **more,
    }


def prompts(mean: float, seed: int, count: int = 24) -> list[list[int]]:
    """Draws histograms over 0 to 2 accepted drafts, whose tau is about 1 + mean."""
    rng = np.random.default_rng(seed)
    share = rng.normal(mean / 2, 0.03, count).clip(0.01, 0.99)
    return [
        np.bincount(rng.binomial(2, probability, 40), minlength=3).tolist() for probability in share
    ]


def runs(**means: float) -> dict:
    """Makes runs of two seeds; the values are tau - 1."""
    return {
        name: {seed: [point(prompts(mean, seed))] for seed in (0, 1)}
        for name, mean in means.items()
    }

"""Where two answers of a half-precision target part, and how close the two tokens were."""

import jax.numpy as jnp
import numpy as np

from beagle_jax.model.cache import visible_slots, write_all
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward, init_cache, logits


def _all_logits(target, tokens: list[int]) -> np.ndarray:
    text_BL, L = jnp.array([tokens]), len(tokens)
    states = forward(target.params, target.spec, text_BL, jnp.arange(L)[None], causal_mask(jnp.array([L]), L))[0]
    return np.asarray(logits(target.params, target.spec, states)[0])


def rounding_noise(target, tokens: list[int]) -> float:
    """Largest logit difference between reading a text at once and reading it token by token."""
    at_once, cache = _all_logits(target, tokens), init_cache(target.spec, 1, len(tokens), target.dtype)
    largest = 0.0
    for place, token in enumerate(tokens):
        length = jnp.array([place])
        states, rows = forward(
            target.params, target.spec, jnp.array([[token]]), length[None], jnp.ones((1, 1, 1), bool), cache, visible_slots(length, cache)
        )
        cache = write_all(cache, rows, length)
        largest = max(largest, float(np.abs(np.asarray(logits(target.params, target.spec, states)[0, 0]) - at_once[place]).max()))
    return largest


def first_flips(target, prompts, plain, fast) -> list[float]:
    """For each pair of answers that part: the gap between the logits of the two tokens where they first do."""
    gaps = []
    for prompt, mine, theirs in zip(prompts, plain, fast):
        parted = next((n for n, (a, b) in enumerate(zip(mine, theirs)) if a != b), None)
        if parted is not None:
            logits_V = _all_logits(target, prompt + mine[:parted])[-1]
            gaps.append(abs(float(logits_V[mine[parted]] - logits_V[theirs[parted]])))
    return gaps

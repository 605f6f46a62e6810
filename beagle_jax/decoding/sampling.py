"""How the target's next token is chosen: the most likely one, or a seeded draw from its filtered
distribution.

A draw is tied to the token's place in the answer, not to the round that happens to reach it: place
n of an answer always uses the noise of (seed, n). The target's choice at a place is then a function
of the text before it alone, so speculative sampling writes the very tokens that plain sampling
writes with the same seed, whatever the tree (sample-and-match, method.md 6.6: EAGLE-2's rule with
the drafts as point masses). Draws at different places are independent, and drafts never see the
noise, so the output has the target's distribution.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.config import COLDEST, DecodeConfig
from beagle_jax.errors import UserError

_REMOVED = -jnp.inf  # logit of a token that a filter took out


class Sampling(NamedTuple):
    """How the next token is chosen. Hashable: a static argument of jit. Filters apply in this
    order.
    """

    temperature: float = 0.0  # 0 takes the most likely token
    top_k: int = 0  # only this many most likely tokens are kept; 0: all
    top_p: float = 1.0  # of these, the fewest whose probabilities reach this sum

    @property
    def greedy(self) -> bool:
        """True when nothing is drawn."""
        return self.temperature == 0

    def check(self) -> "Sampling":
        """Itself. Raises UserError for values that mean nothing."""
        if self.temperature != 0 and not COLDEST <= self.temperature < float("inf"):
            raise UserError(
                f"temperature is {self.temperature}; expected 0 (greedy) or a number of at "
                f"least {COLDEST}"
            )
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected 0 (all tokens) or how many to keep")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a share above 0 and at most 1")
        return self


GREEDY = Sampling()


def sampling_of(config: DecodeConfig) -> Sampling:
    """The sampling that a config asks for."""
    return Sampling(config.temperature, config.top_k, config.top_p).check()


def filtered(logits_MV: jax.Array, sampling: Sampling) -> jax.Array:
    """Tempered logits [M, V] in float32 with removed tokens at minus infinity; softmax gives the
    distribution.

    Tokens tied with the last one kept stay: a filter depends on values, never on token order.
    """
    logits_MV = logits_MV.astype(jnp.float32) / sampling.temperature
    if 0 < sampling.top_k < logits_MV.shape[-1]:
        last_M1 = jax.lax.top_k(logits_MV, sampling.top_k)[0][:, -1:]
        logits_MV = jnp.where(logits_MV >= last_M1, logits_MV, _REMOVED)
    if sampling.top_p < 1:
        # Only the values are sorted; after top-k there are no more than that many to look at (ties
        # aside).
        count = sampling.top_k if 0 < sampling.top_k < logits_MV.shape[-1] else logits_MV.shape[-1]
        sorted_MC = jax.lax.top_k(logits_MV, count)[0]
        p_MC = jax.nn.softmax(sorted_MC, axis=-1)
        before_MC = jnp.cumsum(p_MC, axis=-1) - p_MC
        kept_M1 = jnp.sum(before_MC < sampling.top_p, axis=-1, keepdims=True)  # at least one
        last_M1 = jnp.take_along_axis(sorted_MC, kept_M1 - 1, axis=-1)
        logits_MV = jnp.where(logits_MV >= last_M1, logits_MV, _REMOVED)
    return logits_MV


def place_keys(key_B: jax.Array, place_BT: jax.Array) -> jax.Array:
    """The random key [B, T] of each place of an answer, from the sequence's key [B]."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(key_B, place_BT)


def gumbel(key_BT: jax.Array, count: int) -> jax.Array:
    """Gumbel noise [B, T, count]: the largest of logits plus noise is a draw from their softmax."""
    return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32)))(key_BT)


def choose(logits_MV: jax.Array, noise_MV: jax.Array, sampling: Sampling) -> jax.Array:
    """A draw per row, int32 [M], from the filtered distribution."""
    return jnp.argmax(filtered(logits_MV, sampling) + noise_MV, axis=-1).astype(jnp.int32)


def choose_from_top(logits_BV: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Next token per row: the most likely, or a draw; noise is made for the kept tokens only when
    top_k is set.
    """
    if sampling.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if not sampling.top_k:
        return jax.random.categorical(key, filtered(logits_BV, sampling), axis=-1).astype(jnp.int32)
    top, token = jax.lax.top_k(logits_BV, sampling.top_k)
    pick = jax.random.categorical(key, filtered(top, sampling._replace(top_k=0)), axis=-1)
    return jnp.take_along_axis(token, pick[:, None], axis=-1)[:, 0].astype(jnp.int32)


def is_stop(token: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Elementwise: does this token end an answer?"""
    return (
        token[..., None] == jnp.expand_dims(jnp.asarray(eos_ids, jnp.int32), range(token.ndim))
    ).any(axis=-1)

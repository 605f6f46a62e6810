"""How the target's next token is chosen: the most likely one, or a seeded draw from its filtered
distribution.

A draw is tied to the token's place in the answer, not to the round that happens to reach it: place
n of an answer always uses the noise of (seed, n). The target's choice at a place is then a function
of the text before it alone, so speculative sampling writes the very tokens that plain sampling
writes with the same seed, whatever the tree (sample-and-match, method.md 6.6: EAGLE-2's rule with
the drafts as point masses). Draws at different places are independent, and drafts never see the
noise, so the output has the target's distribution.

Settings are arrays, one value for each sequence: another temperature or seed compiles nothing. Only
what changes the program itself is static (`Filters`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from beagle_jax.arrays import AnyArray
from beagle_jax.config import COLDEST, DecodeConfig
from beagle_jax.errors import UserError

_REMOVED = -jnp.inf  # logit of a token that a filter took out
# Up to this top-k only so many of the largest logits are looked at (more than top-k: others may tie
# with the last one kept); above it all are sorted.
_FEW, _LOOKED_AT = 64, 96


class Sampling(NamedTuple):
    """How the next tokens of one answer are chosen. Filters apply in this order."""

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
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise UserError(f"top_k is {self.top_k}; expected 0 (all tokens) or how many to keep")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a share above 0 and at most 1")
        return self


GREEDY = Sampling()


class Filters(NamedTuple):
    """What of sampling is in a program. Hashable: static in jit."""

    drawn: bool = False  # False: every answer takes the most likely tokens
    top_k: bool = False
    top_p: bool = False


class Knobs(NamedTuple):
    """The settings of each sequence, as arrays [B]."""

    temperature_B: AnyArray
    top_k_B: AnyArray
    top_p_B: AnyArray


def filters_of(samplings: Sequence[Sampling]) -> Filters:
    """What a program needs for answers with these settings."""
    drawn = [sampling for sampling in samplings if not sampling.greedy]
    return Filters(
        bool(drawn),
        any(sampling.top_k > 0 for sampling in drawn),
        any(sampling.top_p < 1 for sampling in drawn),
    )


def knobs_of(samplings: Sequence[Sampling]) -> Knobs:
    """These settings as arrays of the host."""
    temperature, top_k, top_p = zip(*samplings, strict=True)
    return Knobs(
        np.array(temperature, np.float32),
        np.array([min(count, 2**31 - 1) for count in top_k], np.int32),
        np.array(top_p, np.float32),
    )


def sampling_of(config: DecodeConfig) -> Sampling:
    """The sampling that a config asks for."""
    return Sampling(config.temperature, config.top_k, config.top_p).check()


def filtered(logits_MV: jax.Array, sampling: Sampling) -> jax.Array:
    """`filter_logits` with the same settings for every row."""
    knobs = Knobs(*(jnp.asarray(x) for x in knobs_of([sampling])))
    return filter_logits(logits_MV[None], knobs, filters_of([sampling]))[0]


def filter_logits(logits_BTV: jax.Array, knobs: Knobs, filters: Filters) -> jax.Array:
    """Tempered logits in float32 with removed tokens at minus infinity; softmax gives the
    distribution.

    Tokens tied with the last one kept stay: a filter depends on values, never on token order. Rows
    whose temperature is 0 are filtered as at 1.
    """
    temperature_B = jnp.where(knobs.temperature_B > 0, knobs.temperature_B, 1.0)
    logits_BTV = logits_BTV.astype(jnp.float32) / temperature_B[:, None, None]
    V = logits_BTV.shape[-1]
    if not (filters.top_k or filters.top_p):
        return logits_BTV
    if filters.top_k and V > _LOOKED_AT:
        lowest_BT1 = jax.lax.cond(
            _few(knobs),
            lambda: _lowest_kept(logits_BTV, knobs, filters, _LOOKED_AT),
            lambda: _lowest_kept(logits_BTV, knobs, filters, V),
        )
    else:
        lowest_BT1 = _lowest_kept(logits_BTV, knobs, filters, V)
    return jnp.where(logits_BTV >= lowest_BT1, logits_BTV, _REMOVED)


def _lowest_kept(logits_BTV: jax.Array, knobs: Knobs, filters: Filters, count: int) -> jax.Array:
    """The lowest logit [B, T, 1] that the filters keep, looked for among the `count` largest."""
    B, T, V = logits_BTV.shape
    # Only the values are sorted; as rows, for which backends have kernels.
    sorted_BTk = jax.lax.top_k(logits_BTV.reshape(B * T, V), count)[0].reshape(B, T, count)
    keep_B = jnp.where(knobs.top_k_B > 0, jnp.minimum(knobs.top_k_B, count), count)
    kept_BTk = jnp.broadcast_to(
        jnp.arange(count)[None, None] < keep_B[:, None, None], sorted_BTk.shape
    )
    if filters.top_p:
        p_BTk = jax.nn.softmax(jnp.where(kept_BTk, sorted_BTk, _REMOVED), axis=-1)
        before_BTk = jnp.cumsum(p_BTk, axis=-1) - p_BTk
        top_p_B11 = knobs.top_p_B[:, None, None]
        kept_BTk &= (before_BTk < top_p_B11) | (top_p_B11 >= 1)
    last_BT1 = jnp.maximum(kept_BTk.sum(axis=-1, keepdims=True) - 1, 0)  # at least one is kept
    return jnp.take_along_axis(sorted_BTk, last_BT1, axis=-1)


def place_keys(key_B: jax.Array, place_BT: jax.Array) -> jax.Array:
    """The random key [B, T] of each place of an answer, from the sequence's key [B]."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(key_B, place_BT)


def gumbel(key_BT: jax.Array, count: int) -> jax.Array:
    """Gumbel noise [B, T, count]: the largest of logits plus noise is a draw from their softmax."""
    return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32)))(key_BT)


def gumbel_of(key_BT: jax.Array, token_BTk: jax.Array) -> jax.Array:
    """`gumbel` of some tokens alone: with JAX's threefry the noise of a token depends on the key
    and on its number, not on how many there are.
    """
    key_BT2 = jax.random.key_data(key_BT)
    token = token_BTk.astype(jnp.uint32)
    halves = (jnp.broadcast_to(key_BT2[..., n : n + 1], token.shape) for n in (0, 1))
    first, second = threefry2x32_p.bind(*halves, jnp.zeros_like(token), token)
    # Random bits to a number in [tiny, 1), as jax.random.uniform makes it.
    bits = ((first ^ second) >> 9) | np.float32(1).view(np.uint32)
    tiny = jnp.finfo(jnp.float32).tiny
    uniform = jax.lax.bitcast_convert_type(bits, jnp.float32) - 1.0
    uniform = jnp.maximum(tiny, uniform * (1.0 - tiny) + tiny)
    return -jnp.log(-jnp.log(uniform))


def _counts_tokens(key_BT: jax.Array) -> bool:
    """Whether the random numbers of this process are those that `gumbel_of` knows."""
    threefry = str(jax.random.key_impl(key_BT)) == "threefry2x32"
    # jax adds its settings when it is imported, where no type checker sees them.
    return threefry and bool(jax.config.jax_threefry_partitionable)  # type: ignore[attr-defined]


def choose(logits_BTV: jax.Array, key_BT: jax.Array, knobs: Knobs, filters: Filters) -> jax.Array:
    """A draw int32 [B, T] from each filtered distribution; the most likely token in greedy rows."""
    V = logits_BTV.shape[-1]
    if not filters.top_k or V <= _LOOKED_AT or not _counts_tokens(key_BT):
        return _choose_of_all(logits_BTV, key_BT, knobs, filters)
    return jax.lax.cond(
        _few(knobs),
        lambda: _choose_of_few(logits_BTV, key_BT, knobs, filters),
        lambda: _choose_of_all(logits_BTV, key_BT, knobs, filters),
    )


def _choose_of_all(
    logits_BTV: jax.Array, key_BT: jax.Array, knobs: Knobs, filters: Filters
) -> jax.Array:
    noise_BTV = _only_drawn(gumbel(key_BT, logits_BTV.shape[-1]), knobs)
    chosen_BT = jnp.argmax(filter_logits(logits_BTV, knobs, filters) + noise_BTV, axis=-1)
    return chosen_BT.astype(jnp.int32)


def _choose_of_few(
    logits_BTV: jax.Array, key_BT: jax.Array, knobs: Knobs, filters: Filters
) -> jax.Array:
    """The same draw: noise is made for the largest logits only, no others can be kept."""
    B, T, V = logits_BTV.shape
    top_Mk, token_Mk = jax.lax.top_k(logits_BTV.reshape(B * T, V), _LOOKED_AT)
    top_BTk, token_BTk = top_Mk.reshape(B, T, -1), token_Mk.reshape(B, T, -1)
    kept_BTk = filter_logits(top_BTk, knobs, filters)
    noisy_BTk = kept_BTk + _only_drawn(gumbel_of(key_BT, token_BTk), knobs)
    place_BT1 = jnp.argmax(noisy_BTk, axis=-1)[..., None]
    return jnp.take_along_axis(token_BTk, place_BT1, axis=-1)[..., 0].astype(jnp.int32)


def _only_drawn(noise: jax.Array, knobs: Knobs) -> jax.Array:
    return jnp.where((knobs.temperature_B > 0)[:, None, None], noise, 0.0)


def _few(knobs: Knobs) -> jax.Array:
    """Whether every row keeps few tokens; of greedy rows it does not matter."""
    few_B = (knobs.top_k_B > 0) & (knobs.top_k_B <= _FEW)
    return jnp.all(few_B | (knobs.temperature_B == 0))


def is_stop(token: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Elementwise: does this token end an answer?"""
    return (
        token[..., None] == jnp.expand_dims(jnp.asarray(eos_ids, jnp.int32), range(token.ndim))
    ).any(axis=-1)

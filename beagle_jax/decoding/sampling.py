"""Choice of the target's next token: the most likely token, or a seeded draw.

The noise of a draw depends on the token's position in the answer, not on the round that reaches it:
position n of an answer always uses the noise of (seed, n). The target's choice at a position is
then a function of the text before it. With the same seed, speculative sampling therefore writes the
same tokens as plain sampling, for every tree (sample-and-match, method.md 6.6: EAGLE-2's rule with
the drafts as point masses). Draws at different positions are independent, and drafts never see the
noise, so the output has the target's distribution.

Settings are arrays with one value per sequence: a new temperature or seed compiles nothing. Only
settings that change the program are static (`Filters`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from beagle_jax.arrays import AnyArray
from beagle_jax.config import COLDEST, DecodeConfig
from beagle_jax.decoding.arguments import real_number, whole_number
from beagle_jax.decoding.threshold import lowest_of
from beagle_jax.decoding.top_k import top_k
from beagle_jax.errors import UserError

_REMOVED = -jnp.inf  # logit of a token that a filter took out
# If every top-k is at most _FEW, only the _LOOKED_AT largest logits are read (more than top-k,
# because several may be equal to the last one kept). Otherwise all logits are searched.
_FEW, _LOOKED_AT = 64, 96


class Sampling(NamedTuple):
    """How the next tokens of one answer are chosen.

    The target's logits get the bias and the penalties, in greedy answers too; then they are divided
    by the temperature, and the filters apply in the order of their fields.
    """

    temperature: float = 0.0  # 0 takes the most likely token
    top_k: int = 0  # only this many most likely tokens are kept; 0: all
    top_p: float = 1.0  # of these, the fewest whose probabilities reach this sum
    min_p: float = 0.0  # of these, the ones with this share of the largest probability; 0: all
    # Divides the positive logits of tokens of prompt and answer and multiplies their negative ones.
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # subtracted from the logits of the answer's tokens
    frequency_penalty: float = 0.0  # subtracted from them once for each time that they came
    logit_bias: Mapping[int, float] | None = None  # token to what is added to its logit

    @property
    def greedy(self) -> bool:
        """True when nothing is drawn."""
        return self.temperature == 0

    def check(self) -> "Sampling":
        """Returns these settings as Python's numbers.

        Raises:
            UserError: a value means nothing.
        """
        expected = f"0 (greedy) or a number of at least {COLDEST}"
        temperature = real_number("temperature", self.temperature, expected)
        if temperature != 0 and not COLDEST <= temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; expected {expected}")
        try:
            top_k = whole_number("top_k", self.top_k, 0)
        except UserError:
            raise UserError(
                f"top_k is {self.top_k!r}; expected 0 (all tokens) or a whole number"
            ) from None
        expected = "a share above 0 and at most 1"
        top_p = real_number("top_p", self.top_p, expected)
        if not 0 < top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected {expected}")
        expected = "a share from 0 (all tokens) to 1"
        min_p = real_number("min_p", self.min_p, expected)
        if not 0 <= min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; expected {expected}")
        return Sampling(temperature, top_k, top_p, min_p, *self._penalties(), self._bias())

    def _penalties(self) -> tuple[float, float, float]:
        expected = "a number above 0, where 1 changes nothing"
        repetition = real_number("repetition_penalty", self.repetition_penalty, expected)
        if not 0 < repetition < float("inf"):
            raise UserError(f"repetition_penalty is {repetition}; expected {expected}")
        return repetition, self._penalty("presence_penalty"), self._penalty("frequency_penalty")

    def _penalty(self, name: str) -> float:
        penalty = real_number(name, getattr(self, name), "a number, 0 for none")
        if not math.isfinite(penalty):
            raise UserError(f"{name} is {penalty}; expected a number, 0 for none")
        return penalty

    def _bias(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise UserError(f"logit_bias is {self.logit_bias!r:.80}; expected token ids to numbers")
        bias = {}
        for token, value in self.logit_bias.items():
            number = real_number("a value of logit_bias", value, "a number")
            if not math.isfinite(number):
                raise UserError(f"logit_bias adds {number} to token {token}; expected a number")
            bias[whole_number("a token of logit_bias", token, 0)] = number
        return bias

    @property
    def penalises(self) -> bool:
        """True when the next logits depend on which tokens came before."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


GREEDY = Sampling()


class Filters(NamedTuple):
    """The sampling steps that a compiled program contains. Hashable: static in jit."""

    drawn: bool = False  # False: every answer takes the most likely tokens
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    penalties: bool = False
    bias: bool = False
    ends: int = 0  # end tokens that a sequence may have of its own; 0: the target's end all
    logprobs: int | None = None  # how many of the largest are reported; None: no probability is
    drafted: int = 0  # nodes of the tree that is reported with each round; 0: it is not
    undrafted: bool = False  # sequences may go without drafts (`Request.draft`)

    @property
    def edits(self) -> bool:
        """True when logits are changed before the filters."""
        return self.penalties or self.bias or self.ends > 0


NO_FILTERS = Filters()


class Knobs(NamedTuple):
    """Sampling settings of each sequence, as arrays [B]."""

    temperature_B: AnyArray
    top_k_B: AnyArray
    top_p_B: AnyArray
    min_p_B: AnyArray
    repetition_B: AnyArray
    presence_B: AnyArray
    frequency_B: AnyArray
    bias_BV: AnyArray | None = None  # with `Filters.bias`


def filters_of(samplings: Sequence[Sampling]) -> Filters:
    """Returns the filters that a program needs for these settings."""
    drawn = [sampling for sampling in samplings if not sampling.greedy]
    return Filters(
        bool(drawn),
        any(sampling.top_k > 0 for sampling in drawn),
        any(sampling.top_p < 1 for sampling in drawn),
        any(sampling.min_p > 0 for sampling in drawn),
        any(sampling.penalises for sampling in samplings),
        any(sampling.logit_bias for sampling in samplings),
    )


def knobs_of(samplings: Sequence[Sampling], vocab_size: int | None = None) -> Knobs:
    """Converts the settings to NumPy arrays. vocab_size: with `Filters.bias`, else None."""

    def column(name: str) -> np.ndarray:
        return np.array([getattr(sampling, name) for sampling in samplings], np.float32)

    bias_BV = None
    if vocab_size is not None:
        bias_BV = np.zeros((len(samplings), vocab_size), np.float32)
        for row, sampling in enumerate(samplings):
            for token, bias in (sampling.logit_bias or {}).items():
                bias_BV[row, token] = bias
    return Knobs(
        column("temperature"),
        np.array([min(sampling.top_k, 2**31 - 1) for sampling in samplings], np.int32),
        column("top_p"),
        column("min_p"),
        column("repetition_penalty"),
        column("presence_penalty"),
        column("frequency_penalty"),
        bias_BV,
    )


def sampling_of(config: DecodeConfig) -> Sampling:
    """Returns the sampling settings of a config."""
    return Sampling(
        config.temperature,
        config.top_k,
        config.top_p,
        config.min_p,
        config.repetition_penalty,
        config.presence_penalty,
        config.frequency_penalty,
    ).check()


def filtered(logits_MV: jax.Array, sampling: Sampling) -> jax.Array:
    """Applies `filter_logits` with the same settings for every row."""
    knobs = jax.tree.map(jnp.asarray, knobs_of([sampling]))
    return filter_logits(logits_MV[None], knobs, filters_of([sampling]))[0]


def filter_logits(logits_BTV: jax.Array, knobs: Knobs, filters: Filters) -> jax.Array:
    """Divides logits by the temperature, and sets removed tokens to minus infinity.

    Returns float32 logits, whose softmax is the distribution to draw from. Tokens equal to the last
    one kept are kept too: a filter depends on values, never on the order of tokens. Rows with
    temperature 0 are filtered as with temperature 1.
    """
    temperature_B = jnp.where(knobs.temperature_B > 0, knobs.temperature_B, 1.0)
    logits_BTV = logits_BTV.astype(jnp.float32) / temperature_B[:, None, None]
    if not (filters.top_k or filters.top_p or filters.min_p):
        return logits_BTV
    lowest_BT1 = jnp.full((*logits_BTV.shape[:2], 1), _REMOVED)
    if filters.min_p:
        log_share_B = jnp.log(knobs.min_p_B)
        lowest_BT1 = logits_BTV.max(axis=-1, keepdims=True) + log_share_B[:, None, None]
    if filters.top_k or filters.top_p:
        lowest_BT1 = jnp.maximum(lowest_BT1, _lowest_of_most(logits_BTV, knobs, filters))
    return jnp.where(logits_BTV >= lowest_BT1, logits_BTV, _REMOVED)


def _lowest_of_most(logits_BTV: jax.Array, knobs: Knobs, filters: Filters) -> jax.Array:
    """The lowest logit [B, T, 1] that top-k and top-p keep."""
    if not filters.top_k or logits_BTV.shape[-1] <= _LOOKED_AT:
        return _lowest_of_all(logits_BTV, knobs, filters)
    # The server has one program for all filters, and most requests set none of them.
    unused = jnp.all((knobs.top_k_B <= 0) & (knobs.top_p_B >= 1))
    return jax.lax.switch(
        jnp.where(unused, 0, jnp.where(_few(knobs), 1, 2)),
        (
            lambda: jnp.full((*logits_BTV.shape[:2], 1), _REMOVED),
            lambda: _lowest_of_all(_largest(logits_BTV)[0], knobs, filters),
            lambda: _lowest_of_all(logits_BTV, knobs, filters),
        ),
    )


def _lowest_of_all(logits_BTV: jax.Array, knobs: Knobs, filters: Filters) -> jax.Array:
    B, T, V = logits_BTV.shape
    top_k_M = jnp.repeat(knobs.top_k_B, T) if filters.top_k else None
    top_p_M = jnp.repeat(knobs.top_p_B, T) if filters.top_p else None
    lowest_M1 = lowest_of(logits_BTV.reshape(B * T, V), top_k_M, top_p_M)
    return lowest_M1.reshape(B, T, 1)


def _largest(logits_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `_LOOKED_AT` largest logits [B, T, k] and their tokens."""
    B, T, V = logits_BTV.shape
    # In two dimensions, for which backends have kernels.
    top_Mk, token_Mk = top_k(logits_BTV.reshape(B * T, V), _LOOKED_AT)
    return top_Mk.reshape(B, T, -1), token_Mk.reshape(B, T, -1)


def place_keys(key_B: jax.Array, place_BT: jax.Array) -> jax.Array:
    """Returns the random key [B, T] of each position, from the key [B] of each sequence."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(key_B, place_BT)


def gumbel(key_BT: jax.Array, count: int) -> jax.Array:
    """Returns Gumbel noise [B, T, count]; argmax(logits + noise) is a draw from their softmax."""
    return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32)))(key_BT)


def gumbel_of(key_BT: jax.Array, token_BTk: jax.Array) -> jax.Array:
    """Returns the values of `gumbel` for some tokens only.

    With JAX's threefry generator, the noise of a token depends on the key and the token id, not on
    the size of the vocabulary.
    """
    key_BT2 = jax.random.key_data(key_BT)
    token = token_BTk.astype(jnp.uint32)
    halves = (jnp.broadcast_to(key_BT2[..., n : n + 1], token.shape) for n in (0, 1))
    first, second = threefry2x32_p.bind(*halves, jnp.zeros_like(token), token)
    # Converts random bits to a number in [tiny, 1), in the same way as jax.random.uniform.
    bits = ((first ^ second) >> 9) | np.float32(1).view(np.uint32)
    tiny = jnp.finfo(jnp.float32).tiny
    uniform = jax.lax.bitcast_convert_type(bits, jnp.float32) - 1.0
    uniform = jnp.maximum(tiny, uniform * (1.0 - tiny) + tiny)
    return -jnp.log(-jnp.log(uniform))


def _counts_tokens(key_BT: jax.Array) -> bool:
    """Returns whether this process uses the random number generator of `gumbel_of`."""
    threefry = str(jax.random.key_impl(key_BT)) == "threefry2x32"
    # jax adds its settings at import, where type checkers cannot see them.
    return threefry and bool(jax.config.jax_threefry_partitionable)  # type: ignore[attr-defined]


def choose(logits_BTV: jax.Array, key_BT: jax.Array, knobs: Knobs, filters: Filters) -> jax.Array:
    """Draws from each filtered distribution, int32 [B, T]; greedy rows get the best token."""
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
    """The same draw, with noise only for the largest logits: no other token can be kept."""
    top_BTk, token_BTk = _largest(logits_BTV)
    kept_BTk = filter_logits(top_BTk, knobs, filters)
    noisy_BTk = kept_BTk + _only_drawn(gumbel_of(key_BT, token_BTk), knobs)
    place_BT1 = jnp.argmax(noisy_BTk, axis=-1)[..., None]
    return jnp.take_along_axis(token_BTk, place_BT1, axis=-1)[..., 0].astype(jnp.int32)


def _only_drawn(noise: jax.Array, knobs: Knobs) -> jax.Array:
    return jnp.where((knobs.temperature_B > 0)[:, None, None], noise, 0.0)


def _few(knobs: Knobs) -> jax.Array:
    """Returns whether every row keeps few tokens. Greedy rows do not matter."""
    few_B = (knobs.top_k_B > 0) & (knobs.top_k_B <= _FEW)
    return jnp.all(few_B | (knobs.temperature_B == 0))


def is_stop(token: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Returns whether each token ends an answer, elementwise."""
    return (
        token[..., None] == jnp.expand_dims(jnp.asarray(eos_ids, jnp.int32), range(token.ndim))
    ).any(axis=-1)

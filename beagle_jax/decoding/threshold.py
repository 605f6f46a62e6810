"""The lowest value that top-k and top-p keep, found without sorting the vocabulary.

A value is kept while the weight of all larger values is below a bound: their number below k, or
their probability below p. That weight falls as the value rises, so the lowest kept value is found
by search: of the 32 bits of a float32, `_BITS` at a time are decided by one pass over the
vocabulary. Sorting 50 to 150 thousand numbers takes several times as many passes, and on GPUs one
kernel or more for each.
"""

import jax
import jax.numpy as jnp
import numpy as np

_BITS = 4  # of a value, that a pass decides
_SIGN = np.uint32(1 << 31)


def lowest_of(
    logits_MV: jax.Array, top_k_M: jax.Array | None, top_p_M: jax.Array | None
) -> jax.Array:
    """Returns the lowest float32 logit [M, 1] that top-k and then top-p keep.

    Values equal to it are kept too. top_k_M: int32, 0 or less for all; None: no top-k. top_p_M: the
    share of the probability after top-k, 1 or more for all; None: no top-p.
    """
    key_MV = _ordered(logits_MV)
    lowest_M1 = jnp.broadcast_to(_ordered(jnp.float32(-jnp.inf)), (len(logits_MV), 1))
    if top_k_M is not None:
        count_M1 = jnp.where(top_k_M > 0, top_k_M, logits_MV.shape[-1])[:, None]
        found_M1 = _search(key_MV, jnp.ones_like(key_MV, jnp.int32), count_M1)
        lowest_M1 = jnp.maximum(lowest_M1, found_M1)
    if top_p_M is not None:
        p_MV = jax.nn.softmax(jnp.where(key_MV >= lowest_M1, logits_MV, -jnp.inf), axis=-1)
        share_M1 = top_p_M[:, None]
        # The probabilities of all tokens may add up to a little more than 1.
        found_M1 = _search(key_MV, p_MV, jnp.where(share_M1 >= 1, jnp.inf, share_M1))
        lowest_M1 = jnp.maximum(lowest_M1, found_M1)
    return _value(lowest_M1)


def _search(key_MV: jax.Array, weight_MV: jax.Array, bound_M1: jax.Array) -> jax.Array:
    """Returns the smallest key [M, 1] above which the keys weigh less than the bound."""
    digit_D = jnp.arange((1 << _BITS) - 1, dtype=jnp.uint32)

    def decide(number: jax.Array, low_M1: jax.Array) -> jax.Array:
        step = jnp.uint32(32 - _BITS) - jnp.uint32(_BITS) * number.astype(jnp.uint32)
        # The largest key with this digit, and with the digits that are known before it.
        border_MD = low_M1 + (((digit_D + 1) << step) - 1)[None]
        above_MDV = key_MV[:, None] > border_MD[..., None]
        above_MD = jnp.where(above_MDV, weight_MV[:, None], 0).sum(axis=-1)
        digit_M1 = (above_MD >= bound_M1).sum(axis=-1, keepdims=True).astype(jnp.uint32)
        return low_M1 + (digit_M1 << step)

    return jax.lax.fori_loop(0, 32 // _BITS, decide, jnp.zeros_like(key_MV, shape=bound_M1.shape))


def _ordered(value: jax.Array) -> jax.Array:
    """Returns uint32 in the order of float32 values; both zeros are the same."""
    bits = jax.lax.bitcast_convert_type(value + 0.0, jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def _value(key: jax.Array) -> jax.Array:
    bits = jnp.where(key >= _SIGN, key ^ _SIGN, ~key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

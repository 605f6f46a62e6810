"""Teacher forcing: one forward pass over a complete text, without caches or trees.

The audit compares decoding with it.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.sampling import Sampling
from beagle_jax.model.cache import KVRows, visible_slots, write_all
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import Forward, Params, TargetSpec, forward, init_cache, logits
from beagle_jax.weights.target import Target

_ROWS = 64  # positions whose logits are computed together


def forced_states(target: Target, tokens: Sequence[int]) -> jax.Array:
    """Returns the target's states of a text [L, D], after the final norm.

    L is padded to a power of two; states past the text are not meaningful.
    """
    outputs = _read(target.params, target.spec, _padded(tokens), jnp.array([len(tokens)]))
    return outputs.states_BTD[0]


def _padded(tokens: Sequence[int]) -> jax.Array:
    width = max(_ROWS, 1 << (len(tokens) - 1).bit_length())
    return jnp.array([[*tokens, *[0] * (width - len(tokens))]], jnp.int32)


@partial(jax.jit, static_argnames="spec")
def _read(params: Params, spec: TargetSpec, text_BL: jax.Array, length_B: jax.Array) -> Forward:
    width = text_BL.shape[1]
    return forward(params, spec, text_BL, jnp.arange(width)[None], causal_mask(length_B, width))


_logits = jax.jit(logits, static_argnums=1)


def forced_logits(target: Target, states_LD: jax.Array, first: int, last: int) -> np.ndarray:
    """Returns float32 logits for the tokens after positions first .. last - 1.

    Shape [last - first, V].
    """
    blocks = []
    for start in range(first, last, _ROWS):
        rows = np.minimum(np.arange(start, start + _ROWS), last - 1)
        blocks.append(
            np.asarray(_logits(target.params, target.spec, states_LD[rows]))[: last - start]
        )
    return np.concatenate(blocks)


@partial(jax.jit, static_argnames="spec")
def _step(
    params: Params, spec: TargetSpec, token: jax.Array, length: jax.Array, cache: Sequence[KVRows]
) -> tuple[jax.Array, jax.Array, list[KVRows]]:
    """Reads one token after those in the cache.

    Returns its state, the logits of the next token, and the updated cache.
    """
    length_B = length[None]
    visible_BS, itself = visible_slots(length_B, cache), jnp.ones((1, 1, 1), bool)
    outputs = forward(params, spec, token[None, None], length_B[None], itself, cache, visible_BS)
    return (
        outputs.states_BTD[0, 0],
        logits(params, spec, outputs.states_BTD)[0, 0],
        write_all(cache, outputs.rows, length_B),
    )


def one_by_one(target: Target, tokens: Sequence[int], most: int) -> tuple[jax.Array, np.ndarray]:
    """Returns states [T, D] and logits [T, V] of a text's last tokens, read one at a time.

    T is `most`, or the length of the text if that is less.
    """
    first, text_1L = max(0, len(tokens) - most), _padded(tokens)
    rows = _read(target.params, target.spec, text_1L, jnp.array([len(tokens)])).rows
    # The cache starts with the keys and values of all tokens. Those from `first` on stay masked
    # until the loop writes them again.
    cache = write_all(
        init_cache(target.spec, 1, text_1L.shape[1], target.dtype), rows, jnp.zeros(1, jnp.int32)
    )
    states, all_logits = [], []
    for place in range(first, len(tokens)):
        state_D, logits_V, cache = _step(
            target.params, target.spec, jnp.int32(tokens[place]), jnp.int32(place), cache
        )
        states.append(state_D)
        all_logits.append(np.asarray(logits_V))
    return jnp.stack(states), np.stack(all_logits)


def probabilities(logits_TV: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution that sampling must follow, in float64, computed by sorting.

    Applies temperature, then top-k, then top-p.
    """
    scaled_TV = logits_TV.astype(np.float64) / sampling.temperature
    p_TV = np.exp(scaled_TV - scaled_TV.max(axis=1, keepdims=True))
    order_TV = np.argsort(-p_TV, axis=1, kind="stable")
    sorted_TV = np.take_along_axis(p_TV, order_TV, axis=1)
    if sampling.top_k:
        sorted_TV[:, sampling.top_k :] = 0
    sorted_TV /= sorted_TV.sum(axis=1, keepdims=True)
    sorted_TV[np.cumsum(sorted_TV, axis=1) - sorted_TV >= sampling.top_p] = 0
    np.put_along_axis(p_TV, order_TV, sorted_TV / sorted_TV.sum(axis=1, keepdims=True), axis=1)
    return p_TV

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
_BLOCK = 512  # positions that are read together


def forced_states(target: Target, tokens: Sequence[int]) -> jax.Array:
    """Returns the target's states of a text [L, D], after the final norm.

    L is padded to a power of two; states past the text are not meaningful.
    """
    return _read(target, tokens)[0]


def forced_reads(target: Target, tokens: Sequence[int], taps: tuple[int, ...]) -> jax.Array:
    """Returns what a draft reads of a text [L, I]: taps side by side, or the states without taps.

    See `forced_states` for L.
    """
    return _read(target, tokens, taps)[0]


def _reads(outputs: Forward) -> jax.Array:
    return jnp.concatenate(outputs.taps, axis=-1) if outputs.taps else outputs.states_BTD


def _read(
    target: Target, tokens: Sequence[int], taps: tuple[int, ...] = ()
) -> tuple[jax.Array, list[KVRows]]:
    """Returns what a draft reads [L, I], and the cache, of a text that is read in blocks.

    So the scores of attention are [_BLOCK, L] numbers a head and not [L, L].
    """
    text_1L, length_B = _padded(tokens), jnp.array([len(tokens)])
    cache = init_cache(target.spec, 1, text_1L.shape[1], target.dtype)
    blocks = []
    for start in range(0, text_1L.shape[1], _BLOCK):
        block_1T = text_1L[:, start : start + _BLOCK]
        states_TD, cache = _read_block(
            target.params, target.spec, block_1T, jnp.array([start]), length_B, cache, taps
        )
        blocks.append(states_TD)
    return jnp.concatenate(blocks), cache


def _padded(tokens: Sequence[int]) -> jax.Array:
    width = max(_ROWS, 1 << (len(tokens) - 1).bit_length())
    return jnp.array([[*tokens, *[0] * (width - len(tokens))]], jnp.int32)


@partial(jax.jit, static_argnames=("spec", "taps"), donate_argnames="cache")
def _read_block(
    params: Params,
    spec: TargetSpec,
    text_BT: jax.Array,
    start_B: jax.Array,
    length_B: jax.Array,
    cache: list[KVRows],
    taps: tuple[int, ...],
) -> tuple[jax.Array, list[KVRows]]:
    """Reads tokens from position `start_B` on, after those in the cache."""
    width = text_BT.shape[1]
    position_BT = start_B[:, None] + jnp.arange(width)[None]
    mask_BTT = causal_mask(length_B - start_B, width)
    visible_BS = visible_slots(start_B, cache)
    outputs = forward(params, spec, text_BT, position_BT, mask_BTT, cache, visible_BS, taps=taps)
    return _reads(outputs)[0], write_all(cache, outputs.rows, start_B)


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


@partial(jax.jit, static_argnames=("spec", "taps"))
def _step(
    params: Params,
    spec: TargetSpec,
    token: jax.Array,
    length: jax.Array,
    cache: Sequence[KVRows],
    taps: tuple[int, ...],
) -> tuple[jax.Array, jax.Array, list[KVRows]]:
    """Reads one token after those in the cache.

    Returns what a draft reads of it, the logits of the next token, and the updated cache.
    """
    length_B = length[None]
    visible_BS, itself = visible_slots(length_B, cache), jnp.ones((1, 1, 1), bool)
    outputs = forward(
        params, spec, token[None, None], length_B[None], itself, cache, visible_BS, taps=taps
    )
    return (
        _reads(outputs)[0, 0],
        logits(params, spec, outputs.states_BTD)[0, 0],
        write_all(cache, outputs.rows, length_B),
    )


def one_by_one(
    target: Target, tokens: Sequence[int], most: int, taps: tuple[int, ...] = ()
) -> tuple[jax.Array, np.ndarray]:
    """Returns states [T, D] and logits [T, V] of a text's last tokens, read one at a time.

    T is `most`, or the length of the text if that is less. taps: streams that a draft reads, in
    place of the states.
    """
    first = max(0, len(tokens) - most)
    # The cache starts with the keys and values of all tokens. Those from `first` on stay masked
    # until the loop writes them again.
    _, cache = _read(target, tokens)
    states, all_logits = [], []
    for place in range(first, len(tokens)):
        state_D, logits_V, cache = _step(
            target.params, target.spec, jnp.int32(tokens[place]), jnp.int32(place), cache, taps
        )
        states.append(state_D)
        all_logits.append(np.asarray(logits_V))
    return jnp.stack(states), np.stack(all_logits)


def probabilities(logits_TV: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution that sampling must follow, in float64, computed by sorting.

    Applies temperature, then top-k, then top-p, then min-p.
    """
    scaled_TV = logits_TV.astype(np.float64) / sampling.temperature
    p_TV = np.exp(scaled_TV - scaled_TV.max(axis=1, keepdims=True))
    order_TV = np.argsort(-p_TV, axis=1, kind="stable")
    sorted_TV = np.take_along_axis(p_TV, order_TV, axis=1)
    if sampling.top_k:
        sorted_TV[:, sampling.top_k :] = 0
    sorted_TV /= sorted_TV.sum(axis=1, keepdims=True)
    sorted_TV[np.cumsum(sorted_TV, axis=1) - sorted_TV >= sampling.top_p] = 0
    sorted_TV[sorted_TV < sampling.min_p * sorted_TV[:, :1]] = 0
    np.put_along_axis(p_TV, order_TV, sorted_TV / sorted_TV.sum(axis=1, keepdims=True), axis=1)
    return p_TV

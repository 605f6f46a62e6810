"""Log-probabilities of an answer's tokens under the target, before bias, penalties and filters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray
from beagle_jax.decoding.top_k import top_k


class LogProbs(NamedTuple):
    """Of the tokens of each answer, and the C largest at each place; natural logarithms."""

    own_BS: AnyArray
    top_BSC: AnyArray
    token_BSC: AnyArray  # whose the largest are


class TokenLogProb(NamedTuple):
    """One token of an answer with its log-probability, and the most likely tokens at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, log-probability), the largest first


def no_logprobs(batch: int, capacity: int, count: int) -> LogProbs:
    """Of sequences without a request."""
    shape = (batch, capacity, count)
    return LogProbs(
        jnp.zeros((batch, capacity), jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.int32),
    )


def written_at(
    before: LogProbs, logits_BTV: jax.Array, token_BT: jax.Array, place_BT: jax.Array
) -> LogProbs:
    """With the log-probabilities of these tokens at these places; places past the end are dropped.

    What is written past an answer's end is overwritten by the next round.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_sum_BT1 = jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
    own_BT1 = jnp.take_along_axis(logits_BTV, token_BT[..., None], axis=-1) - log_sum_BT1
    top_BTC, token_BTC = top_k(logits_BTV, before.top_BSC.shape[-1])
    at = (jnp.arange(len(token_BT))[:, None], place_BT)
    return LogProbs(
        jnp.asarray(before.own_BS).at[at].set(own_BT1[..., 0], mode="drop"),
        jnp.asarray(before.top_BSC).at[at].set(top_BTC - log_sum_BT1, mode="drop"),
        jnp.asarray(before.token_BSC).at[at].set(token_BTC, mode="drop"),
    )


def token_logprobs(
    logprobs: LogProbs, row: int, tokens: list[int], first: int, top: int
) -> list[TokenLogProb]:
    """Those of a row's tokens, the first of them at place `first`, with the `top` largest."""
    entries = []
    for place, token in enumerate(tokens, first):
        best = zip(
            logprobs.token_BSC[row, place, :top].tolist(),
            logprobs.top_BSC[row, place, :top].tolist(),
            strict=True,
        )
        entries.append(TokenLogProb(token, float(logprobs.own_BS[row, place]), tuple(best)))
    return entries

"""What changes the target's logits before they are filtered: bias, penalties, minimum lengths.

Penalties make the next logits depend on the tokens before them. In a drafted tree each node has a
text of its own, the answer so far and the path from the root to the node, so each node counts its
own path: a tree accepts what plain decoding would write.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray
from beagle_jax.decoding.nodes import Nodes
from beagle_jax.decoding.sampling import Filters, Knobs


class History(NamedTuple):
    """Which tokens a sequence holds."""

    prompt_BV: jax.Array  # bool: is it in the prompt?
    count_BV: jax.Array  # int32: how often it is in the answer so far


class Ends(NamedTuple):
    """End tokens of each sequence, and how many tokens an answer has before one may come."""

    token_BE: AnyArray  # padded with -1
    minimum_B: AnyArray


def no_history(batch: int, vocab_size: int) -> History:
    """Of sequences without a request."""
    shape = (batch, vocab_size)
    return History(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))


def history_of_prompt(before: History, token_BT: AnyArray, count_B: AnyArray) -> History:
    """The history after the first `count_B` tokens of a chunk of the prompt."""
    B, T = token_BT.shape
    V = before.prompt_BV.shape[1]
    token_BT = jnp.where(jnp.arange(T)[None] < count_B[:, None], token_BT, V)
    prompt_BV = before.prompt_BV.at[jnp.arange(B)[:, None], token_BT].set(True, mode="drop")
    return before._replace(prompt_BV=prompt_BV)


def history_with(before: History, token_BT: AnyArray, count_B: AnyArray) -> History:
    """The history after the answer's next `count_B` tokens."""
    B, T = token_BT.shape
    new_BT = jnp.asarray(jnp.arange(T)[None] < count_B[:, None], jnp.int32)
    count_BV = before.count_BV.at[jnp.arange(B)[:, None], token_BT].add(new_BT)
    return before._replace(count_BV=count_BV)


def edited(
    logits_BWV: jax.Array,
    place_BW: jax.Array,
    knobs: Knobs,
    filters: Filters,
    *,
    ends: Ends | None = None,
    history: History | None = None,
    nodes: Nodes | None = None,
) -> jax.Array:
    """Logits with bias, penalties and minimum length, in float32; unchanged without any.

    place_BW: of the token that is chosen from them, the answer's first is 0. nodes: the tree whose
    nodes they belong to; None: the text in `history` is all there is.
    """
    if not filters.edits:
        return logits_BWV
    logits_BWV = logits_BWV.astype(jnp.float32)
    B, W, V = logits_BWV.shape
    if filters.bias:
        assert knobs.bias_BV is not None
        logits_BWV += knobs.bias_BV[:, None]
    if filters.penalties:
        assert history is not None
        count_BWV = _path_counts(history, nodes, W)
        logits_BWV = _penalised(logits_BWV, count_BWV, history.prompt_BV[:, None], knobs)
    if filters.ends:
        assert ends is not None
        early_BW1 = (place_BW < ends.minimum_B[:, None])[..., None]
        token_BE = jnp.where(ends.token_BE < 0, V, ends.token_BE)
        ends_BV = (
            jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], token_BE].set(True, mode="drop")
        )
        logits_BWV = jnp.where(early_BW1 & ends_BV[:, None], -jnp.inf, logits_BWV)
    return logits_BWV


def _path_counts(history: History, nodes: Nodes | None, W: int) -> jax.Array:
    """How often each token is in the answer and on the path to each node [B, W, V].

    The root is the answer's last token, so it is counted already.
    """
    B, V = history.count_BV.shape
    count_BWV = jnp.broadcast_to(history.count_BV[:, None], (B, W, V))
    if nodes is None or W == 1:
        return count_BWV
    row_B11 = jnp.arange(B)[:, None, None]
    node_1W1 = jnp.arange(W)[None, :, None]
    drafted_BWX = nodes.above_BWW[:, :, 1:].astype(jnp.int32)
    return count_BWV.at[row_B11, node_1W1, nodes.token_BW[:, None, 1:]].add(drafted_BWX)


def _penalised(
    logits_BWV: jax.Array, count_BWV: jax.Array, prompt_B1V: jax.Array, knobs: Knobs
) -> jax.Array:
    """The repetition penalty of Keskar et al. (2019), then those of OpenAI's API."""
    repetition_B11 = knobs.repetition_B[:, None, None]
    written_BWV = count_BWV > 0
    divided_BWV = jnp.where(
        logits_BWV > 0, logits_BWV / repetition_B11, logits_BWV * repetition_B11
    )
    logits_BWV = jnp.where(written_BWV | prompt_B1V, divided_BWV, logits_BWV)
    logits_BWV -= knobs.frequency_B[:, None, None] * count_BWV
    return logits_BWV - knobs.presence_B[:, None, None] * written_BWV

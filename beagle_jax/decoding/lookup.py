"""Prompt lookup: the baseline that needs no draft. What followed the last tokens when they stood in
the text before.

The longest run of last tokens that also ends earlier in the text decides, of equal ones the latest;
the tokens after it are drafted as a chain. Fixed shapes, no host: one comparison of the text with
its own end, shifted. Verification is everyone's, so this is as lossless as any draft.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from beagle_jax.decoding.draft import Nodes


@dataclass(frozen=True)
class Lookup:
    """Stands where a draft stands. Hashable."""

    ngram: int = 3  # longest run of last tokens that is looked for


def lookup_chain(text_BS: jax.Array, length_B: jax.Array, ngram: int, depth: int) -> Nodes:
    """A chain of `depth` tokens below the root, which is the token at position length_B of the
    text.

    A run that ends `period` tokens before the root predicts that the text repeats with this period,
    also past its own end. Where not even the root was seen before, the root is repeated: something
    must be drafted.

        text      a b c x a b c | ?      run a b c, period 4, drafts x a b
    """
    B, S = text_BS.shape
    slot_1S = jnp.arange(S)[None]
    run_BS, fits_BS = jnp.zeros((B, S), jnp.int32), slot_1S < length_B[:, None]
    for back in range(ngram):
        last_B1 = jnp.take_along_axis(text_BS, jnp.maximum(length_B - back, 0)[:, None], axis=1)
        fits_BS &= (jnp.roll(text_BS, back, axis=1) == last_B1) & (slot_1S >= back)
        run_BS += fits_BS
    # The latest of the longest; a run of none at all ends at the token before the root.
    rank_BS = jnp.where(slot_1S < length_B[:, None], run_BS * S + slot_1S, -1)
    period_B = jnp.maximum(length_B - jnp.argmax(rank_BS, axis=1), 1)
    step_1P = jnp.arange(depth)[None]
    source_BP = length_B[:, None] - period_B[:, None] + 1 + step_1P % period_B[:, None]
    token_BW = jnp.take_along_axis(
        text_BS, jnp.concatenate([length_B[:, None], source_BP], axis=1), axis=1
    )
    depth_BW = jnp.broadcast_to(jnp.arange(depth + 1)[None], (B, depth + 1))
    above_BWW = jnp.broadcast_to(
        jnp.tril(jnp.ones((depth + 1, depth + 1), bool))[None], (B, depth + 1, depth + 1)
    )
    return Nodes(
        token_BW,
        jnp.maximum(depth_BW - 1, 0),
        depth_BW,
        above_BWW,
        jnp.zeros((B, depth + 1), jnp.float32),
    )

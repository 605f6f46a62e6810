"""Prompt lookup: drafts by copying earlier text, a baseline without a trained draft.

It finds the longest run of last tokens that also occurs earlier in the text (the latest occurrence
if several are equally long) and drafts the tokens after it as a chain. All shapes are fixed and
nothing runs on the host: the text is compared with shifted copies of its end. Drafts are verified
as those of any drafter, so decoding is lossless.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp

from beagle_jax.decoding.drafter import Drafter, Draw, Known, Proposal, Seen
from beagle_jax.decoding.nodes import Nodes, chain_nodes
from beagle_jax.decoding.tree import Tree
from beagle_jax.errors import UserError
from beagle_jax.model.target import TargetSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lookup(Drafter):
    """Drafts from the text itself.

    The state is the text, tokens by position [B, S], undefined past its end.
    """

    kind: ClassVar[str] = "lookup"

    # length of the longest run of last tokens to search for
    ngram: int = field(default=3, metadata=dict(static=True))

    def init(self, batch: int, capacity: int) -> jax.Array:
        """Returns the state of an empty text."""
        return jnp.zeros((batch, capacity), jnp.int32)

    def observe(self, state: jax.Array, seen: Seen) -> jax.Array:
        """Stores the tokens, and the token after the last of them."""
        (B, T), capacity = seen.token_BT.shape, state.shape[1]
        token_BT1 = jnp.concatenate([seen.token_BT[:, :1], seen.next_BT], axis=1)
        step_1T = jnp.arange(T + 1)[None]
        text_BT = (step_1T <= seen.count_B[:, None]) & (seen.count_B > 0)[:, None]
        slot_BT = jnp.where(text_BT, seen.start_B[:, None] + step_1T, capacity)
        return state.at[jnp.arange(B)[:, None], slot_BT].set(token_BT1, mode="drop")

    def propose(self, state: jax.Array, known: Known, tree: Tree, draw: Draw | None) -> Proposal:
        """Drafts the tokens that followed the earlier occurrence."""
        return Proposal(lookup_chain(state, known.length_B, self.ngram, tree.depth))

    def check(self, target: TargetSpec, tree: Tree, rule: str) -> None:
        """Raises UserError unless the tree is a chain and the rule is match."""
        if tree.size != tree.depth + 1 or tree.scored or rule == "ratio":
            raise UserError(
                f"prompt lookup drafts a chain without probabilities, but got a {tree} and rule "
                f"{rule!r}; use a chain and rule 'match'"
            )


def lookup_chain(text_BS: jax.Array, length_B: jax.Array, ngram: int, depth: int) -> Nodes:
    """Drafts a chain of `depth` tokens below the root.

    The root is the token at position length_B of the text. An earlier run that ends `period` tokens
    before the root predicts that the text repeats with this period, also past its own end. If not
    even the root occurs earlier, the root is repeated, because shapes are fixed and some token must
    be drafted.

        text      a b c x a b c | ?      run a b c, period 4, drafts x a b
    """
    B, S = text_BS.shape
    slot_1S = jnp.arange(S)[None]
    run_BS, fits_BS = jnp.zeros((B, S), jnp.int32), slot_1S < length_B[:, None]
    for back in range(ngram):
        last_B1 = jnp.take_along_axis(text_BS, jnp.maximum(length_B - back, 0)[:, None], axis=1)
        fits_BS &= (jnp.roll(text_BS, back, axis=1) == last_B1) & (slot_1S >= back)
        run_BS += fits_BS
    # The latest of the longest runs. A run of length 0 ends at the token before the root.
    rank_BS = jnp.where(slot_1S < length_B[:, None], run_BS * S + slot_1S, -1)
    period_B = jnp.maximum(length_B - jnp.argmax(rank_BS, axis=1), 1)
    step_1P = jnp.arange(depth)[None]
    source_BP = length_B[:, None] - period_B[:, None] + 1 + step_1P % period_B[:, None]
    return chain_nodes(
        jnp.take_along_axis(
            text_BS, jnp.concatenate([length_B[:, None], source_BP], axis=1), axis=1
        )
    )

"""Prompt lookup: drafts by copying earlier text, a baseline without a trained draft.

It finds the longest run of last tokens that also occurs earlier in the text (the latest occurrence
if several are equally long) and drafts the tokens after it as a chain. All shapes are fixed and
nothing runs on the host: the text is compared with shifted copies of its end. Drafts are verified
as those of any drafter, so decoding is lossless.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.decoding.drafter import Drafter, Draw, Known, Proposal, Seen, State
from beagle_jax.decoding.nodes import Nodes, chain_nodes
from beagle_jax.decoding.tree import LookupTree, Tree
from beagle_jax.errors import UserError
from beagle_jax.model.cache import KVRows
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


class BesideState(NamedTuple):
    """State of a drafter, and the text that is searched."""

    drafter: State
    text_BS: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LookupBeside(Drafter):
    """Another drafter's tree, and a looked-up chain beside it (`tree.LookupTree`)."""

    kind: ClassVar[str] = "lookup beside"

    drafter: Drafter

    @property
    def taps(self) -> tuple[int, ...]:
        """Streams of the target that the drafter reads."""
        return self.drafter.taps

    @property
    def attends(self) -> bool:  # type: ignore[override]
        """Whether the drafter attends to states of the text."""
        return self.drafter.attends

    def init(self, batch: int, capacity: int) -> BesideState:
        """Returns the state of empty texts."""
        return BesideState(self.drafter.init(batch, capacity), Lookup().init(batch, capacity))

    def observe(self, state: BesideState, seen: Seen) -> BesideState:
        """Passes the text to the drafter, and stores it."""
        text_BS = Lookup().observe(state.text_BS, seen)
        return BesideState(self.drafter.observe(state.drafter, seen), text_BS)

    def propose(self, state: BesideState, known: Known, tree: Tree, draw: Draw | None) -> Proposal:
        """Drafts the tree, then the chain."""
        assert isinstance(tree, LookupTree)
        grown = self.drafter.propose(state.drafter, known, tree.grown, draw).nodes
        chain = lookup_chain(state.text_BS, known.length_B, tree.ngram, tree.looked_up)
        return Proposal(beside(grown, chain))

    def check(self, target: TargetSpec, tree: Tree, rule: str) -> None:
        """Raises UserError unless the tree has looked-up nodes and the rule is match."""
        if not isinstance(tree, LookupTree):
            raise UserError(f"looked-up nodes need a LookupTree, but got a {tree}")
        if rule == "ratio":
            raise UserError(
                "decode.lookup_nodes: looked-up tokens have no probabilities, which rule 'ratio' "
                "needs; use rule 'match'"
            )
        self.drafter.check(target, tree.grown, rule)

    def owned(self) -> Any:
        """Returns the drafter's own arrays."""
        return self.drafter.owned()

    def rows(self, state: BesideState) -> KVRows:
        """Returns the drafter's keys and values."""
        return self.drafter.rows(state.drafter)

    def first_queries(
        self, state_1LD: jax.Array, text_1L: jax.Array, places_1T: jax.Array
    ) -> jax.Array:
        """Returns the drafter's queries."""
        return self.drafter.first_queries(state_1LD, text_1L, places_1T)


def beside(tree: Nodes, chain: Nodes) -> Nodes:
    """Returns the nodes of a tree, then those of a chain below the same root."""
    B, W = tree.token_BW.shape
    count = chain.token_BW.shape[1] - 1
    parent_BW = jnp.where(chain.parent_BW > 0, chain.parent_BW + W - 1, 0)
    below_BWC = jnp.zeros((B, W, count), bool)
    # The chain's nodes see the root, no other node of the tree, and each other as before.
    above_BCW = jnp.broadcast_to(jnp.arange(W)[None, None] == 0, (B, count, W))
    above_BCX = jnp.concatenate([above_BCW, chain.above_BWW[:, 1:, 1:]], axis=2)
    return Nodes(
        _joined(tree.token_BW, chain.token_BW),
        _joined(tree.parent_BW, parent_BW),
        _joined(tree.depth_BW, chain.depth_BW),
        jnp.concatenate([jnp.concatenate([tree.above_BWW, below_BWC], axis=2), above_BCX], axis=1),
        _joined(tree.score_BW, chain.score_BW),
    )


def _joined(of_tree_BW: jax.Array, of_chain_BW: jax.Array) -> jax.Array:
    return jnp.concatenate([of_tree_BW, of_chain_BW[:, 1:]], axis=1)


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

"""What drafts: the interface of every kind, and the kind that drafts nothing.

A drafter is a pytree: its weights are leaves, what describes it is static. It keeps a state of its
own for each sequence, which nobody else looks into; every array of the state has the sequences as
its first axis, so that rows can be admitted one by one.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax

from beagle_jax.decoding.nodes import Nodes, chain_nodes
from beagle_jax.decoding.sampling import Filters, Knobs, filter_logits, gumbel
from beagle_jax.decoding.tree import Tree
from beagle_jax.errors import UserError
from beagle_jax.model.cache import KVRows
from beagle_jax.model.target import TargetSpec

State = Any  # a drafter's own pytree


class Seen(NamedTuple):
    """Text that the target has read: a chunk of a prompt, or the accepted path of a round."""

    state_BTD: jax.Array  # the target's states of these tokens
    token_BT: jax.Array
    # The token after each. After the last one of a chunk in which the prompt does not end it is
    # not known yet.
    next_BT: jax.Array
    start_B: jax.Array  # position of the first token
    count_B: jax.Array  # how many of the T are text; what is past them must change nothing
    # Static: True for every chunk of a prompt but the first. The token after the last state before
    # these is token_BT[:, 0], and was not known when that state was seen.
    resumed: bool = False


class Known(NamedTuple):
    """Where a round begins."""

    root_B: jax.Array  # last known token, without a state yet
    length_B: jax.Array  # its position: so many tokens were seen


class Draw(NamedTuple):
    """How to draw drafts from the drafter's own distribution, for the ratio rule."""

    key_BP: jax.Array  # of each depth below the root
    knobs: Knobs
    filters: Filters

    def choose(self, logits_BV: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
        """A draw [B], as an index into the last axis, and the filtered logits [B, V]."""
        logits_BV = filter_logits(logits_BV[:, None], self.knobs, self.filters)[:, 0]
        noise_BV = gumbel(self.key_BP[:, depth : depth + 1], logits_BV.shape[-1])[:, 0]
        return (logits_BV + noise_BV).argmax(axis=-1), logits_BV


class Proposal(NamedTuple):
    """A round's drafted tree."""

    nodes: Nodes
    # of a chain that was drawn: the filtered logits of each draw, over the whole vocabulary
    logits_BPV: jax.Array | None = None


@dataclass(frozen=True)
class Drafter:
    """Base of all kinds. A kind overrides `init`, `observe` and `propose`.

    A kind whose tree is grown level by level defines `level` and lets `draft.grow` call it.
    """

    kind: ClassVar[str] = ""
    taps: ClassVar[tuple[int, ...]] = ()  # streams of the target that `Seen.state_BTD` must hold
    attends: ClassVar[bool] = False  # to states of the text; then it has `rows` and `first_queries`

    def init(self, batch: int, capacity: int) -> State:
        """The state of sequences of which nothing was seen. capacity: positions at most."""
        raise NotImplementedError

    def observe(self, state: State, seen: Seen) -> State:
        """The state after more text."""
        raise NotImplementedError

    def propose(self, state: State, known: Known, tree: Tree, draw: Draw | None) -> Proposal:
        """The tree below the root. draw: the tree is a chain, and its tokens are to be drawn."""
        raise NotImplementedError

    def check(self, target: TargetSpec, tree: Tree, rule: str) -> None:
        """Raises UserError unless this drafter, the target, the tree and the rule fit."""

    def owned(self) -> Any:
        """The arrays that are this drafter's own, and not the target's."""
        return ()

    def rows(self, state: State) -> KVRows:
        """Keys and values of the true states; only of kinds that attend."""
        raise NotImplementedError

    def first_queries(
        self, state_1LD: jax.Array, text_1L: jax.Array, places_1T: jax.Array
    ) -> jax.Array:
        """Queries [1, K, G, T, H] of the first level, as if each of these places were the root.

        Only of kinds that attend.
        """
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoDrafter(Drafter):
    """Drafts nothing: plain decoding."""

    kind: ClassVar[str] = "none"

    def init(self, batch: int, capacity: int) -> State:
        """No state."""
        return ()

    def observe(self, state: State, seen: Seen) -> State:
        """No state."""
        return ()

    def propose(self, state: State, known: Known, tree: Tree, draw: Draw | None) -> Proposal:
        """The root alone."""
        return Proposal(chain_nodes(known.root_B[:, None]))

    def check(self, target: TargetSpec, tree: Tree, rule: str) -> None:
        """Raises UserError for any tree but the root alone."""
        if tree.depth:
            raise UserError("a draft tree needs a draft; set draft.path, or decode plainly")

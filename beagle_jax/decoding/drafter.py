"""The interface of all drafters, and the drafter of plain decoding.

A drafter is a pytree: its weights are leaves, its description is static. It has a state of its own,
which the decoder stores without reading it. The first axis of every array of the state is the
batch, so that rows can be admitted separately.
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
    # The token after each. The last entry is not yet known if the prompt goes on after this chunk.
    next_BT: jax.Array
    start_B: jax.Array  # position of the first token
    count_B: jax.Array  # how many of the T are text; the rest is padding and must have no effect
    # Static: True for every chunk of a prompt except the first. The last state of the chunk before
    # was seen without the token after it; that token is token_BT[:, 0] of this chunk.
    resumed: bool = False
    # The streams of the target that `Drafter.taps` names, concatenated in its order; None without.
    tapped_BTI: jax.Array | None = None

    @property
    def input_BTI(self) -> jax.Array:
        """What the drafter reads of the target: its taps, or without taps the states."""
        return self.state_BTD if self.tapped_BTI is None else self.tapped_BTI


class Known(NamedTuple):
    """Start of a round: the root and its position."""

    root_B: jax.Array  # last known token; the target has not computed its state yet
    length_B: jax.Array  # position of the root = number of tokens that were seen


class Draw(NamedTuple):
    """Settings for drawing drafts from the drafter's distribution, for the ratio rule."""

    key_BP: jax.Array  # of each depth below the root
    knobs: Knobs
    filters: Filters

    def choose(self, logits_BV: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
        """Returns a draw [B], an index into the last axis, and the filtered logits [B, V]."""
        logits_BV = filter_logits(logits_BV[:, None], self.knobs, self.filters)[:, 0]
        noise_BV = gumbel(self.key_BP[:, depth : depth + 1], logits_BV.shape[-1])[:, 0]
        return (logits_BV + noise_BV).argmax(axis=-1), logits_BV


class Proposal(NamedTuple):
    """The drafted tree of a round."""

    nodes: Nodes
    # only for a drawn chain: the filtered logits of each draw, over the whole vocabulary
    logits_BPV: jax.Array | None = None


@dataclass(frozen=True)
class Drafter:
    """Base class. A kind of drafter overrides `init`, `observe` and `propose`.

    A kind whose tree is grown level by level defines `level` and lets `draft.grow` call it.
    """

    kind: ClassVar[str] = ""
    attends: ClassVar[bool] = False  # to states of the text; then it has `rows` and `first_queries`

    @property
    def taps(self) -> tuple[int, ...]:
        """Streams of the target that `observe` gets in `Seen.tapped_BTI` (see `forward`)."""
        return ()

    def init(self, batch: int, capacity: int) -> State:
        """Returns the state of empty sequences. capacity: largest number of positions."""
        raise NotImplementedError

    def observe(self, state: State, seen: Seen) -> State:
        """Returns the state after more text."""
        raise NotImplementedError

    def propose(self, state: State, known: Known, tree: Tree, draw: Draw | None) -> Proposal:
        """Drafts the tree below the root. draw: if given, the tokens of a chain are drawn."""
        raise NotImplementedError

    def check(self, target: TargetSpec, tree: Tree, rule: str) -> None:
        """Checks that drafter, target, tree and rule fit. Raises UserError if they do not."""

    def owned(self) -> Any:
        """Returns the arrays of this drafter that it does not share with the target."""
        return ()

    def rows(self, state: State) -> KVRows:
        """Returns keys and values of the true states. Only for kinds that attend."""
        raise NotImplementedError

    def first_queries(
        self, state_1LD: jax.Array, text_1L: jax.Array, places_1T: jax.Array
    ) -> jax.Array:
        """Returns queries [1, K, G, T, H] of the first level, with each position as the root.

        Only for kinds that attend.
        """
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoDrafter(Drafter):
    """Drafts nothing: plain decoding."""

    kind: ClassVar[str] = "none"

    def init(self, batch: int, capacity: int) -> State:
        """Returns the empty state."""
        return ()

    def observe(self, state: State, seen: Seen) -> State:
        """Returns the state as it is: that of another drafter is not needed in plain rounds."""
        return state

    def propose(self, state: State, known: Known, tree: Tree, draw: Draw | None) -> Proposal:
        """Returns the tree of the root alone."""
        return Proposal(chain_nodes(known.root_B[:, None]))

    def check(self, target: TargetSpec, tree: Tree, rule: str) -> None:
        """Raises UserError unless the tree is the root alone."""
        if tree.depth:
            raise UserError("a draft tree needs a draft; set draft.path, or decode plainly")

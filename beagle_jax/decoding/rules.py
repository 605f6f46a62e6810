"""Rules of acceptance: which drafted tokens of a round become part of the answer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp

from beagle_jax.decoding.accept import Accepted, accept_by_ratio, accept_matching
from beagle_jax.decoding.drafter import Proposal
from beagle_jax.decoding.sampling import filter_logits, gumbel
from beagle_jax.decoding.state import DecodeState
from beagle_jax.model.target import logits

if TYPE_CHECKING:
    from beagle_jax.decoding.round import Round

# Folded into the key of a position, so that its draws for different purposes are independent.
FOR_TARGET, FOR_DRAFT, FOR_ACCEPTING = 0, 1, 2


class Rule(Protocol):
    """Decides which drafts are accepted. Hashable."""

    @property
    def name(self) -> str:
        """Its key in `RULES`."""

    @property
    def draws(self) -> bool:
        """Drafts must be drawn from the drafter's distribution."""

    def accept(
        self, now: "Round", state: DecodeState, proposal: Proposal, states_BWD: jax.Array
    ) -> tuple[Accepted, jax.Array]:
        """Returns the accepted path, and whether each node's logits are finite [B, W]."""
        ...


@dataclass(frozen=True)
class Match:
    """Accepts drafts that equal the target's own choice, greedy or drawn (method.md 6.6).

    With drawn choices this is EAGLE-2's rule.
    """

    name: str = "match"
    draws: bool = False

    def accept(
        self, now: "Round", state: DecodeState, proposal: Proposal, states_BWD: jax.Array
    ) -> tuple[Accepted, jax.Array]:
        """Returns the accepted path, and whether each node's logits are finite [B, W]."""
        place_BW = state.transcript.count_B[:, None] + proposal.nodes.depth_BW
        wanted_BW, finite_BW = now.choose(
            state.requests, states_BWD, place_BW, state.history, proposal.nodes
        )
        drafts_B = state.requests.drafts_B
        return accept_matching(proposal.nodes, wanted_BW, now.tree.depth, drafts_B), finite_BW


@dataclass(frozen=True)
class Ratio:
    """Leviathan's rule for chains of drawn drafts: accept with probability min(1, p / q)."""

    name: str = "ratio"
    draws: bool = True

    def accept(
        self, now: "Round", state: DecodeState, proposal: Proposal, states_BWD: jax.Array
    ) -> tuple[Accepted, jax.Array]:
        """Returns the accepted path, and whether each node's logits are finite [B, W]."""
        assert proposal.logits_BPV is not None, "the ratio rule needs the draft's logits"
        requests, count_B1 = state.requests, state.transcript.count_B[:, None]
        raw_BWV = logits(now.target.params, now.target.spec, states_BWD)
        place_BP = count_B1 + jnp.arange(now.tree.depth)[None]
        key_BP = now.part("keys")(now, requests.key_B, place_BP, FOR_ACCEPTING)
        place_BW = count_B1 + proposal.nodes.depth_BW
        key_BW = now.part("keys")(now, requests.key_B, place_BW, FOR_TARGET)
        edited_BWV = now.part("edit")(
            now, requests, raw_BWV, place_BW, state.history, proposal.nodes
        )
        accepted = accept_by_ratio(
            proposal.nodes,
            filter_logits(edited_BWV, requests.knobs, now.filters),
            proposal.logits_BPV,
            self.uniform(key_BP),
            gumbel(key_BW, raw_BWV.shape[-1]),
            requests.drafts_B,
        )
        return accepted, jnp.isfinite(raw_BWV.max(axis=-1))

    def uniform(self, key_BP: jax.Array) -> jax.Array:
        """Draws a number in [0, 1) for each draft."""
        return jax.vmap(jax.vmap(jax.random.uniform))(key_BP)


RULES: dict[str, Rule] = {"match": Match(), "ratio": Ratio()}

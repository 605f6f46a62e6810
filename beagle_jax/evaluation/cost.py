"""Time of a round's phases and memory of decoding, from the programs that decoding runs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.drafter import Proposal
from beagle_jax.decoding.engine import advance
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.state import DecodeState
from beagle_jax.decoding.timing import PASSES, Passes, milliseconds
from beagle_jax.hardware import memory_stats


def phases(
    decoder: SpeculativeDecoder, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int
) -> dict[str, float]:
    """Measures milliseconds of drafting one tree and of verifying it.

    Verification is the target's forward pass over the tree plus the choice of the target's own
    tokens. Each phase runs alone in a loop, with the caches that decoding has after `prompt`. The
    remaining time of a round (cache writes and host work) only shows in whole answers.
    """
    now, state = decoder.prefilled([prompt], sampling, max_new_tokens=max_new_tokens)
    proposal = jax.jit(Round.propose)(now, state)
    draft_ms = milliseconds(Passes(lambda: _drafted(now, state), PASSES)) if now.tree.depth else 0.0
    return {
        "draft": draft_ms,
        "verify": milliseconds(Passes(lambda: _verified(now, state, proposal), PASSES)),
    }


@jax.jit
def _drafted(now: Round, state: DecodeState) -> jax.Array:
    def once(_index: jax.Array, root_B: jax.Array) -> jax.Array:
        # The length depends on the last pass in form only. Otherwise the compiler would hoist the
        # draft out of the loop.
        length_B = jnp.minimum(state.cache.length_B, state.cache.length_B + root_B)
        again = state._replace(
            cache=state.cache.with_(length_B=length_B),
            transcript=state.transcript._replace(root_B=root_B),
        )
        return now.propose(again).nodes.token_BW.sum(axis=1) % now.target.spec.vocab_size

    return jax.lax.fori_loop(0, PASSES, once, state.transcript.root_B)


@jax.jit
def _verified(now: Round, state: DecodeState, proposal: Proposal) -> jax.Array:
    def once(_index: jax.Array, shift_B: jax.Array) -> jax.Array:
        nodes = proposal.nodes
        token_BW = (nodes.token_BW + shift_B[:, None]) % now.target.spec.vocab_size
        shifted = proposal._replace(nodes=nodes._replace(token_BW=token_BW))
        states_BWD = now.read(state, shifted.nodes).states_BTD
        return now.accept(state, shifted, states_BWD)[0].bonus_B

    return jax.lax.fori_loop(0, PASSES, once, state.transcript.root_B)


def memory(
    decoder: SpeculativeDecoder, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int
) -> dict[str, int | None]:
    """Returns bytes of weights, caches and compiled temporaries, and the device's peak.

    The peak covers everything the process has done, for all systems; None if the device does not
    report it.
    """
    session = decoder.session([prompt], sampling, max_new_tokens=max_new_tokens)
    now, state = session.now, session.first_state()

    def size(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    rounds = advance.lower(now, state, np.int32(1), np.int32(1))
    return {
        "target_weights": size(now.target.params),
        "draft_weights": size(now.drafter.owned()),
        "target_cache": size(state.cache.layers),
        "draft_cache": size(now.drafter.rows(state.draft)) if now.drafter.attends else 0,
        "decode_temporaries": _temporaries(rounds),
        "prefill_temporaries": _temporaries(session.first_reading()),
        "device_peak": memory_stats(jax.devices()[0]).get("peak_bytes_in_use"),
    }


def _temporaries(lowered: jax.stages.Lowered) -> int | None:
    analysis = lowered.compile().memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)

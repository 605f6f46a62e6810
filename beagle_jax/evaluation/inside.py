"""What a draft does while it decodes: tree and accepted path of each round, and attention."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.engine import advance
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.state import DecodeState
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.precision import exact
from beagle_jax.model.target import forward


class Played(NamedTuple):
    """One round of one answer."""

    token_W: np.ndarray  # drafted nodes, the root first
    parent_W: np.ndarray
    depth_W: np.ndarray
    written: list[int]  # tokens that this round added to the answer
    path: list[int]  # accepted nodes, from the root on


_propose = jax.jit(Round.propose)
_ONE_ROW, _ALL_ROUNDS = np.int32(1), np.int32(2**31 - 1)


def rounds(
    decoder: SpeculativeDecoder,
    prompt: Sequence[int],
    sampling: Sampling = GREEDY,
    *,
    most: int = 16,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> list[Played]:
    """Decodes the first rounds of an answer one by one and records each.

    most: rounds at most.
    """
    now, state = decoder.prefilled([prompt], sampling, max_new_tokens=max_new_tokens, seed=seed)
    played: list[Played] = []
    while len(played) < most and not state.transcript.done_B[0]:
        nodes = _propose(now, state).nodes
        token_W, parent_W, depth_W = (
            np.asarray(x_BW)[0] for x_BW in (nodes.token_BW, nodes.parent_BW, nodes.depth_BW)
        )
        before = int(state.transcript.count_B[0])
        state, after = advance(now, state, np.int32(1), _ONE_ROW)
        written = np.asarray(after.out_BS)[0, before : int(after.count_B[0])].tolist()
        path = [0]
        for token in written:
            children = np.flatnonzero((parent_W == path[-1]) & (token_W == token) & (depth_W > 0))
            if not len(children):
                break
            path.append(int(children[0]))
        played.append(Played(token_W, parent_W, depth_W, written, path))
    return played


def attention(
    decoder: SpeculativeDecoder, prompt: Sequence[int], *, max_new_tokens: int = 32
) -> tuple[np.ndarray, list[int]] | None:
    """Returns the attention of the draft's first step at each position of an answer.

    Weights [T, S] over earlier states, mean over heads, and the tokens of the text. T: tokens of
    the answer that were roots or could have been. EAGLE's cache entries have the positions of the
    states, so the last entry a token sees is its own. Returns None if the draft has no attention.
    """
    now, state = decoder.prefilled([prompt], max_new_tokens=max_new_tokens)
    if not now.drafter.attends:
        return None
    state, after = advance(now, state, _ALL_ROUNDS, _ONE_ROW)
    tokens = [*prompt, *np.asarray(after.out_BS)[0, : int(after.count_B[0])].tolist()]
    # The cache may lack states of the last tokens.
    length = min(int(state.cache.length_B[0]), len(tokens) - 1)
    places_1T = jnp.arange(len(prompt), length + 1)[None]
    weights_TS = _weights(now, state, jnp.asarray(tokens)[None], places_1T)
    return np.asarray(weights_TS)[:, :length], tokens[: length + 1]


@jax.jit
@exact
def _weights(now: Round, state: DecodeState, text_1L: jax.Array, places_1T: jax.Array) -> jax.Array:
    drafter, target, L = now.drafter, now.target, text_1L.shape[1]
    k_BKHS = drafter.rows(state.draft).k_BKHS
    mask_1LL = causal_mask(jnp.full(1, L), L)
    output = forward(
        target.params, target.spec, text_1L, jnp.arange(L)[None], mask_1LL, taps=drafter.taps
    )
    input_1LI = output.states_BTD if output.tapped_BTI is None else output.tapped_BTI
    q_BKGTH = drafter.first_queries(input_1LI, text_1L, places_1T)
    score_BKGTS = jnp.einsum("BKGTH,BKHS->BKGTS", q_BKGTH, k_BKHS) * q_BKGTH.shape[-1] ** -0.5
    slot_1S = jnp.arange(k_BKHS.shape[3])[None]
    seen_TS = slot_1S < places_1T[0][:, None]
    return jax.nn.softmax(
        jnp.where(seen_TS[None, None, None], score_BKGTS.astype(jnp.float32), -jnp.inf), axis=-1
    )[0].mean(axis=(0, 1))

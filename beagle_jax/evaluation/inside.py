"""What happens inside a draft while it decodes: the tree of each round and what was accepted of it,
where it attends.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.loop import DecodeState, Models, Shapes, decode, propose
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.model.beagle import DraftSpec
from beagle_jax.model.kinds import block_of
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.precision import exact
from beagle_jax.model.target import embed, forward


class Round(NamedTuple):
    """One round of one answer."""

    token_W: np.ndarray  # drafted nodes, the root first
    parent_W: np.ndarray
    depth_W: np.ndarray
    written: list[int]  # tokens that the round added to the answer
    path: list[int]  # accepted nodes, from the root on


_propose = jax.jit(propose, static_argnames="shapes")


def rounds(
    decoder: SpeculativeDecoder,
    prompt: Sequence[int],
    sampling: Sampling = GREEDY,
    *,
    most: int = 16,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> list[Round]:
    """The first rounds of an answer, one by one."""
    models, shapes, state = decoder.prefilled(
        prompt, sampling, max_new_tokens=max_new_tokens, seed=seed
    )
    found: list[Round] = []
    while len(found) < most and not state.done_B[0]:
        nodes = _propose(models, shapes, state).nodes
        token_W, parent_W, depth_W = (
            np.asarray(x_BW)[0] for x_BW in (nodes.token_BW, nodes.parent_BW, nodes.depth_BW)
        )
        before = int(state.count_B[0])
        state, told = decode(models, shapes, state, np.int32(1))
        written = np.asarray(told.out_BS)[0, before : int(told.count_B[0])].tolist()
        path = [0]
        for token in written:
            children = np.flatnonzero((parent_W == path[-1]) & (token_W == token) & (depth_W > 0))
            if not len(children):
                break
            path.append(int(children[0]))
        found.append(Round(token_W, parent_W, depth_W, written, path))
    return found


def attention(
    decoder: SpeculativeDecoder, prompt: Sequence[int], *, max_new_tokens: int = 32
) -> tuple[np.ndarray, list[int]] | None:
    """Where the draft's first step looks at each place of an answer: weights [T, S] over earlier
    states, mean over heads.

    T: tokens of the answer that served as roots or could have. EAGLE's entries stand at the states'
    places: the last one that a token sees is its own. Returns the text's tokens too; None for
    decoders whose draft has no attention.
    """
    models, shapes, state = decoder.prefilled(prompt, max_new_tokens=max_new_tokens)
    if not isinstance(shapes.draft, DraftSpec):
        return None
    state, told = decode(models, shapes, state, np.int32(2**31 - 1))
    tokens = [*prompt, *np.asarray(told.out_BS)[0, : int(told.count_B[0])].tolist()]
    length = min(
        int(state.length_B[0]), len(tokens) - 1
    )  # states of the last tokens may not be there
    places_1T = jnp.arange(len(prompt), length + 1)[None]
    weights_TS = _weights(models, shapes, state, jnp.asarray(tokens)[None], places_1T)
    return np.asarray(weights_TS)[:, :length], tokens[: length + 1]


@partial(jax.jit, static_argnames="shapes")
@exact
def _weights(
    models: Models, shapes: Shapes, state: DecodeState, text_1L: jax.Array, places_1T: jax.Array
) -> jax.Array:
    spec, L, k_BKHS = shapes.draft, text_1L.shape[1], state.draft_cache.k_BKHS
    block = block_of(spec).bind({"params": models.draft})
    states_1LD = forward(
        models.target, shapes.target, text_1L, jnp.arange(L)[None], causal_mask(jnp.full(1, L), L)
    ).states_BTD
    e_1TD = embed(models.target["embed_VD"], text_1L[:, places_1T[0]], spec.embed_scale)
    x_1TD = block.fuse(e_1TD, states_1LD[:, places_1T[0] - 1])
    q_BKGTH = block.queries(x_1TD, places_1T - int(spec.fused))
    score_BKGTS = jnp.einsum("BKGTH,BKHS->BKGTS", q_BKGTH, k_BKHS) * spec.head_dim**-0.5
    slot_1S = jnp.arange(k_BKHS.shape[3])[None]
    seen_TS = slot_1S < places_1T[0][:, None]
    return jax.nn.softmax(
        jnp.where(seen_TS[None, None, None], score_BKGTS.astype(jnp.float32), -jnp.inf), axis=-1
    )[0].mean(axis=(0, 1))

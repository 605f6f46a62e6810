"""What a round costs in its parts, and where memory goes: from the programs that decoding runs, at
their real shapes.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.decoder import PREFILL_CHUNK, SpeculativeDecoder, padded
from beagle_jax.decoding.draft import Drafted
from beagle_jax.decoding.loop import (
    DecodeState,
    Models,
    Shapes,
    accept,
    decode,
    propose,
    read_prompt,
    read_tree,
)
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.tuning import PASSES, milliseconds


def phases(
    decoder: SpeculativeDecoder, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int
) -> dict[str, float]:
    """Milliseconds of drafting a tree, and of verifying it: reading it, and choosing the target's
    own tokens.

    Each runs alone in a loop, with the caches that decoding has after this prompt. What a whole
    round takes beyond the two (writing the cache, and the host's part) shows only in whole answers.
    """
    models, shapes, state = decoder.prefilled(prompt, sampling, max_new_tokens=max_new_tokens)
    drafted = _propose(models, shapes, state)
    draft_ms = milliseconds(lambda: _drafted(models, shapes, state)) if shapes.tree.depth else 0.0
    return {
        "draft": draft_ms,
        "verify": milliseconds(lambda: _verified(models, shapes, state, drafted)),
    }


_propose = jax.jit(propose, static_argnames="shapes")


@partial(jax.jit, static_argnames="shapes")
def _drafted(models: Models, shapes: Shapes, state: DecodeState) -> jax.Array:
    def once(_, root_B):
        # The text's end depends on the last pass only in form, or a compiler would look it up once
        # for all.
        here = state._replace(
            root_B=root_B, length_B=jnp.minimum(state.length_B, state.length_B + root_B)
        )
        return propose(models, shapes, here).nodes.token_BW.sum(axis=1) % shapes.target.vocab_size

    return jax.lax.fori_loop(0, PASSES, once, state.root_B)


@partial(jax.jit, static_argnames="shapes")
def _verified(models: Models, shapes: Shapes, state: DecodeState, drafted: Drafted) -> jax.Array:
    def once(_, shift_B):
        token_BW = (drafted.nodes.token_BW + shift_B[:, None]) % shapes.target.vocab_size
        here = drafted._replace(nodes=drafted.nodes._replace(token_BW=token_BW))
        states_BWD, _ = read_tree(models, shapes, state, here.nodes)
        return accept(models, shapes, state, here, states_BWD)[0].bonus_B

    return jax.lax.fori_loop(0, PASSES, once, state.root_B)


def memory(
    decoder: SpeculativeDecoder, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int
) -> dict[str, int | None]:
    """Bytes of weights and caches, and of temporaries as the compiled programs state them; the
    device's own peak.

    The device counts everything that the process did so far, for all systems; None where it does
    not count.
    """
    models, shapes, state = decoder.prefilled(prompt, sampling, max_new_tokens=max_new_tokens)

    def size(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    head = (
        models.draft_head
        if models.draft_head is not None and models.draft_head.ids_V is not None
        else None
    )
    tokens_BT = np.zeros((1, min(padded(len(prompt)), PREFILL_CHUNK)), np.int32)
    reading = read_prompt.lower(
        models, shapes, state, tokens_BT, np.int32(0), np.array([len(prompt)], np.int32), first=True
    )
    return {
        "target_weights": size(models.target),
        "draft_weights": size(models.draft) + size(head),
        "target_cache": size(state.target_cache),
        "draft_cache": size(state.draft_cache),
        "decode_temporaries": _temporaries(decode.lower(models, shapes, state, np.int32(1))),
        "prefill_temporaries": _temporaries(reading),
        "device_peak": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def _temporaries(lowered: jax.stages.Lowered) -> int | None:
    found = lowered.compile().memory_analysis()
    return None if found is None else int(found.temp_size_in_bytes)

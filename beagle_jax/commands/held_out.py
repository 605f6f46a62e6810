"""Acceptance of a trained draft on held-out chats, kept in its folder for `tune --quick`."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.data.loader import Batch, BatchLoader
from beagle_jax.data.state_records import apart
from beagle_jax.data.target_forward import states_in_memory
from beagle_jax.decoding.acceptance import LEVELS, Text, acceptance_in, in_batch, save_acceptance
from beagle_jax.decoding.drafter import Seen, State
from beagle_jax.decoding.kinds import TRAINED
from beagle_jax.decoding.trained import DraftHead, TrainedDrafter
from beagle_jax.model.precision import exact
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.weights.draft import Draft

_log = logging.getLogger(__name__)

_CHATS = 32  # held-out chats that are measured
_OWN_WORDS = 0.9  # share of an answer's tokens that are the target's most likely ones


def keep_acceptance(
    folder: Path, draft: Draft, frozen: FrozenTarget, held_out: BatchLoader
) -> None:
    """Measures a draft on held-out chats, and writes the figures to its folder.

    Nothing is written if the answers are not the target's own, greedy words, as `generate` would
    write them; a line in the log says so.

    frozen: on this process.
    """
    batch = _with_states(next(held_out.samples(1, _CHATS * held_out.row_tokens)), frozen, draft)
    drafter = _drafter(draft, frozen)
    texts, right, count = [], 0, 0
    for line in range(len(batch.tokens_BL)):
        roots = _roots(batch, line)
        if not len(roots):
            continue
        own = _own_words(batch, line, roots, frozen, draft)
        right, count = right + int(own.sum()), count + len(own)
        texts.append(_text(drafter, batch, line, roots))
    if not count or right < _OWN_WORDS * count:
        _log.info(
            "acceptance is not kept for tune --quick: the held-out answers are "
            + ("too short" if not count else "not those that the target writes greedily")
        )
        return
    described = f"{len(texts)} held-out chats of the training data"
    save_acceptance(folder, acceptance_in(drafter, texts, described), draft.fingerprint)
    _log.info(f"acceptance is kept in {folder} for tune --quick")


def _with_states(batch: Batch, frozen: FrozenTarget, draft: Draft) -> Batch:
    """Returns the batch with the target's states, computed now if they are not on disk."""
    if batch.inputs_BLI is not None:
        return batch
    assert frozen.model is not None and frozen.spec is not None  # states are computed online
    taps = draft.spec.taps
    of_batch = (frozen.model, frozen.spec, batch.tokens_BL, batch.length_BC, taps)
    inputs_BLI, targets_BLD = apart(states_in_memory(*of_batch), taps)
    return batch._replace(inputs_BLI=inputs_BLI, targets_BLD=targets_BLD)


def _drafter(draft: Draft, frozen: FrozenTarget) -> TrainedDrafter:
    """Returns the drafter of a draft with the frozen parts that training reads."""
    params = {name: jnp.asarray(array) for name, array in draft.params.items()}
    params = {name: array.astype(frozen.embed_VD.dtype) for name, array in params.items()}
    embed_VD = draft.spec.embedding(params, frozen.embed_VD)
    head = DraftHead(draft.spec.head(params, frozen.head_VD), draft.hot_ids)
    return TRAINED[draft.spec.kind](draft.spec, params, embed_VD, head)


def _roots(batch: Batch, line: int) -> np.ndarray:
    """Returns positions of answers with enough text of the answer after them."""
    length, first = int(batch.length_BC[line, 0]), int(batch.first_BC[line, 0])
    counted_L = np.zeros(length + 1, bool)
    at = first + np.flatnonzero(batch.counted_BT[line])
    counted_L[at[at < length]] = True
    places = np.arange(first, length - max(LEVELS))
    return places[counted_L[places[:, None] + np.arange(max(LEVELS))].all(axis=1)]


def _own_words(
    batch: Batch, line: int, roots: np.ndarray, frozen: FrozenTarget, draft: Draft
) -> np.ndarray:
    """Returns whether the token after each root is the target's own, of those the draft scores."""
    assert batch.predicted_BLD is not None
    states_MD = jnp.asarray(batch.predicted_BLD[line, roots], frozen.head_VD.dtype)
    best_M = np.asarray((states_MD @ frozen.head_VD.T).argmax(axis=-1))
    next_M = np.asarray(batch.tokens_BL[line, roots + 1])
    if draft.hot_ids is None:
        return best_M == next_M
    ids_V = np.asarray(draft.hot_ids)
    return (ids_V[best_M] == next_M)[np.isin(next_M, ids_V)]


def _text(drafter: TrainedDrafter, batch: Batch, line: int, roots: np.ndarray) -> Text:
    """Lets the drafter read one chat."""
    assert batch.inputs_BLI is not None
    token_BL = jnp.asarray(batch.tokens_BL[line : line + 1])
    input_BLI = jnp.asarray(batch.inputs_BLI[line : line + 1], drafter.embed_VD.dtype)
    state = _observed(drafter, token_BL, input_BLI)
    return Text(in_batch(state), input_BLI, np.asarray(token_BL), roots)


@jax.jit
@exact
def _observed(drafter: TrainedDrafter, token_BL: jax.Array, input_BLI: jax.Array) -> State:
    """Returns the drafter's state after whole texts."""
    B, L = token_BL.shape
    next_BL, start_B = jnp.roll(token_BL, -1, axis=1), jnp.zeros(B, jnp.int32)
    seen = Seen(input_BLI, token_BL, next_BL, start_B, jnp.full(B, L))
    return drafter.observe(drafter.init(B, L), seen)

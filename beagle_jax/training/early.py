"""The early stage: every position predicts from the context of its window's start (method.md section 3)."""

import jax

from beagle_jax.model.beagle import BeagleBlock, DraftSpec
from beagle_jax.model.masks import early_block_mask


def early_states(
    params: dict[str, jax.Array],
    spec: DraftSpec,
    e_BTD: jax.Array,
    h_BLD: jax.Array,
    length_B: jax.Array,
    first_B: jax.Array,
    *,
    window: int,
    offset: jax.Array,
) -> jax.Array:
    """Predicted states [B, T, D]; the query at window offset r looks r + 1 tokens ahead (method.md 3.1).

    e_BTD: embeddings of the T tokens from position first_B on; windows are counted from there.
    h_BLD: true states of the whole row, with the training noise if any; they serve as keys and values only.
    """
    mask_BTL = early_block_mask(length_B, h_BLD.shape[1], window, offset, first_B, e_BTD.shape[1])
    return BeagleBlock(spec).apply({"params": params}, e_BTD, h_BLD, mask_BTL, first_B)

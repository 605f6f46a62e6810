"""The early stage: every position predicts from the context of its window's start (method.md section 3)."""

import jax

from beagle_jax.model.beagle import BeagleBlock, DraftSpec
from beagle_jax.model.masks import early_block_mask


def early_states(
    params: dict[str, jax.Array],
    spec: DraftSpec,
    e_BLD: jax.Array,
    h_BLD: jax.Array,
    length_B: jax.Array,
    *,
    window: int,
    offset: jax.Array,
) -> jax.Array:
    """Predicted states [B, L, D]; the query at window offset r looks r + 1 tokens ahead (method.md 3.1).

    h_BLD: true states, with the training noise if any; they serve as keys and values only.
    """
    mask_BLL = early_block_mask(length_B, e_BLD.shape[1], window, offset)
    return BeagleBlock(spec).apply({"params": params}, e_BLD, h_BLD, mask_BLL)

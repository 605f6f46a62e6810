"""The early stage: every position predicts from the context of its window's start (method.md
section 3).
"""

import jax

from beagle_jax.model.beagle import BeagleBlock, DraftSpec
from beagle_jax.model.masks import early_block_mask
from beagle_jax.model.packing import places, queries


def early_states(
    params: dict[str, jax.Array],
    spec: DraftSpec,
    e_BTD: jax.Array,
    h_BLD: jax.Array,
    length_BC: jax.Array,
    first_BC: jax.Array,
    *,
    window: int,
    offset: jax.Array,
) -> jax.Array:
    """Predicted states [B, T, D]; the query at window offset r looks r + 1 tokens ahead (method.md
    3.1).

    e_BTD: embeddings of the row's queries, each chat's from position first_BC on
    (model/packing.py); windows are counted from there. h_BLD: true states of the whole row, with
    the training noise if any; they serve as keys and values only.
    """
    L, T = h_BLD.shape[1], e_BTD.shape[1]
    mask_BTL = early_block_mask(length_BC, L, window, offset, first_BC, T)
    at_BT, at_BL = queries(T, length_BC, first_BC).position_BT, places(L, length_BC).place_BX
    return BeagleBlock(spec).apply({"params": params}, e_BTD, h_BLD, mask_BTL, at_BT, at_BL)

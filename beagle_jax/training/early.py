"""Early stage: positions predict from the context at their window's start (method.md 3)."""

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray
from beagle_jax.config import StageConfig
from beagle_jax.model.attention import merge_attention, partial_attention
from beagle_jax.model.draft import LayerSpec
from beagle_jax.model.kinds import block_of
from beagle_jax.model.masks import early_block_mask, window_start
from beagle_jax.model.packing import of_row, places, queries
from beagle_jax.training.objective import Inputs, Objective, Prediction, layer_flops
from beagle_jax.training.positions import WHOLE, Positions


def early_states(
    params: dict[str, jax.Array],
    spec: LayerSpec,
    e_BTD: jax.Array,
    h_BLI: jax.Array,
    length_BC: AnyArray,
    first_BC: AnyArray,
    *,
    window: int,
    offset: jax.Array,
    positions: Positions = WHOLE,
) -> jax.Array:
    """Predicts states [B, T, D] from the true states before each window (method.md 3.1).

    The query at window offset r predicts r + 1 tokens ahead.

    e_BTD: embeddings of the row's queries. The queries of a chat start at position first_BC
    (model/packing.py); windows are counted from that position. h_BLI: true states of the whole row,
    with the training noise if any; used as keys and values only. positions: with parts, e_BTD and
    h_BLI are those of this device's part of the row.
    """
    block, own = block_of(spec).bind({"params": params}), positions.own
    L, T = (x.shape[1] * positions.parts for x in (h_BLI, e_BTD))
    mask_BTL = early_block_mask(length_BC, L, window, offset, first_BC, T, own)
    rows = positions.keys(block, h_BLI, places(L, length_BC).place_BX)
    q_BKGTH = block.queries(e_BTD, own(queries(T, length_BC, first_BC).position_BT))
    attended = merge_attention(partial_attention(q_BKGTH, *rows, mask_BTL[:, None, None]))
    return positions.predict(block, e_BTD, attended)


def predict_early(
    params: dict[str, jax.Array], spec: LayerSpec, stage: StageConfig, of: Inputs, offset: jax.Array
) -> Prediction:
    """Predicts every query once, with weight 1 (method.md 3.2)."""
    B, T = of.slot_BT.shape
    own, width = of.positions.own, of.positions.rounded(T)
    query_BT = own(jnp.broadcast_to(jnp.arange(width), (B, width)))
    place_BT = own(queries(width, of.length_BC, of.first_BC).place_BT)
    e_BTD = of.embedded(of_row(of.tokens_BL, of_row(of.slot_BT, query_BT)))
    state_BTD = early_states(
        params,
        spec,
        e_BTD,
        of.h_BLI,
        of.length_BC,
        of.first_BC,
        window=stage.window,
        offset=offset,
        positions=of.positions,
    )
    group_BT = place_BT - window_start(place_BT, stage.window, offset)
    weight_T = jnp.ones(query_BT.shape[1])
    return Prediction(state_BTD, query_BT, query_BT < T, group_BT, weight_T, stage.window)


def early_flops(spec: LayerSpec, stage: StageConfig, vocab: int, L: int, T: int) -> float:
    """Counts the operations of one row (`Objective.flops`).

    True states have no gradient (method.md 3).
    """
    KH = spec.num_kv_heads * spec.head_dim
    return layer_flops(spec, vocab, L, T, T) + 2 * L * 2 * 2 * spec.input_width * KH


EARLY = Objective(predict_early, early_flops)

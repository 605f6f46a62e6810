"""Predictions of a batch beside the target's states that they are compared with.

With `mesh.sequence`, each device predicts its part of the positions of its rows
(training/positions.py). The rest of a step works on predictions alone, in any order.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from beagle_jax.arrays import AnyArray
from beagle_jax.config import StageConfig
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.packing import of_row, queries
from beagle_jax.model.target import embed
from beagle_jax.sharding import row_parts, rows, sequence_parts
from beagle_jax.training.objective import Inputs, Objective
from beagle_jax.training.per_device import over_positions
from beagle_jax.training.positions import Positions

# Positions of a device whose activations are in memory at once with `train.remat`.
AT_ONCE = 2048


class RowArrays(NamedTuple):
    """Arrays by row that a stage predicts from, beside the draft's inputs."""

    tokens_BL: AnyArray
    true_BLD: jax.Array  # the states that the draft predicts
    counted_BT: jax.Array
    length_BC: AnyArray
    first_BC: AnyArray


class Predicted(NamedTuple):
    """M predictions, each with the target's state that it is compared with."""

    state_MD: jax.Array
    true_MD: jax.Array
    counted_M: jax.Array  # bool: the prediction enters the loss
    weight_M: jax.Array  # float32: beta
    group_MJ: jax.Array  # bool: the prediction's window offset or draft step


def predicted(
    params: dict[str, jax.Array],
    spec: DraftSpec,
    stage: StageConfig,
    objective: Objective,
    embed_VD: jax.Array,
    h_BLI: jax.Array,
    of_rows: RowArrays,
    offset: jax.Array,
    *,
    remat: bool,
    mesh: Mesh,
) -> Predicted:
    """Predicts all positions of a batch.

    embed_VD: the embedding that the draft reads. h_BLI: the draft's inputs, with the noise if any,
    in the dtype of the computation. remat: compute wide activations twice (`train.remat`).
    """
    of_device = len(of_rows.tokens_BL) // row_parts(mesh)
    at_once = max(1, AT_ONCE // max(of_device, 1)) if remat else None
    if sequence_parts(mesh) == 1 and not remat:
        where = rows(mesh)

        def by_row(x_BXD: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(x_BXD, where)

        of = (params, spec, stage, objective, embed_VD, h_BLI, of_rows, offset)
        return _of_positions(Positions(), by_row, *of)

    def on_device(
        index: jax.Array, join: Callable, shared: tuple, of_rows: RowArrays, h_BLI: jax.Array
    ) -> Predicted:
        params, embed_VD, offset = shared
        own = Positions(sequence_parts(mesh), index, join, at_once)
        of = (params, spec, stage, objective, embed_VD, h_BLI, of_rows, offset)
        return _of_positions(own, lambda x_BXD: x_BXD, *of)

    # XLA alone would exchange the gradients of weights once for each chunk of positions.
    return over_positions(on_device, mesh)((params, embed_VD, offset), of_rows, h_BLI)


def _of_positions(
    positions: Positions,
    placed: Callable[[jax.Array], jax.Array],
    params: dict[str, jax.Array],
    spec: DraftSpec,
    stage: StageConfig,
    objective: Objective,
    embed_VD: jax.Array,
    h_BLI: jax.Array,
    of_rows: RowArrays,
    offset: jax.Array,
) -> Predicted:
    """Predicts these positions. placed: splits embeddings over the devices."""
    counted_BT = of_rows.counted_BT
    slot_BT = queries(counted_BT.shape[1], of_rows.length_BC, of_rows.first_BC).slot_BT

    def embedded(tokens_BX: jax.Array) -> jax.Array:
        return placed(embed(embed_VD, tokens_BX, spec.embed_scale).astype(h_BLI.dtype))

    inputs = Inputs(
        jnp.asarray(of_rows.tokens_BL),
        h_BLI,
        of_rows.length_BC,
        of_rows.first_BC,
        slot_BT,
        embedded,
        positions,
    )
    out = objective.predict(params, spec, stage, inputs, offset)
    counted_BY = of_row(counted_BT, out.query_BY) & out.inside_BY
    true_BYD = of_row(of_rows.true_BLD, of_row(slot_BT, out.query_BY))
    return Predicted(
        out.state_BYD.reshape(-1, out.state_BYD.shape[-1]),
        true_BYD.reshape(-1, true_BYD.shape[-1]),
        counted_BY.reshape(-1),
        jnp.broadcast_to(out.weight_Y, counted_BY.shape).reshape(-1),
        jax.nn.one_hot(out.group_BY.reshape(-1), out.groups, dtype=bool),
    )

"""Training objective of a stage: its predictions, its loss terms and its cost."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray
from beagle_jax.config import StageConfig
from beagle_jax.model.draft import LayerSpec
from beagle_jax.training.losses import Terms, distribution_and_state
from beagle_jax.training.positions import WHOLE, Positions


class Inputs(NamedTuple):
    """Inputs of a stage: rows of L positions, T of which are queries (model/packing.py)."""

    tokens_BL: jax.Array
    # the draft's inputs from the target, with the training noise if any; only this device's part of
    # L if devices share a row
    h_BLI: jax.Array
    length_BC: AnyArray
    first_BC: AnyArray
    slot_BT: jax.Array  # index of each query within the row
    embedded: Callable[[jax.Array], jax.Array]  # the target's embeddings [B, X, D] of tokens [B, X]
    positions: Positions = WHOLE  # which of a row this device predicts, and how many at once


class Prediction(NamedTuple):
    """Y predictions per row, each for one of its T queries; all stages share this form."""

    state_BYD: jax.Array
    query_BY: jax.Array  # index of the query
    # False where a window extends past the chat's last query (EAGLE: also at position 0)
    inside_BY: jax.Array
    group_BY: jax.Array  # window offset or draft step
    weight_Y: jax.Array  # beta
    groups: int  # number of groups


@dataclass(frozen=True)
class Objective:
    """One way to train one kind of draft. `training/kinds.py` lists all of them."""

    # (params, spec, stage, Inputs, window offset) -> Prediction
    predict: Callable[..., Prediction]
    # (spec, stage, number of tokens that the draft scores, L, T) -> operations of the matrix
    # products of a row with L states and T queries that all enter the loss
    flops: Callable[[Any, StageConfig, int, int, int], float]
    # (Outputs, settings, mesh) -> Terms
    terms: Callable[..., Terms] = distribution_and_state
    # A position enters the loss only if the draft scores the target's most likely token there.
    only_scored: bool = False


def by_step(
    stage: StageConfig,
    state_BUJD: jax.Array,
    query_BUJ: jax.Array,
    inside_BUJ: jax.Array,
    step_J: jax.Array,
) -> Prediction:
    """Flattens J predictions of each of U simulated drafts and weights them by draft step.

    The weights are `stage.weights` (method.md 4.2, 14).
    """
    B, U, J = query_BUJ.shape
    beta_J = jnp.asarray(stage.weights, jnp.float32)[step_J]
    group_BY = jnp.broadcast_to(jnp.tile(step_J, U), (B, U * J))

    def flat(x_BUJ: jax.Array) -> jax.Array:
        return x_BUJ.reshape(B, U * J, *x_BUJ.shape[3:])

    return Prediction(
        flat(state_BUJD),
        flat(query_BUJ),
        flat(inside_BUJ),
        group_BY,
        jnp.tile(beta_J, U),
        stage.simulation_steps,
    )


def layer_flops(spec: LayerSpec, vocab: int, L: int, queries: int, outputs: int) -> float:
    """Counts the operations of a layer's matrix products, except those for keys and values.

    A product with gradients for both factors costs three times its forward pass. So does a position
    of the loss, which takes three products with the head (training/losses.py). L: number of keys
    that each query attends to.
    """
    D, F, NH = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    per_query, per_output = 3 * 2 * (D * NH + 2 * L * NH), 3 * 2 * (D * NH + 3 * D * F + D * vocab)
    return queries * per_query + outputs * per_output


def reading_cost(stage: StageConfig) -> int:
    """Passes per product with predicted states: two without their gradient, else three."""
    return 2 if stage.detach else 3

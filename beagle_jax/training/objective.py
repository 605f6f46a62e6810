"""What a stage of training is made of: what it predicts, what it minimises, what that costs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.config import StageConfig
from beagle_jax.model.draft import LayerSpec
from beagle_jax.training.losses import Terms, distribution_and_state


class Inputs(NamedTuple):
    """What a stage predicts from: rows of L places, of which T are queried (model/packing.py)."""

    tokens_BL: jax.Array
    h_BLI: jax.Array  # what the draft reads of the target, with the training noise if any
    length_BC: jax.Array
    first_BC: jax.Array
    slot_BT: jax.Array  # place of each query
    embedded: Callable[[jax.Array], jax.Array]  # the target's embeddings [B, X, D] of tokens [B, X]


class Prediction(NamedTuple):
    """N predictions a row, each for one of its T queries, in the form that all stages share."""

    state_BND: jax.Array
    query_BN: jax.Array  # which query
    # False where a window hangs over the chat's last query (EAGLE: and at position 0)
    inside_BN: jax.Array
    group_BN: jax.Array  # window offset or draft step
    weight_N: jax.Array  # beta
    groups: int  # how many there are


@dataclass(frozen=True)
class Objective:
    """One way to train one kind of draft. training/kinds.py lists all of them."""

    # (params, spec, stage, Inputs, offset of the windows) -> Prediction
    predict: Callable[..., Prediction]
    # (spec, stage, tokens that the draft scores, L, T) -> operations of the matrix products of a
    # row of L states and T queries that all count
    flops: Callable[[Any, StageConfig, int, int, int], float]
    # (Outputs, settings, mesh) -> Terms
    terms: Callable[..., Terms] = distribution_and_state


def by_step(
    stage: StageConfig,
    state_BUJD: jax.Array,
    query_BUJ: jax.Array,
    inside_BUJ: jax.Array,
    step_J: jax.Array,
) -> Prediction:
    """Predictions of U simulated drafts, J of each, weighted by the draft step that they are of.

    The weights are those of the stage, s, s - 1, .., 1 unless given (method.md 4.2).
    """
    B, U, J = query_BUJ.shape
    weights = stage.step_weights or range(stage.simulation_steps, 0, -1)
    beta_J = jnp.asarray(weights, jnp.float32)[step_J]
    group_BN = jnp.broadcast_to(jnp.tile(step_J, U), (B, U * J))

    def flat(x_BUJ: jax.Array) -> jax.Array:
        return x_BUJ.reshape(B, U * J, *x_BUJ.shape[3:])

    return Prediction(
        flat(state_BUJD),
        flat(query_BUJ),
        flat(inside_BUJ),
        group_BN,
        jnp.tile(beta_J, U),
        stage.simulation_steps,
    )


def layer_flops(spec: LayerSpec, vocab: int, L: int, queries: int, outputs: int) -> float:
    """Operations of a layer's matrix products but those that make keys and values.

    A product that is differentiated in both factors costs three times its forward pass; so does a
    row of the loss with its three products with the head (training/losses.py). L: keys that each
    query is compared with.
    """
    D, F, NH = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
    per_query, per_output = 3 * 2 * (D * NH + 2 * L * NH), 3 * 2 * (D * NH + 3 * D * F + D * vocab)
    return queries * per_query + outputs * per_output


def reading_cost(stage: StageConfig) -> int:
    """Passes of a product with predicted states: two without their gradient, else three."""
    return 2 if stage.detach else 3

"""The stages of the EAGLE-3 draft (method.md 14).

Training-time test is EAGLE's (eagle.py): column j of its step t is the draft step t of the query
that reads token x_{j+1} first, and sees the true entries up to its own and its own later ones. What
differs is the loss: the distribution alone, over the draft's vocabulary, through the draft's own
norm and head, and only where the target's most likely token is in that vocabulary. The sum is
divided by the number of supervised positions that are counted, as everywhere here; the authors
divide by all positions of the batch, masked and padded ones too.
"""

import jax.numpy as jnp
from jax.sharding import Mesh

from beagle_jax.config import StageConfig, TrainConfig
from beagle_jax.model.eagle3 import Eagle3Spec
from beagle_jax.training.eagle import predict_eagle
from beagle_jax.training.losses import Outputs, Terms, distribution_loss
from beagle_jax.training.objective import Objective, reading_cost
from beagle_jax.training.own_head import own_head_loss


def distribution_alone(outputs: Outputs, config: TrainConfig, mesh: Mesh) -> Terms:
    """ploss without smooth-L1, through the head of the draft or the target's rows."""
    state_MD, true_MD, counted_M = outputs.normed_MD, outputs.true_MD, outputs.counted_M
    settings = (counted_M, config.loss, config.loss_rows, mesh)
    if outputs.draft_head_VD is outputs.head_VD:
        ploss_M, rank_M = distribution_loss(state_MD, true_MD, outputs.head_VD, *settings)
    else:
        heads = (outputs.draft_head_VD, true_MD, outputs.head_VD)
        ploss_M, rank_M = own_head_loss(state_MD, *heads, *settings)
    return Terms(ploss_M, jnp.zeros_like(ploss_M), ploss_M, rank_M)


def eagle3_flops(spec: Eagle3Spec, stage: StageConfig, vocab: int, L: int, T: int) -> float:
    """Counts the operations of one row (`Objective.flops`).

    A product with gradients for both factors costs three times its forward pass; that of the true
    states with fc has a gradient for fc alone. A position of the loss takes four products with the
    draft's head, and two with the target's.
    """
    d, F, D = spec.hidden_size, spec.intermediate_size, spec.target_hidden_size
    NH, KH = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    queries, predicted = T * stage.simulation_steps, T * (stage.simulation_steps - 1)
    with_heads = 4 * d + 2 * D if spec.own_head else 3 * d
    return (
        queries * 2 * (3 * (2 * d * NH + 2 * L * NH + d * NH + 3 * d * F) + with_heads * vocab)
        + (3 * L + reading_cost(stage) * predicted) * 2 * 2 * 2 * d * KH
        + 2 * L * 2 * d * D * len(spec.taps)
    )


TEST_TIME = Objective(predict_eagle, eagle3_flops, distribution_alone, only_scored=True)

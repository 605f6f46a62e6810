"""Both stages of the EAGLE draft (method.md section 8): the early one is the late one with a single
step.

What is learned is Beagle's, position for position: the prediction for position i is the state h_i,
through the head the distribution of the token after x_i, and it counts where x_i is supervised.
EAGLE's input for it is the entry (x_i, h_{i-1}), which stands at position i - 1 and sees the
entries up to itself: the tokens up to x_i and the states before it. So the same positions are
scored, and only position 0, which has no state before it, has no prediction. EAGLE's loss, 0.1
ploss + vloss, is a tenth of ours with its vloss_weight of 10.

The late stage is training-time test, as HASS has it: from every position s draft steps, the first
from the true state before it, the others from the step before. A step's queries are new, as they
are made of the newest states; its keys are those of the true entries up to where the draft began,
and of the entries that this draft has made itself, which over all positions are diagonals. Every
step costs about what the early stage does; Beagle's late stage costs as much for all its steps
(late.py).
"""

import jax
import jax.numpy as jnp

from beagle_jax.config import StageConfig
from beagle_jax.model.cache import KVRows
from beagle_jax.model.eagle import EagleBlock, EagleSpec
from beagle_jax.model.layers import PartialAttention, merge_attention, partial_attention
from beagle_jax.model.masks import keys_before
from beagle_jax.model.packing import of_row, places, queries
from beagle_jax.training.late import window_queries
from beagle_jax.training.objective import (
    Inputs,
    Objective,
    Prediction,
    by_step,
    layer_flops,
    reading_cost,
)


def eagle_states(
    params: dict[str, jax.Array],
    spec: EagleSpec,
    e_BLD: jax.Array,
    h_BLD: jax.Array,
    length_BC: jax.Array,
    first_BC: jax.Array,
    *,
    count: int,
    steps: int,
    detach: bool,
) -> jax.Array:
    """Predicted states [B, T, J, D]: those j positions after query t, by draft step j (0-based) of
    a draft that began there.

    e_BLD, h_BLD: embeddings and true states of whole rows, with the training noise if any. count:
    T, queries of each row (model/packing.py). detach: cut the gradient through predicted states
    where later steps read them. What is past the chat's end, and what begins at position 0, means
    nothing.
    """
    block = EagleBlock(spec).bind({"params": params})
    L = e_BLD.shape[1]
    # Entry j of the row: the token at j + 1 and the state at j. A draft that begins at position i
    # begins with entry i - 1.
    true_BED = block.fuse(e_BLD[:, 1:], h_BLD[:, :-1].astype(e_BLD.dtype))  # noise is float32
    true_rows = block.keys_values(true_BED, places(L - 1, length_BC).place_BX)
    asked = queries(count, length_BC, first_BC)
    sees_BTE = keys_before(asked.chat_BT, asked.position_BT, length_BC, L - 1)
    f_BTD = of_row(true_BED, asked.slot_BT - 1)
    own: list[KVRows] = []
    states = []
    for step in range(steps):
        with jax.named_scope(f"simulate_{step + 1}"):
            entry_BT = asked.position_BT - 1 + step
            if step:
                read_BTD = jax.lax.stop_gradient(states[-1]) if detach else states[-1]
                f_BTD = block.fuse(of_row(e_BLD, asked.slot_BT + step), read_BTD)
                own.append(block.keys_values(f_BTD, entry_BT))
            q_BKGTH = block.queries(f_BTD, entry_BT)
            seen = [
                partial_attention(q_BKGTH, *true_rows, sees_BTE[:, None, None]),
                *(_own_key(q_BKGTH, rows) for rows in own),
            ]
            states.append(block.predict(f_BTD, merge_attention(*seen)))
    return jnp.stack(states, axis=2)


def _own_key(q_BKGTH: jax.Array, rows: KVRows) -> PartialAttention:
    """Attention of each query to the one key of these that its own draft has made, the diagonal of
    the T x T scores.
    """
    score_BKGT = (
        jnp.einsum("BKGTH,BKHT->BKGT", q_BKGTH, rows.k_BKHS, preferred_element_type=jnp.float32)
        * q_BKGTH.shape[-1] ** -0.5
    )
    value_BKGTH = jnp.broadcast_to(rows.v_BKSH[:, :, None], q_BKGTH.shape).astype(jnp.float32)
    return PartialAttention(value_BKGTH, score_BKGT, jnp.ones_like(score_BKGT))


def predict_eagle(params, spec: EagleSpec, stage: StageConfig, of: Inputs, offset) -> Prediction:
    """Draft steps 1..s from each query, one in the early stage (method.md 8).

    Keys are made of tokens too, so whole rows are embedded. The offset of windows has no meaning.
    """
    steps, count, e_BLD = stage.simulation_steps, of.slot_BT.shape[1], of.embedded(of.tokens_BL)
    state_BTJD = eagle_states(
        params,
        spec,
        e_BLD,
        of.h_BLI,
        of.length_BC,
        of.first_BC,
        count=count,
        steps=steps,
        detach=stage.detach,
    )
    at = window_queries(of.length_BC - of.first_BC, count, 1, steps, 0)
    after_a_state_BT = queries(count, of.length_BC, of.first_BC).position_BT > 0
    return by_step(
        stage,
        state_BTJD,
        at.query_BUJ,
        at.valid_BUJ & after_a_state_BT[..., None],
        jnp.arange(steps),
    )


def eagle_flops(spec: EagleSpec, stage: StageConfig, vocab: int, L: int, T: int) -> float:
    """Operations of one row (`Objective.flops`).

    Entries are fused of a token and a state, and keys are made of entries, which have gradients.
    """
    D, KH = spec.hidden_size, spec.num_kv_heads * spec.head_dim
    predicted = T * (stage.simulation_steps - 1)  # states that later steps read
    queries = T * stage.simulation_steps
    return (
        layer_flops(spec, vocab, L, queries, queries)
        + (2 * L + reading_cost(stage) * predicted) * 2 * 2 * D * D
        + (L + predicted) * 3 * 2 * 2 * D * KH
    )


TEST_TIME = Objective(predict_eagle, eagle_flops)

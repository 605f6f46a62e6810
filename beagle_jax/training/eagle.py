"""Both stages of the EAGLE draft (method.md section 8).

The early stage is the late stage with a single draft step. EAGLE learns the same predictions as
Beagle, position by position. The prediction for position i is the state h_i. The head maps it to
the distribution of the token after x_i, and it enters the loss where x_i is supervised. EAGLE's
input for it is the entry (x_i, h_{i-1}) at position i - 1. This entry attends to all entries up to
itself, that is to the tokens up to x_i and the states before x_i. Both kinds therefore score the
same positions, except position 0, which has no previous state and no prediction. EAGLE's loss, 0.1
ploss + vloss, is a tenth of ours with its vloss_weight of 10.

The late stage is training-time test as in HASS. It simulates s draft steps from every position: the
first step reads the true state before the position, each later step the state predicted by the
previous step. Each step computes new queries, because they depend on the newest states. Its keys
are the true entries up to the start of the draft and the entries that the same draft has predicted;
over all positions, the latter are diagonals of the score matrix. Each step costs about as much as
the early stage, whereas Beagle's late stage costs that much for all its steps together (late.py).
"""

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray
from beagle_jax.config import StageConfig
from beagle_jax.model.attention import PartialAttention, merge_attention, partial_attention
from beagle_jax.model.cache import KVRows
from beagle_jax.model.draft import LayerSpec
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.model.kinds import block_of
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
from beagle_jax.training.positions import WHOLE, Positions


def eagle_states(
    params: dict[str, jax.Array],
    spec: LayerSpec,
    e_BLD: jax.Array,
    h_BLI: jax.Array,
    length_BC: AnyArray,
    first_BC: AnyArray,
    *,
    count: int,
    steps: int,
    detach: bool,
    positions: Positions = WHOLE,
) -> jax.Array:
    """Predicts states [B, T, J, D] by simulating a draft from each query.

    Entry [b, t, j] is the state j positions after query t, predicted by draft step j (0-based) of
    the draft that starts at t. Entries past the end of a chat and entries of a draft that starts at
    position 0 are undefined.

    The blocks of EAGLE and EAGLE-3 are drafted alike; they differ in what a true state gives to the
    first step, and a predicted one to the next (`EagleBlock.features`, `carried`).

    e_BLD, h_BLI: embeddings and true states, or streams, of whole rows, with the training noise if
    any. count: T, the number of queries of each row (model/packing.py). detach: stop the gradient
    where later steps read predicted states. positions: of whole rows.
    """
    block = block_of(spec).bind({"params": params})
    L = e_BLD.shape[1]
    # Entry j of the row holds the token at j + 1 and the state at j. A draft from position i
    # starts with entry i - 1.
    g_BSD = block.features(h_BLI[:, :-1].astype(e_BLD.dtype))  # noise is float32
    true_BSD = block.fuse(e_BLD[:, 1:], g_BSD)
    true_rows = block.keys_values(true_BSD, places(L - 1, length_BC).place_BX)
    query = queries(count, length_BC, first_BC)
    sees_BTS = keys_before(query.chat_BT, query.position_BT, length_BC, L - 1)
    f_BTD = of_row(true_BSD, query.slot_BT - 1)
    own: list[KVRows] = []
    states: list[jax.Array] = []
    for step in range(steps):
        with jax.named_scope(f"simulate_{step + 1}"):
            entry_BT = query.position_BT - 1 + step
            if step:
                read_BTD = block.carried(states[-1])
                read_BTD = jax.lax.stop_gradient(read_BTD) if detach else read_BTD
                f_BTD = block.fuse(of_row(e_BLD, query.slot_BT + step), read_BTD)
                own.append(block.keys_values(f_BTD, entry_BT))
            q_BKGTH = block.queries(f_BTD, entry_BT)
            seen = [
                partial_attention(q_BKGTH, *true_rows, sees_BTS[:, None, None]),
                *(_own_key(q_BKGTH, rows) for rows in own),
            ]
            states.append(positions.predict(block, f_BTD, merge_attention(*seen)))
    return jnp.stack(states, axis=2)


def _own_key(q_BKGTH: jax.Array, rows: KVRows) -> PartialAttention:
    """Attends from each query to the key that its own draft has predicted.

    These are the diagonal of the T x T scores.
    """
    score_BKGT = (
        jnp.einsum("BKGTH,BKHT->BKGT", q_BKGTH, rows.k_BKHS, preferred_element_type=jnp.float32)
        * q_BKGTH.shape[-1] ** -0.5
    )
    value_BKGTH = jnp.broadcast_to(rows.v_BKSH[:, :, None], q_BKGTH.shape).astype(jnp.float32)
    return PartialAttention(value_BKGTH, score_BKGT, jnp.ones_like(score_BKGT))


def predict_eagle(
    params: dict[str, jax.Array], spec: LayerSpec, stage: StageConfig, of: Inputs, offset: jax.Array
) -> Prediction:
    """Simulates draft steps 1..s from each query; the early stage has one step (method.md 8, 14).

    Embeds whole rows, because keys depend on tokens too. The window offset is not used.
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
        positions=of.positions,
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
    """Counts the operations of one row (`Objective.flops`).

    Each entry fuses a token with a state. Keys are computed from entries, which have gradients.
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

"""Late stage: simulates drafting during training, at about the early stage's cost.

The method is that of method.md 4.5b. The loss at step i covers only window offset i - 1, so each
query is needed at exactly one step, and true keys never change. Attention over true keys is
therefore computed once for all queries. Step i merges in the at most i - 1 predicted keys of the
query's own window (log-sum-exp merge), predicts, and appends one key per window.

The loss that the paper rejects (Fig. 12) also scores the offsets after i - 1 at step i, from the
same keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray
from beagle_jax.config import StageConfig
from beagle_jax.model.attention import PartialAttention, merge_attention, partial_attention
from beagle_jax.model.cache import append_rows
from beagle_jax.model.draft import LayerBlock, LayerSpec
from beagle_jax.model.kinds import block_of
from beagle_jax.model.masks import keys_before
from beagle_jax.model.packing import of_row, places
from beagle_jax.training.objective import (
    Inputs,
    Objective,
    Prediction,
    by_step,
    layer_flops,
    reading_cost,
)
from beagle_jax.training.positions import WHOLE, Positions


class LateStates(NamedTuple):
    """Predicted states of every window, J of each, and the queries that they belong to."""

    # window u, draft step j (0-based): the query at offset j, after j predicted keys
    state_BUJD: jax.Array
    query_BUJ: jax.Array  # index among the row's T queries, clipped to the last
    valid_BUJ: jax.Array  # False where the window extends past the chat's last query
    step_J: jax.Array  # draft step: j itself; with multi_token, several queries share a step


class Windows(NamedTuple):
    """Windows of each row; every row has U of them."""

    chat_BU: jax.Array
    place_BUJ: jax.Array  # index of each query within its chat
    query_BUJ: jax.Array  # index of each query within its row, clipped to the last
    valid_BUJ: jax.Array  # False where the window extends past the chat's last query


def window_queries(
    size_BC: AnyArray,
    width: int,
    window: int,
    steps: int,
    offset: jax.Array | int,
    positions: Positions = WHOLE,
) -> Windows:
    """Returns the first `steps` queries of each window.

    size_BC: number of queries of each chat. width: T, the largest number of queries in a row.
    positions: with parts, only this device's windows of each row are returned.

    Example: one chat of 8 queries, window 3, steps 2, offset 2 gives the queries
    [[2, 3], [5, 6], [7, 7]] with valid [[1, 1], [1, 1], [0, 0]].

    U is the worst case over offsets and chat lengths, so that the shape depends on neither.
    """
    count = positions.rounded((width + size_BC.shape[1] * (window - 1)) // window)
    chat_BU, number_BU = places(count, -(-jnp.maximum(size_BC - offset, 0) // window))
    place_BUJ = (offset + window * number_BU)[..., None] + jnp.arange(steps)[None, None]
    begin_BC = jnp.cumsum(size_BC, axis=1) - size_BC
    query_BUJ = of_row(begin_BC, chat_BU)[..., None] + place_BUJ
    valid_BUJ = (place_BUJ < of_row(size_BC, chat_BU)[..., None]) & (query_BUJ < width)
    every = Windows(chat_BU, place_BUJ, jnp.minimum(query_BUJ, width - 1), valid_BUJ)
    return positions.own(every)


def late_states(
    params: dict[str, jax.Array],
    spec: LayerSpec,
    e_BTD: jax.Array,
    h_BLI: jax.Array,
    length_BC: AnyArray,
    first_BC: AnyArray,
    *,
    window: int,
    steps: int,
    offset: jax.Array | int,
    detach: bool,
    multi_token: bool = False,
    positions: Positions = WHOLE,
) -> LateStates:
    """Simulates `steps` draft steps in every window of every row (method.md 4.1, 4.5b).

    e_BTD: embeddings of the row's queries. The queries of a chat start at position first_BC
    (model/packing.py); windows are counted from that position. h_BLI: true states of the whole row,
    with the training noise if any; used as keys and values only. detach: stop the gradient where
    later steps read predicted states (method.md 4.6). multi_token: step i predicts all offsets from
    i - 1 to the end of the window, instead of offset i - 1 alone (l = k in method.md 4.2).
    positions: with parts, h_BLI is this device's part of the row, e_BTD the whole row's, and only
    this device's windows are simulated.
    """
    block = block_of(spec).bind({"params": params})
    L, (_, T, D) = h_BLI.shape[1] * positions.parts, e_BTD.shape
    width = window if multi_token else steps
    at = window_queries(length_BC - first_BC, T, window, width, offset, positions)
    B, U, J = at.query_BUJ.shape
    true_rows = positions.keys(block, h_BLI, places(L, length_BC).place_BX)
    position_BUJ = of_row(first_BC, at.chat_BU)[..., None] + at.place_BUJ
    e_BUJD = of_row(e_BTD, at.query_BUJ)
    q_BKGTH = block.queries(e_BUJD.reshape(B, U * J, D), position_BUJ.reshape(B, U * J))
    chat_BT, start_BT = (
        jnp.repeat(x_BU, J, axis=1) for x_BU in (at.chat_BU, position_BUJ[:, :, 0])
    )
    mask_BTL = keys_before(chat_BT, start_BT, length_BC, L)
    on_true = partial_attention(q_BKGTH, *true_rows, mask_BTL[:, None, None])

    # Window offsets that each step predicts.
    spans = [range(step, J if multi_token else step + 1) for step in range(steps)]
    simulated = _Simulated(block, positions, q_BKGTH, on_true, e_BUJD, position_BUJ)
    states = simulated.states(spans, steps, detach)
    return _where_asked(jnp.concatenate(states, axis=2), at, spans)


class _Simulated(NamedTuple):
    """What the draft steps of a batch's windows read, computed before the first of them."""

    block: LayerBlock
    positions: Positions
    q_BKGTH: jax.Array  # queries of all windows, one after another
    on_true: PartialAttention  # their attention over true states
    e_BUJD: jax.Array
    position_BUJ: jax.Array

    def states(self, spans: list[range], steps: int, detach: bool) -> list[jax.Array]:
        """Returns the states [B, U, len(span), D] that each step predicts.

        spans: window offsets of each step. detach: as in `late_states`.
        """
        B, U, _, D = self.e_BUJD.shape
        states, memory = [], None
        for step, span in enumerate(spans):
            with jax.named_scope(f"simulate_{step + 1}"):
                seen = PartialAttention(*(_of_windows(part, U, span) for part in self.on_true))
                if memory is None:
                    attended = merge_attention(seen)
                else:
                    attended = merge_attention(
                        seen, partial_attention(_of_windows(self.q_BKGTH, U, span), *memory, True)
                    )
                e_BYD = self.e_BUJD[:, :, span.start : span.stop].reshape(B, U * len(span), D)
                state_BYD = self.positions.predict(self.block, e_BYD, _of_row(attended, U))
                states.append(state_BYD.reshape(B, U, len(span), D))
                if step + 1 < steps:  # the last state is never read (lazy append, method.md 6.2)
                    own_X1D = states[-1][:, :, :1].reshape(B * U, 1, D)
                    read_X1D = jax.lax.stop_gradient(own_X1D) if detach else own_X1D
                    at_X1 = self.position_BUJ[:, :, step].reshape(B * U, 1)
                    memory = append_rows(memory, self.block.keys_values(read_X1D, at_X1))
        return states


def _where_asked(state_BUJD: jax.Array, at: Windows, spans: list[range]) -> LateStates:
    """Joins states with their queries. spans: window offsets that each step predicts."""
    offset_J = jnp.array([offset for span in spans for offset in span])
    step_J = jnp.array([span.start for span in spans for _ in span])
    return LateStates(
        state_BUJD, at.query_BUJ[:, :, offset_J], at.valid_BUJ[:, :, offset_J], step_J
    )


def _of_windows(x_BKGT: jax.Array, U: int, span: range) -> jax.Array:
    """Moves windows to the batch axis: [B, K, G, U * J, ...] -> [B * U, K, G, T, ...].

    span: the T offsets of each window whose queries are selected.
    """
    B, K, G, _, *rest = x_BKGT.shape
    x_BKGUJ = x_BKGT.reshape(B, K, G, U, -1, *rest)[:, :, :, :, span.start : span.stop]
    return jnp.moveaxis(x_BKGUJ, 3, 1).reshape(B * U, K, G, len(span), *rest)


def _of_row(x_XKGTH: jax.Array, U: int) -> jax.Array:
    """Moves windows back: [B * U, K, G, T, H] -> [B, K, G, U * T, H]."""
    X, K, G, T, H = x_XKGTH.shape
    return jnp.moveaxis(x_XKGTH.reshape(-1, U, K, G, T, H), 1, 3).reshape(X // U, K, G, U * T, H)


def predict_late(
    params: dict[str, jax.Array], spec: LayerSpec, stage: StageConfig, of: Inputs, offset: jax.Array
) -> Prediction:
    """Predicts draft steps 1..s of every window (method.md 4.2)."""
    return _predict_windows(params, spec, stage, of, stage.window, offset)


def predict_dense(
    params: dict[str, jax.Array], spec: LayerSpec, stage: StageConfig, of: Inputs, offset: jax.Array
) -> Prediction:
    """Predicts draft steps 1..s from every position; most positions are predicted s times."""
    return _predict_windows(params, spec, stage, of, 1, 0)


def _predict_windows(
    params: dict[str, jax.Array],
    spec: LayerSpec,
    stage: StageConfig,
    of: Inputs,
    window: int,
    offset: jax.Array | int,
) -> Prediction:
    late = late_states(
        params,
        spec,
        of.embedded(of_row(of.tokens_BL, of.slot_BT)),
        of.h_BLI,
        of.length_BC,
        of.first_BC,
        window=window,
        steps=stage.simulation_steps,
        offset=offset,
        detach=stage.detach,
        multi_token=stage.multi_token,
        positions=of.positions,
    )
    return by_step(stage, *late)


def late_flops(spec: LayerSpec, stage: StageConfig, vocab: int, L: int, T: int) -> float:
    """Counts the operations of one row (`Objective.flops`; method.md 4.5b)."""
    drafts, steps, window = -(-T // stage.window), stage.simulation_steps, stage.window
    if stage.multi_token:
        outputs = drafts * sum(range(window, window - steps, -1))
        return _simulated_flops(spec, stage, vocab, L, drafts, drafts * window, outputs)
    return _simulated_flops(spec, stage, vocab, L, drafts, drafts * steps, drafts * steps)


def dense_flops(spec: LayerSpec, stage: StageConfig, vocab: int, L: int, T: int) -> float:
    """Counts the operations of one row (`Objective.flops`)."""
    queries = T * stage.simulation_steps
    return _simulated_flops(spec, stage, vocab, L, T, queries, queries)


def _simulated_flops(
    spec: LayerSpec, stage: StageConfig, vocab: int, L: int, drafts: int, queries: int, outputs: int
) -> float:
    """Counts the operations of `drafts` drafts over one row.

    Keys are computed from L true states and from the predicted states that later steps read.
    """
    predicted = drafts * (stage.simulation_steps - 1)
    passes = reading_cost(stage) * predicted
    D, KH = spec.hidden_size, spec.num_kv_heads * spec.head_dim
    products = 2 * L * spec.input_width + passes * D
    return layer_flops(spec, vocab, L, queries, outputs) + products * 2 * 2 * KH


LATE = Objective(predict_late, late_flops)
DENSE = Objective(predict_dense, dense_flops)

"""The late stage: drafting simulated inside training, at about the early stage's cost (method.md 4.5b).

With the loss at step i only on window offset i - 1, each query is needed at exactly one step, and true keys never
change. So attention over true keys is computed once for all queries; step i adds the at most i - 1 predicted keys
of the query's own window through the log-sum-exp merge, predicts, and appends one key per window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.model.beagle import BeagleBlock, DraftSpec
from beagle_jax.model.cache import append_rows
from beagle_jax.model.layers import PartialAttention, merge_attention, partial_attention
from beagle_jax.model.masks import keys_before


class LateStates(NamedTuple):
    """Predicted states of every window, and which queries of the row they belong to."""

    state_BUJD: jax.Array  # window u, draft step j (0-based): the query at offset j, after j predicted keys
    query_UJ: jax.Array  # which of the row's T queries that is, clipped to the last
    valid_UJ: jax.Array  # False where the window hangs over the last query


def window_queries(width: int, window: int, steps: int, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices [U, J] of the first `steps` queries of each window among `width`, clipped, and their validity.

    width 8, window 3, steps 2, offset 2:   [[2, 3], [5, 6], [7, 7]], valid [[1, 1], [1, 1], [0, 0]]
    The number of windows is that of offset 0, so that the shape does not depend on the offset.
    """
    count = -(-width // window)
    query_UJ = offset + window * jnp.arange(count)[:, None] + jnp.arange(steps)[None, :]
    return jnp.minimum(query_UJ, width - 1), query_UJ < width


def late_states(
    params: dict[str, jax.Array],
    spec: DraftSpec,
    e_BTD: jax.Array,
    h_BLD: jax.Array,
    length_B: jax.Array,
    first_B: jax.Array,
    *,
    window: int,
    steps: int,
    offset: jax.Array,
    detach: bool,
) -> LateStates:
    """Simulates `steps` draft steps in every window of every row (method.md 4.1, computed as in 4.5b).

    e_BTD: embeddings of the T tokens from position first_B on; windows are counted from there.
    h_BLD: true states of the whole row, with the training noise if any; they serve as keys and values only.
    detach: cut the gradient through predicted states where later steps read them (method.md 4.6).
    """
    block = BeagleBlock(spec).bind({"params": params})
    (B, L, D), T = h_BLD.shape, e_BTD.shape[1]
    query_UJ, valid_UJ = window_queries(T, window, steps, offset)
    U, J = query_UJ.shape
    true_rows = block.keys_values(h_BLD, jnp.broadcast_to(jnp.arange(L), (B, L)))
    position_BUJ = first_B[:, None, None] + query_UJ[None]
    e_BUJD = e_BTD[:, query_UJ]
    q_BKGTH = block.queries(e_BUJD.reshape(B, U * J, D), position_BUJ.reshape(B, U * J))
    start_BT = jnp.repeat(position_BUJ[:, :, 0], J, axis=1)
    mask_BTL = keys_before(start_BT, length_B, L)
    on_true = partial_attention(q_BKGTH, *true_rows, mask_BTL[:, None, None])

    states, memory = [], None
    for step in range(J):
        with jax.named_scope(f"simulate_{step + 1}"):
            seen = _windows_as_batch(on_true, U, J, step)
            if memory is None:
                attended = merge_attention(seen)
            else:
                q_step = q_BKGTH.reshape(*q_BKGTH.shape[:3], U, J, -1)[..., step, :]
                attended = merge_attention(seen, partial_attention(_fold(q_step), *memory, True))
            state_X1D = block.predict(e_BUJD[:, :, step].reshape(B * U, 1, D), attended)
            states.append(state_X1D.reshape(B, U, D))
            if step + 1 < J:  # the last state is never read (lazy append, method.md 6.2)
                read_X1D = jax.lax.stop_gradient(state_X1D) if detach else state_X1D
                at_X1 = position_BUJ[:, :, step].reshape(B * U, 1)
                memory = append_rows(memory, block.keys_values(read_X1D, at_X1))
    return LateStates(jnp.stack(states, axis=2), query_UJ, valid_UJ)


def _windows_as_batch(part: PartialAttention, U: int, J: int, step: int) -> PartialAttention:
    """The partial attention of the queries at one window offset, each window a batch entry of one query."""
    pick = lambda x: _fold(x.reshape(*x.shape[:3], U, J, *x.shape[4:])[:, :, :, :, step])
    return PartialAttention(*(pick(x) for x in part))


def _fold(x_BKGU: jax.Array) -> jax.Array:
    """[B, K, G, U, ...] -> [B * U, K, G, 1, ...]."""
    B, K, G, U = x_BKGU.shape[:4]
    return jnp.moveaxis(x_BKGU, 3, 1).reshape(B * U, K, G, 1, *x_BKGU.shape[4:])

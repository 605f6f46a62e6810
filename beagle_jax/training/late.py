"""The late stage: drafting simulated inside training, at about the early stage's cost (method.md 4.5b).

With the loss at step i only on window offset i - 1, each query is needed at exactly one step, and true keys never
change. So attention over true keys is computed once for all queries; step i adds the at most i - 1 predicted keys
of the query's own window through the log-sum-exp merge, predicts, and appends one key per window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.model.beagle import BeagleBlock, DraftSpec
from beagle_jax.model.cache import KVRows, append_rows
from beagle_jax.model.layers import PartialAttention, merge_attention, partial_attention


class LateStates(NamedTuple):
    """Predicted states of every window, and which row positions they belong to."""

    state_BUJD: jax.Array  # window u, draft step j (0-based): the query at offset j, after j predicted keys
    position_UJ: jax.Array  # row position of that query, clipped to the row
    valid_UJ: jax.Array  # False where the window hangs over the end of the row


def window_positions(width: int, window: int, steps: int, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions [U, J] of the first `steps` queries of each window, clipped to the row, and their validity.

    width 8, window 3, steps 2, offset 2:   [[2, 3], [5, 6], [7, 7]], valid [[1, 1], [1, 1], [0, 0]]
    The number of windows is that of offset 0, so that the shape does not depend on the offset.
    """
    count = -(-width // window)
    position_UJ = offset + window * jnp.arange(count)[:, None] + jnp.arange(steps)[None, :]
    return jnp.minimum(position_UJ, width - 1), position_UJ < width


def late_states(
    params: dict[str, jax.Array],
    spec: DraftSpec,
    e_BLD: jax.Array,
    h_BLD: jax.Array,
    length_B: jax.Array,
    *,
    window: int,
    steps: int,
    offset: jax.Array,
    detach: bool,
) -> LateStates:
    """Simulates `steps` draft steps in every window of every row (method.md 4.1, computed as in 4.5b).

    h_BLD: true states, with the training noise if any; they serve as keys and values only.
    detach: cut the gradient through predicted states where later steps read them (method.md 4.6).
    """
    block = BeagleBlock(spec).bind({"params": params})
    B, L, D = e_BLD.shape
    position_UJ, valid_UJ = window_positions(L, window, steps, offset)
    U, J = position_UJ.shape
    true_rows = block.keys_values(h_BLD, jnp.broadcast_to(jnp.arange(L), (B, L)))
    flat_BT = jnp.broadcast_to(position_UJ.reshape(-1), (B, U * J))
    e_BTD = e_BLD[:, position_UJ.reshape(-1)]
    q_BKGTH = block.queries(e_BTD, flat_BT)
    start_T = jnp.repeat(position_UJ[:, 0], J)
    mask_BTL = _sees_true(start_T, length_B, L)
    on_true = partial_attention(q_BKGTH, *true_rows, mask_BTL[:, None, None])

    e_BUJD = e_BTD.reshape(B, U, J, D)
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
                at_X1 = jnp.broadcast_to(position_UJ[:, step], (B, U)).reshape(B * U, 1)
                memory = append_rows(memory, block.keys_values(read_X1D, at_X1))
    return LateStates(jnp.stack(states, axis=2), position_UJ, valid_UJ)


def _sees_true(start_T: jax.Array, length_B: jax.Array, width: int) -> jax.Array:
    """Mask [B, T, L]: true keys before the query's window, padding excluded (the early-stage mask)."""
    key_L = jnp.arange(width)
    return (key_L[None, :] < start_T[:, None])[None] & (key_L[None, :] < length_B[:, None])[:, None]


def _windows_as_batch(part: PartialAttention, U: int, J: int, step: int) -> PartialAttention:
    """The partial attention of the queries at one window offset, each window a batch entry of one query."""
    pick = lambda x: _fold(x.reshape(*x.shape[:3], U, J, *x.shape[4:])[:, :, :, :, step])
    return PartialAttention(*(pick(x) for x in part))


def _fold(x_BKGU: jax.Array) -> jax.Array:
    """[B, K, G, U, ...] -> [B * U, K, G, 1, ...]."""
    B, K, G, U = x_BKGU.shape[:4]
    return jnp.moveaxis(x_BKGU, 3, 1).reshape(B * U, K, G, 1, *x_BKGU.shape[4:])

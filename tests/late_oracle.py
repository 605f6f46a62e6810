"""The late stage in its plain, slow form (method.md 4.1), the oracle of `training/late.py`.

A benchmark uses it too. Every query runs at every step. Keys are in two banks of L columns, true
states T and predicted states P. Attention is one ordinary softmax over the 2L columns. Only the
block's projections are shared with the fast form.
"""

import jax
import jax.numpy as jnp

from beagle_jax.model.beagle import BeagleBlock, BeagleSpec

right_keys_values = BeagleBlock.keys_values


def late_keys_values(self: BeagleBlock, h_BQD: jax.Array, at_BQ: jax.Array):
    """Planted for `BeagleBlock.keys_values`: a predicted key is one position late."""
    return right_keys_values(self, h_BQD, at_BQ + (h_BQD.shape[1] == 1))


def bank_masks(
    width: int, window: int, offset: jax.Array, step: int
) -> tuple[jax.Array, jax.Array]:
    """(visible_T, visible_P), each [L, L], at simulation step 1..s, as method.md 4.1 writes them.

    Rows before the first window see true keys causally and no predicted one (method.md 12.6).
    """
    q_L1, j_1L = jnp.arange(width)[:, None], jnp.arange(width)[None, :]

    def start(i):
        return offset + window * ((i - offset) // window)

    inside_L1, inside_1L = q_L1 >= offset, j_1L >= offset
    visible_true = jnp.where(inside_L1, j_1L < start(q_L1), j_1L < q_L1)
    same_window = (start(j_1L) == start(q_L1)) & inside_L1 & inside_1L
    visible_predicted = same_window & (j_1L - start(j_1L) <= step - 2) & (j_1L < q_L1)
    return visible_true, visible_predicted


def oracle_states(
    params: dict[str, jax.Array],
    spec: BeagleSpec,
    e_BLD: jax.Array,
    h_BLI: jax.Array,
    length_B: jax.Array,
    *,
    window: int,
    steps: int,
    offset: jax.Array,
    detach: bool,
) -> list[jax.Array]:
    """Returns the states [B, L, D] of all queries for each simulation step.

    Only rows with r = step - 1 count in the loss.
    """
    block = BeagleBlock(spec).bind({"params": params})
    B, L, _ = e_BLD.shape
    position_L = jnp.arange(L)
    position_BL = jnp.broadcast_to(position_L, (B, L))
    real_BL = position_L[None, :] < length_B[:, None]
    r_L = (position_L - offset) % window
    predicted_BLD = jnp.zeros_like(e_BLD)
    per_step = []
    for step in range(1, steps + 1):
        visible_true, visible_predicted = bank_masks(L, window, offset, step)
        mask_BLS = jnp.concatenate(
            [visible_true[None] & real_BL[:, None], jnp.broadcast_to(visible_predicted, (B, L, L))],
            axis=2,
        )
        state_BLD = _one_softmax(block, e_BLD, h_BLI, predicted_BLD, position_BL, mask_BLS)
        per_step.append(state_BLD)
        writes_L = (position_L >= offset) & (r_L == step - 1)
        kept_BLD = jax.lax.stop_gradient(state_BLD) if detach else state_BLD
        predicted_BLD = jnp.where(writes_L[None, :, None], kept_BLD, predicted_BLD)
    return per_step


def _one_softmax(block, e_BLD, h_BLI, predicted_BLD, position_BL, mask_BLS) -> jax.Array:
    q_BKGLH = block.queries(e_BLD, position_BL)
    banks = [
        block.entry_rows(h_BLI, position_BL),
        block.keys_values(predicted_BLD, position_BL),
    ]
    k_BKHS = jnp.concatenate([bank.k_BKHS for bank in banks], axis=3)
    v_BKSH = jnp.concatenate([bank.v_BKSH for bank in banks], axis=2)
    score = jnp.einsum("BKGLH,BKHS->BKGLS", q_BKGLH, k_BKHS) / jnp.sqrt(q_BKGLH.shape[-1] * 1.0)
    mask = mask_BLS[:, None, None]
    seen = mask.any(axis=-1, keepdims=True)
    weight = jax.nn.softmax(jnp.where(mask, score, jnp.where(seen, -jnp.inf, 0.0)), axis=-1)
    out = jnp.einsum("BKGLS,BKSH->BKGLH", jnp.where(seen, weight, 0.0), v_BKSH)
    return block.predict(e_BLD, out)

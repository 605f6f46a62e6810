"""Closed-form start of a draft: local attention, and linear maps by ridge regression.

With weights from N(0, 0.02) the block needs hundreds of steps before its attention finds the newest
visible state, the best predictor of the next one. With this start, two thirds of the heads attend
to it from the first step. The mean embedding and the mean state are large, so a rank-one term in
W_q and W_k adds a score that, through RoPE, depends on distance alone and peaks at the nearest key.
The value and output matrices start as the ridge regression of h_i on h_{i-1}, scaled down so that
attention does not outweigh the embedding. The MLP gets random inner weights of unit scale, and its
outer matrix is the regression of the residual that this attention leaves. This is not in the paper;
architecture, losses and training are unchanged (method.md 2.4 leaves the start open).
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.data.loader import Batch
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec
from beagle_jax.model.masks import early_block_mask
from beagle_jax.model.packing import of_row, queries
from beagle_jax.model.target import embed

FIT_ROWS = 1000  # chats to fit on: about 80,000 positions
_FIT_LINES = 20  # chats whose features are in memory at once
# Rotary pairs that carry the distance score; the fastest ones distinguish neighbouring positions.
_PAIRS = 8
# Amplitude of queries and keys in these pairs: a score gap of about 2 between distances 1 and 2.
_AMPLITUDE = 4.5
_ATTENTION_SCALE = 0.1  # share of the fitted state that attention adds before the MLP
_RIDGE = 1e-3  # penalty relative to the mean diagonal of the Gram matrix


def warm_start(
    params: dict[str, jax.Array], spec: BeagleSpec, embed_VD: jax.Array, batch: Batch
) -> dict[str, jax.Array]:
    """Returns fitted parameters to start training from.

    params: initial parameters; those that are not fitted are returned unchanged. batch: one chat
    per row, with some thousand tokens to fit on.
    """
    fitted = _local_attention(
        {name: np.array(array) for name, array in params.items()}, spec, embed_VD, batch
    )
    # Features of unit scale; at init_std they would start nearly linear and tiny.
    rng = np.random.default_rng(0)
    for name in ("gate_proj", "up_proj"):
        fitted[name] = rng.standard_normal(fitted[name].shape) / np.sqrt(spec.hidden_size)
    start = {name: jnp.asarray(array, jnp.float32) for name, array in fitted.items()}
    parts = [
        jax.tree.map(lambda x, first=line: x[first : first + _FIT_LINES], batch)
        for line in range(0, len(batch.tokens_BL), _FIT_LINES)
    ]
    moments = (_feature_moments(start, spec, embed_VD, part) for part in parts)
    on_host = ((np.asarray(gram), np.asarray(cross)) for gram, cross in moments)
    return start | {"down_proj": jnp.asarray(_ridge(on_host).T, jnp.float32)}


def _local_attention(
    fitted: dict[str, np.ndarray], spec: BeagleSpec, embed_VD: jax.Array, batch: Batch
) -> dict[str, np.ndarray]:
    """Sets the attention weights so that most heads read the newest state."""
    e_MD, before_MD, after_MD = _neighbours(np.asarray(embed_VD) * spec.embed_scale, batch)
    u_MD = e_MD / np.sqrt(np.square(e_MD).mean(axis=1, keepdims=True) + spec.rms_norm_eps)
    K, H, G = spec.num_kv_heads, spec.head_dim, spec.num_heads // spec.num_kv_heads
    local = max(1, 2 * K // 3)  # KV heads that start local; the rest stay random
    score_H = np.zeros(H)
    score_H[: min(_PAIRS, H // 2)] = _AMPLITUDE
    fitted["q_proj"][: local * G * H] += np.tile(
        np.outer(_back_one(score_H, spec), _unit_probe(u_MD)), (local * G, 1)
    )
    fitted["k_proj"][: local * H] += np.tile(np.outer(score_H, _unit_probe(before_MD)), (local, 1))
    # Fit h_i - e_i from (e_i, h_{i-1}); only the part from h_{i-1} goes through attention.
    x_MF = np.concatenate([u_MD, before_MD, np.ones((len(u_MD), 1), np.float32)], axis=1)
    linear_FD = _ridge([(x_MF.T @ x_MF, x_MF.T @ (after_MD - e_MD))])
    from_before_DD = linear_FD[u_MD.shape[1] : -1].T * _ATTENTION_SCALE
    out_Dr, in_rD = _low_rank(from_before_DD, before_MD, local * H)
    fitted["v_proj"][: local * H] = in_rD
    for head in range(local * G):
        rank = slice(head // G * H, (head // G + 1) * H)
        fitted["o_proj"][:, head * H : (head + 1) * H] = out_Dr[:, rank] / G
    return fitted


@partial(jax.jit, static_argnames="spec")
def _feature_moments(
    params: dict[str, jax.Array], spec: BeagleSpec, embed_VD: jax.Array, part: Batch
) -> tuple[jax.Array, jax.Array]:
    """Sums x^T x and x^T y over supervised positions (x: MLP features, y: target residual)."""
    block = BeagleBlock(spec).bind({"params": params})
    T, L = part.counted_BT.shape[1], part.tokens_BL.shape[1]
    query = queries(T, part.length_BC, part.first_BC)
    e_BTD = embed(embed_VD, of_row(part.tokens_BL, query.slot_BT), spec.embed_scale)
    mask_BTL = early_block_mask(part.length_BC, L, 1, jnp.int32(0), part.first_BC, T)
    states_BLD, inputs_BLI = jnp.asarray(part.predicted_BLD), jnp.asarray(part.inputs_BLI)
    y_BTD, gated_BTF = block.before_down(
        e_BTD, block.attend(e_BTD, inputs_BLI, mask_BTL, query.position_BT)
    )
    feature_BTF = gated_BTF * part.counted_BT[..., None]

    def product(x: jax.Array) -> jax.Array:
        return jnp.einsum("BTF,BTD->FD", feature_BTF, x)

    return product(feature_BTF), product(of_row(states_BLD, query.slot_BT) - y_BTD)


def _neighbours(embed_VD: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns e(x_i), h_{i-1} and h_i of each supervised position i."""
    line, query = np.nonzero(batch.counted_BT)
    position = batch.first_BC[line, 0] + query
    line, position = line[position > 0], position[position > 0]
    states_BLD = np.asarray(batch.predicted_BLD, np.float32)
    e_MD = np.asarray(embed_VD[batch.tokens_BL[line, position]], np.float32)
    return e_MD, states_BLD[line, position - 1], states_BLD[line, position]


def _unit_probe(x_MD: np.ndarray) -> np.ndarray:
    """Returns the vector whose product with x is 1 on average."""
    mean_D = x_MD.mean(axis=0)
    return mean_D / (mean_D @ mean_D)


def _back_one(score_H: np.ndarray, spec: BeagleSpec) -> np.ndarray:
    """Rotates the pairs back by one position, so that the score peaks at distance 1."""
    half = spec.head_dim // 2
    angle = 1.0 / spec.rope_theta ** (np.arange(half) / half)
    return np.concatenate([score_H[:half] * np.cos(angle), -score_H[:half] * np.sin(angle)])


def _ridge(moments: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Solves ridge regression for the map [F, O].

    moments: parts of (x^T x, x^T y), summed in float64.
    """
    gram_FF: np.ndarray = np.zeros(())
    cross_FO: np.ndarray = np.zeros(())
    for gram, cross in moments:
        gram_FF, cross_FO = gram_FF + gram, cross_FO + cross
    gram_FF[np.diag_indices_from(gram_FF)] += _RIDGE * np.mean(np.diag(gram_FF))
    return np.linalg.solve(gram_FF, cross_FO)


def _low_rank(map_DD: np.ndarray, x_MD: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns factors [D, rank], [rank, D] of a linear map, optimal for inputs like x."""
    moment_DD = (x_MD.T @ x_MD).astype(np.float64) / len(x_MD)
    value_D, vector_DD = np.linalg.eigh(moment_DD)
    root_D = np.sqrt(np.maximum(value_D, 1e-6 * value_D.max()))
    left_Dr, size_r, right_rD = np.linalg.svd(map_DD @ (vector_DD * root_D))
    factor = np.sqrt(size_r[:rank])
    return left_Dr[:, :rank] * factor, (right_rD[:rank] * factor[:, None] / root_D) @ vector_DD.T

"""Closed-form start of a draft: attention to the newest state, and linear maps by regression.

With weights from N(0, 0.02) the block needs hundreds of steps before its attention finds the newest
visible state, the best predictor of the next one. This start contains the linear fit of the next
state, h_i = A e_i + B h_{i-1}, with a B of the rank that the draft's values have, and more than
that: all heads contribute, and the MLP fits what is not linear. The sample is read three times, a
few rows at a time. Only sums of products are stored, so memory depends on the draft's sizes alone.

1. Queries and keys. The mean embedding and the mean state are large, so a rank-one term in W_q and
   W_k adds a score that, through RoPE, depends on distance alone and peaks at the nearest key. The
   rows of W_v are the directions of h_{i-1} that explain most of h_i beside e_i (reduced-rank
   regression).
2. W_o. With the regression h_i = A e_i + C a_i on the heads' outputs a_i, W_o is A^-1 C: the
   residual stream y_i = e_i + W_o a_i then holds all that the fit needs, as h_i = A y_i.
3. The MLP. Its first units have a constant gate, at the minimum of silu, where the gate's noise
   has no effect to first order. They are linear in y_i; the other units are random. W_down is the
   regression of h_i - y_i on all of them.

This is not in the paper; architecture, losses and training are unchanged (method.md 2.4 leaves the
start open).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.data.loader import Batch
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec
from beagle_jax.model.layers import join_heads, rms_norm
from beagle_jax.model.masks import early_block_mask
from beagle_jax.model.packing import of_row, queries
from beagle_jax.model.target import embed

# Supervised positions to fit on: at least so many, and so many for each fitted unit of the MLP.
FIT_POSITIONS, FIT_PER_UNIT = 80_000, 10
FIT_AT_ONCE = 4096  # positions whose features are in memory at once, padding included
MOST_UNITS = 16_384  # of the MLP that are fitted; more start silent, as their moments are too large
_GAP = 6.0  # of scores between distance 1 and any other
_DISTANCES = 512  # that are compared with distance 1
_RIDGE = 1e-3  # penalty of a coefficient relative to the mean square of its feature
_NOISE = 1e-2  # the same, where a constant is fitted
_FLAT = -1.2784645  # where silu has its minimum, and no slope

Sample = Callable[[], Iterable[Batch]]
Moments = dict[str, Any]


def warm_start(
    params: dict[str, jax.Array], spec: BeagleSpec, embed_VD: jax.Array, sample: Sample
) -> dict[str, jax.Array]:
    """Returns fitted parameters to start training from.

    params: initial parameters; those that are not fitted are returned unchanged. sample: yields, at
    each call, the same batches of one chat per row, with their states.
    """
    start = {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}
    summed = partial(_summed, spec, embed_VD, sample)
    start |= _local_attention(start, spec, summed(_neighbours))
    start["o_proj"] = _output(spec, summed(_attended, start))
    start |= _units(start, spec, summed(_normed, start))
    fitted = min(spec.intermediate_size, MOST_UNITS)
    down_FD = np.zeros((spec.intermediate_size, spec.hidden_size))
    down_FD[:fitted] = _ridge(**summed(_features, start, fitted))
    return start | {"down_proj": jnp.asarray(down_FD.T, jnp.float32)}


def _summed(
    spec: BeagleSpec, embed_VD: jax.Array, sample: Sample, moments: Callable, *arguments: Any
) -> Moments:
    """Sums moments of all batches of the sample, in float64 on the host."""
    total: Any = None
    for part in sample():
        summands = jax.tree.map(np.asarray, moments(spec, embed_VD, part, *arguments))
        if total is None:
            total = jax.tree.map(lambda x: x.astype(np.float64), summands)
        else:
            total = jax.tree.map(lambda x, summand: np.add(x, summand, out=x), total, summands)
    assert total is not None  # a loader has a chat that enters the loss
    return total


def _local_attention(
    fresh: dict[str, jax.Array], spec: BeagleSpec, moments: Moments
) -> dict[str, jax.Array]:
    """Returns q_proj, k_proj and v_proj, with which every head reads the newest state.

    moments: by `_neighbours`.
    """
    D, K, H, N = spec.hidden_size, spec.num_kv_heads, spec.head_dim, spec.num_heads
    pairs, fall = _pairs(spec)
    score_H = np.zeros(H)
    score_H[:pairs] = np.sqrt(_GAP * np.sqrt(H) / fall)
    of_query_D, of_key_D = _one(moments["query_FF"]), _one(moments["fit"]["gram_FF"][D:, D:])
    q_HD, k_HD = np.outer(_back_one(score_H, spec), of_query_D), np.outer(score_H, of_key_D)
    return {
        "q_proj": fresh["q_proj"] + jnp.asarray(np.tile(q_HD, (N, 1)), jnp.float32),
        "k_proj": fresh["k_proj"] + jnp.asarray(np.tile(k_HD, (K, 1)), jnp.float32),
        "v_proj": jnp.asarray(_explaining(D, K * H, **moments["fit"]), jnp.float32),
    }


def _explaining(D: int, rank: int, gram_FF: np.ndarray, cross_FO: np.ndarray) -> np.ndarray:
    """Returns the `rank` linear functions of h_{i-1} that explain most of h_i beside e_i.

    The features are e_i, h_{i-1} and a constant. This is reduced-rank regression: the principal
    directions of what h_{i-1} adds to the fitted values, after the part that e_i explains.
    """
    of_state_DO = _ridge(gram_FF, cross_FO)[D : 2 * D]
    token = np.r_[:D, 2 * D]  # e_i and the constant
    state = np.r_[D : 2 * D]
    shared = gram_FF[np.ix_(token, state)]
    own = gram_FF[np.ix_(token, token)]
    rest_DD = gram_FF[np.ix_(state, state)] - shared.T @ _ridge(own, shared)
    _, direction_OO = np.linalg.eigh(of_state_DO.T @ rest_DD @ of_state_DO)
    first_rO = direction_OO[:, ::-1][:, :rank].T @ of_state_DO.T
    return np.pad(first_rO, ((0, rank - len(first_rO)), (0, 0)))


def _output(spec: BeagleSpec, moments: Moments) -> jax.Array:
    """Returns o_proj, with which the residual stream holds all that the linear fit needs."""
    D = spec.hidden_size
    map_FD = _ridge(**moments)
    of_token_DD, of_heads_DF = map_FD[:D].T, map_FD[D:-1].T
    gram_DD = of_token_DD.T @ of_token_DD
    gram_DD[np.diag_indices(D)] += _RIDGE * np.trace(gram_DD) / D
    return jnp.asarray(np.linalg.solve(gram_DD, of_token_DD.T @ of_heads_DF), jnp.float32)


def _units(start: dict[str, jax.Array], spec: BeagleSpec, moments: Moments) -> dict[str, jax.Array]:
    """Returns gate_proj and up_proj: random units of unit scale, the first ones linear."""
    rng, (F, D) = np.random.default_rng(0), start["gate_proj"].shape
    gate_FD, up_FD = (rng.standard_normal((F, D)) / np.sqrt(D) for _ in range(2))
    gate_FD[: min(D, F // 2)] = _FLAT * _one(moments["gram_FF"])
    return {
        "gate_proj": jnp.asarray(gate_FD, jnp.float32),
        "up_proj": jnp.asarray(up_FD, jnp.float32),
    }


class _Read(NamedTuple):
    """The queries of some rows, and what the draft reads and predicts there."""

    e_BTD: jax.Array
    before_BTD: jax.Array  # state before each query
    after_BTD: jax.Array  # state of each query
    counted_BT: jax.Array  # queries to fit on: those that enter the loss, but position 0
    position_BT: jax.Array

    def moments(self, x_BTF: jax.Array, y_BTO: jax.Array) -> Moments:
        """Sums x^T x and x^T y over the counted queries, in full precision."""
        x_BTF = x_BTF * self.counted_BT[..., None]
        product = partial(jnp.einsum, "BTF,BTO->FO", precision="highest")
        return {"gram_FF": product(x_BTF, x_BTF), "cross_FO": product(x_BTF, y_BTO)}


def _read(spec: BeagleSpec, embed_VD: jax.Array, part: Batch) -> _Read:
    query = queries(part.counted_BT.shape[1], part.length_BC, part.first_BC)
    states_BLD = jnp.asarray(part.predicted_BLD, jnp.float32)
    return _Read(
        embed(embed_VD, of_row(part.tokens_BL, query.slot_BT), spec.embed_scale).astype(
            jnp.float32
        ),
        of_row(states_BLD, query.slot_BT - 1),
        of_row(states_BLD, query.slot_BT),
        jnp.asarray(part.counted_BT) & (query.position_BT > 0),
        query.position_BT,
    )


def _and_one(*x: jax.Array) -> jax.Array:
    """Joins features, and a constant as the last one."""
    return jnp.concatenate([*x, jnp.ones((*x[0].shape[:-1], 1))], axis=-1)


@partial(jax.jit, static_argnums=0)
def _neighbours(spec: BeagleSpec, embed_VD: jax.Array, part: Batch) -> Moments:
    """Moments of e_i, h_{i-1} and a constant with h_i, and of what queries are projected from."""
    x = _read(spec, embed_VD, part)
    u_BTD = rms_norm(x.e_BTD, jnp.ones(spec.hidden_size), spec.rms_norm_eps)
    return {
        "fit": x.moments(_and_one(x.e_BTD, x.before_BTD), x.after_BTD),
        "query_FF": x.moments(_and_one(u_BTD), x.after_BTD)["gram_FF"],
    }


def _attend(
    spec: BeagleSpec, embed_VD: jax.Array, part: Batch, start: dict[str, jax.Array]
) -> tuple[_Read, BeagleBlock, jax.Array]:
    """Returns the queries, the block, and the attention of each query over all earlier states."""
    x, block = _read(spec, embed_VD, part), BeagleBlock(spec).bind({"params": start})
    T, L = part.counted_BT.shape[1], part.tokens_BL.shape[1]
    mask_BTL = early_block_mask(part.length_BC, L, 1, jnp.int32(0), part.first_BC, T)
    inputs_BLI = jnp.asarray(part.inputs_BLI, jnp.float32)
    return x, block, block.attend(x.e_BTD, inputs_BLI, mask_BTL, x.position_BT)


@partial(jax.jit, static_argnums=0)
def _attended(
    spec: BeagleSpec, embed_VD: jax.Array, part: Batch, start: dict[str, jax.Array]
) -> Moments:
    """Moments of e_i, the heads' outputs and a constant with h_i."""
    x, _, attended_BKGTH = _attend(spec, embed_VD, part, start)
    return x.moments(_and_one(x.e_BTD, join_heads(attended_BKGTH)), x.after_BTD)


@partial(jax.jit, static_argnums=0)
def _normed(
    spec: BeagleSpec, embed_VD: jax.Array, part: Batch, start: dict[str, jax.Array]
) -> Moments:
    """Moments of the MLP's input and a constant."""
    x, block, attended_BKGTH = _attend(spec, embed_VD, part, start)
    y_BTD, _ = block.before_down(x.e_BTD, attended_BKGTH)
    z_BTD = rms_norm(y_BTD, start["post_attention_layernorm"], spec.rms_norm_eps)
    return x.moments(_and_one(z_BTD), x.after_BTD)


@partial(jax.jit, static_argnums=(0, 4))
def _features(
    spec: BeagleSpec, embed_VD: jax.Array, part: Batch, start: dict[str, jax.Array], fitted: int
) -> Moments:
    """Moments of the MLP's first units with what attention leaves of h_i."""
    x, block, attended_BKGTH = _attend(spec, embed_VD, part, start)
    y_BTD, gated_BTF = block.before_down(x.e_BTD, attended_BKGTH)
    return x.moments(gated_BTF[..., :fitted], x.after_BTD - y_BTD)


def _one(gram_FF: np.ndarray) -> np.ndarray:
    """Returns the vector whose product with x is as close to 1 as possible.

    gram_FF: of x and a constant, which is the last feature.
    """
    return _ridge(gram_FF[:-1, :-1], gram_FF[:-1, -1:], _NOISE)[:, 0]


def _angles(spec: BeagleSpec) -> np.ndarray:
    """Returns the angle of each rotary pair at distance 1, the fastest first."""
    half = spec.head_dim // 2
    return 1.0 / spec.rope_theta ** (np.arange(half) / half)


def _pairs(spec: BeagleSpec) -> tuple[int, float]:
    """Returns how many of the fastest rotary pairs carry the distance score.

    Also returns by how much the sum of their cosines at any distance is below that at the first.
    Every pair adds to the noise of a score as much as to its peak, so this is the number whose fall
    is the largest share of the peak. Too few pairs come round to the peak again.
    """
    angle_DP = np.outer(np.arange(1, _DISTANCES), _angles(spec))
    fall_P = np.cumsum(1 - np.cos(angle_DP), axis=1).min(axis=0)
    best = int(np.argmax(fall_P / np.arange(1, len(fall_P) + 1)))
    return best + 1, float(fall_P[best])


def _back_one(score_H: np.ndarray, spec: BeagleSpec) -> np.ndarray:
    """Rotates the pairs back by one position, so that the score peaks at distance 1."""
    half, angle = spec.head_dim // 2, _angles(spec)
    return np.concatenate([score_H[:half] * np.cos(angle), -score_H[:half] * np.sin(angle)])


def _ridge(gram_FF: np.ndarray, cross_FO: np.ndarray, penalty: float = _RIDGE) -> np.ndarray:
    """Solves ridge regression for the map [F, O]; the penalty is relative to each feature."""
    square_F = np.diag(gram_FF)
    raised_FF = gram_FF.copy()
    # A feature that is always zero gets the coefficient zero.
    raised_FF[np.diag_indices_from(raised_FF)] += penalty * square_F + (square_F == 0)
    return np.linalg.solve(raised_FF, cross_FO)

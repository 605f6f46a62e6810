"""A closed-form start for the draft: attention to the newest state, and linear maps fitted by ridge regression.

From N(0, 0.02) weights the block needs hundreds of steps before its attention finds the newest visible state, which
carries most of what can be known about the next one. Here two thirds of the heads begin there: the mean embedding
and the mean state are large, so a rank-one term in W_q and W_k makes a score that depends on distance alone through
RoPE and peaks at the nearest key. Values and output then begin as the ridge regression of h_i on h_{i-1}, scaled down
so that the embedding is not drowned, and the MLP's last matrix as the regression of what is left on random features.
Not in the paper; architecture, losses and training are unchanged (method.md 2.4 leaves the start open).
"""

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.data.loader import Batch
from beagle_jax.model.beagle import DraftSpec

FIT_ROWS = 200  # chats to fit on: some ten thousand tokens, a quarter of a minute
_PAIRS = 8  # rotary pairs that carry the distance score: the fastest ones tell neighbours apart
_AMPLITUDE = 4.5  # of queries and keys in those pairs: a score gap of about 2 between distances 1 and 2
_ATTENTION_SCALE = 0.1  # share of the fitted state that attention adds before the MLP
_RIDGE = 1e-3  # penalty relative to the mean diagonal of the Gram matrix


def warm_start(params: dict[str, jax.Array], spec: DraftSpec, embed_VD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Parameters to train from. `params` gives everything that is not fitted; `batch` some thousand tokens to fit on."""
    e_MD, before_MD, after_MD = _neighbours(np.asarray(embed_VD, np.float64), batch)
    u_MD = e_MD / np.sqrt(np.square(e_MD).mean(axis=1, keepdims=True) + spec.rms_norm_eps)
    fitted = {name: np.array(array, np.float64) for name, array in params.items()}
    K, H, G = spec.num_kv_heads, spec.head_dim, spec.num_heads // spec.num_kv_heads
    local = max(1, 2 * K // 3)  # kv heads that begin local; the rest stay random
    score_H = np.zeros(H)
    score_H[: min(_PAIRS, H // 2)] = _AMPLITUDE
    fitted["q_proj"][: local * G * H] += np.tile(np.outer(_back_one(score_H, spec), _unit_probe(u_MD)), (local * G, 1))
    fitted["k_proj"][: local * H] += np.tile(np.outer(score_H, _unit_probe(before_MD)), (local, 1))
    # h_i - e_i from (e_i, h_{i-1}); only the part that comes from h_{i-1} goes through the attention.
    linear_DD = _ridge(np.concatenate([u_MD, before_MD, np.ones((len(u_MD), 1))], axis=1), after_MD - e_MD)
    from_before_DD = linear_DD[u_MD.shape[1] : -1].T * _ATTENTION_SCALE
    out_DR, in_RD = _low_rank(from_before_DD, before_MD, local * H)
    fitted["v_proj"][: local * H] = in_RD
    for head in range(local * G):
        rank = slice(head // G * H, (head // G + 1) * H)
        fitted["o_proj"][:, head * H : (head + 1) * H] = out_DR[:, rank] / G
    y_MD = e_MD + before_MD @ (out_DR @ in_RD).T
    z_MD = y_MD / np.sqrt(np.square(y_MD).mean(axis=1, keepdims=True) + spec.rms_norm_eps)
    # Features of unit scale; at init_std they would start nearly linear and tiny.
    rng = np.random.default_rng(0)
    for name in ("gate_proj", "up_proj"):
        fitted[name] = rng.standard_normal(fitted[name].shape) / np.sqrt(spec.hidden_size)
    gate_MF, up_MF = z_MD @ fitted["gate_proj"].T, z_MD @ fitted["up_proj"].T
    fitted["down_proj"] = _ridge(gate_MF / (1 + np.exp(-gate_MF)) * up_MF, after_MD - y_MD).T
    return {name: jnp.asarray(array, jnp.float32) for name, array in fitted.items()}


def _neighbours(embed_VD: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each supervised position i: e(x_i), h_{i-1}, h_i."""
    line, query = np.nonzero(batch.counts_BT)
    position = batch.first_B[line] + query
    line, position = line[position > 0], position[position > 0]
    states_BLD = np.asarray(batch.states_BLD, np.float64)
    return embed_VD[batch.tokens_BL[line, position]], states_BLD[line, position - 1], states_BLD[line, position]


def _unit_probe(x_MD: np.ndarray) -> np.ndarray:
    """The vector whose product with x is 1 on average."""
    mean_D = x_MD.mean(axis=0)
    return mean_D / (mean_D @ mean_D)


def _back_one(score_H: np.ndarray, spec: DraftSpec) -> np.ndarray:
    """Turns the pairs back by one position, so that the score peaks at distance 1."""
    half = spec.head_dim // 2
    angle = 1.0 / spec.rope_theta ** (np.arange(half) / half)
    return np.concatenate([score_H[:half] * np.cos(angle), -score_H[:half] * np.sin(angle)])


def _ridge(x_MD: np.ndarray, y_ME: np.ndarray) -> np.ndarray:
    gram_DD = x_MD.T @ x_MD
    gram_DD[np.diag_indices_from(gram_DD)] += _RIDGE * np.mean(np.diag(gram_DD))
    return np.linalg.solve(gram_DD, x_MD.T @ y_ME)


def _low_rank(map_DD: np.ndarray, x_MD: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors [D, rank], [rank, D] of a linear map, the best for inputs distributed like x."""
    moment_DD = x_MD.T @ x_MD / len(x_MD)
    value_D, vector_DD = np.linalg.eigh(moment_DD)
    root_D = np.sqrt(np.maximum(value_D, 1e-6 * value_D.max()))
    left_DR, size_R, right_RD = np.linalg.svd(map_DD @ (vector_DD * root_D))
    factor = np.sqrt(size_R[:rank])
    return left_DR[:, :rank] * factor, (right_RD[:rank] * factor[:, None] / root_D) @ vector_DD.T

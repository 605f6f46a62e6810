"""Divergences between target p and draft q, per position, with gradients (`train.loss`).

Each function returns (distance [R], gradient with respect to the draft's logits [R, V]). `total`
sums over the vocabulary, which may be split over devices; V is the part of one device. p and q are
probabilities and z are the draft's logits. With q = softmax(z),
d f / d z_v = q_v (d f / d q_v - sum_u q_u d f / d q_u).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# How fast the weight moves from KL to TV as acceptance grows; the best value of the LK paper.
_LK_ETA = 3.0


class Distributions(NamedTuple):
    """Target distribution p and draft distribution q of R positions, in float32."""

    p_RV: jax.Array
    log_p_RV: jax.Array
    q_RV: jax.Array
    log_q_RV: jax.Array
    total: Callable[[jax.Array], jax.Array]  # [R, V] -> [R]


Distance = tuple[jax.Array, jax.Array]


def cross_entropy(of: Distributions) -> Distance:
    """-sum_v p(v) log q(v), the paper's loss (method.md 3.2)."""
    return -of.total(of.p_RV * of.log_q_RV), of.q_RV - of.p_RV


def kl(of: Distributions) -> Distance:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)).

    Equals the cross-entropy minus the target's entropy, with the same gradient.
    """
    return of.total(of.p_RV * (of.log_p_RV - of.log_q_RV)), of.q_RV - of.p_RV


def reverse_kl(of: Distributions) -> Distance:
    """KL(q || p) = sum_v q(v) (log q(v) - log p(v)).

    Penalises most the tokens that are unlikely under the target.
    """
    ratio_RV = of.log_q_RV - of.log_p_RV
    distance_R = of.total(of.q_RV * ratio_RV)
    return distance_R, of.q_RV * (ratio_RV - distance_R[:, None])


def total_variation(of: Distributions) -> Distance:
    """TV = sum_v |p(v) - q(v)| / 2 = 1 - sum_v min(p(v), q(v)).

    Equals the share of draft tokens that sampling rejects.
    """
    side_RV = jnp.sign(of.q_RV - of.p_RV) / 2
    distance_R = of.total(jnp.abs(of.p_RV - of.q_RV)) / 2
    return distance_R, of.q_RV * (side_RV - of.total(of.q_RV * side_RV)[:, None])


def lk_hybrid(of: Distributions) -> Distance:
    """w KL(p || q) + (1 - w) TV with w = exp(-3 (1 - TV)); w has no gradient.

    Close to KL while few draft tokens are accepted, and to TV later. Samarin et al., "LK Losses",
    arXiv 2602.23881.
    """
    (kl_R, kl_slope_RV), (tv_R, tv_slope_RV) = kl(of), total_variation(of)
    weight_R = jnp.exp(-_LK_ETA * (1 - tv_R))

    def mix(kl_value: jax.Array, tv_value: jax.Array, weight: jax.Array) -> jax.Array:
        return weight * kl_value + (1 - weight) * tv_value

    return mix(kl_R, tv_R, weight_R), mix(kl_slope_RV, tv_slope_RV, weight_R[:, None])


DISTANCES = {
    "cross_entropy": cross_entropy,
    "kl": kl,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
    "lk_hybrid": lk_hybrid,
}

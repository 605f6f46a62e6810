"""Routed experts: several MLPs, of which each token uses a few (Mixtral, Qwen3-MoE).

Knows nothing of files or families. Exact and simple: a loop over all experts, skipping those that
no token chose; an expert that runs reads every column and counts where it was chosen. One step of
decoding so costs the experts it needs, a long prompt up to count / per_token times more than a
dispatch that sorts tokens by expert would.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Experts(NamedTuple):
    """The routed experts of a target. Hashable."""

    count: int  # E
    per_token: int  # experts that each token uses
    width: int  # F of one expert
    renormalised: bool  # the shares of the chosen experts are scaled to sum to 1
    dense_layers: tuple[int, ...]  # layers that have one plain MLP instead
    names: tuple[
        str, str, str, str
    ]  # of the router and each expert's gate, up and down in the files; {} is its number


def shares(router_ED: jax.Array, experts: Experts, y_DM: jax.Array, count: int) -> jax.Array:
    """How much of each expert each column takes, float32 [E, M]; zero where it is not chosen and in
    columns past `count`.
    """
    M = y_DM.shape[1]
    share_EM = jax.nn.softmax(jnp.einsum("ED,DM->EM", router_ED, y_DM).astype(jnp.float32), axis=0)
    best_Mk, expert_Mk = jax.lax.top_k(share_EM.T, experts.per_token)
    if experts.renormalised:
        best_Mk = best_Mk / best_Mk.sum(axis=-1, keepdims=True)
    best_Mk = jnp.where(jnp.arange(M)[:, None] < count, best_Mk, 0.0)
    return jnp.zeros_like(share_EM).at[expert_Mk, jnp.arange(M)[:, None]].set(best_Mk)


def routed(
    share_EM: jax.Array, run: Callable[[jax.Array], jax.Array], like_DM: jax.Array
) -> jax.Array:
    """The sum over experts of share times output, [D, M]. run: an expert's number -> its output [D,
    M].
    """

    def add(expert, total_DM):
        share_M = share_EM[expert]

        def weighted():
            return total_DM + run(expert).astype(jnp.float32) * share_M[None]

        return jax.lax.cond((share_M > 0).any(), weighted, lambda: total_DM)

    total_DM = jax.lax.fori_loop(0, share_EM.shape[0], add, jnp.zeros(like_DM.shape, jnp.float32))
    return total_DM.astype(like_DM.dtype)

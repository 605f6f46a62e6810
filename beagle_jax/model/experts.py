"""Routed experts: several MLPs, of which each token uses a few (Mixtral, Qwen3-MoE).

The computation is exact and simple: a loop over all experts that skips those no token chose. An
expert that runs reads every column and weights it by the token's share. A decoding step therefore
costs only the experts that it needs. A long prompt costs up to count / per_token times as much as a
dispatch that sorts tokens by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Experts:
    """Description of a target's routed experts. Hashable."""

    count: int  # E
    per_token: int  # experts that each token uses
    width: int  # F of a single expert
    renormalised: bool  # the shares of the chosen experts are scaled to sum to 1
    dense_layers: tuple[int, ...]  # layers with a plain MLP instead
    names: tuple[
        str, str, str, str
    ]  # names in files: the router, then each expert's gate, up and down; {} is its number


def shares(router_ED: jax.Array, experts: Experts, y_DM: jax.Array, count: int) -> jax.Array:
    """Returns each expert's share of each column, float32 [E, M].

    It is zero for experts that were not chosen and for columns past `count`.
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
    """Returns the sum over experts of share times output, [D, M].

    run: maps an expert's number to its output [D, M].
    """

    def add(expert: jax.Array, total_DM: jax.Array) -> jax.Array:
        share_M = share_EM[expert]

        def weighted() -> jax.Array:
            return total_DM + run(expert).astype(jnp.float32) * share_M[None]

        return jax.lax.cond((share_M > 0).any(), weighted, lambda: total_DM)

    total_DM = jax.lax.fori_loop(0, share_EM.shape[0], add, jnp.zeros(like_DM.shape, jnp.float32))
    return total_DM.astype(like_DM.dtype)

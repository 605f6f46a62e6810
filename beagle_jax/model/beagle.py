"""The Beagle draft: one cross-attention block (method.md section 2).

The query is the embedding of the token at position i; keys and values are states at positions below
i, the target's or the draft's own, through the same projections. There is no fusion layer, no norm
on keys and values and no output norm: the result regresses to the target's post-norm state, and the
target's frozen LM head reads it.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from beagle_jax.model.cache import KVRows
from beagle_jax.model.draft import LayerBlock, LayerSpec


@dataclass(frozen=True, kw_only=True)
class BeagleSpec(LayerSpec):
    """Shape of the Beagle draft: all of it is the target's (method.md 2.2)."""

    kind: ClassVar[str] = "beagle"
    model_type: ClassVar[str] = "beagle_draft"
    of_target: ClassVar[tuple[str, ...]] = (
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "rope_theta",
        "rms_norm_eps",
    )


class BeagleBlock(LayerBlock):
    """The draft in parts: queries of embeddings over keys and values of states."""

    spec: BeagleSpec

    def fuse(self, e_BTD: jax.Array, h_BTD: jax.Array | None) -> jax.Array:
        """Inputs [B, T, D] of the layer: the tokens' embeddings alone."""
        return e_BTD

    def true_rows(self, h_BTD: jax.Array, next_BTD: jax.Array, positions_BT: jax.Array) -> KVRows:
        """Keys and values of true states; the tokens after them do not enter."""
        return self.keys_values(h_BTD, positions_BT)

    def teacher_forced(self, e_BTD: jax.Array, h_BTD: jax.Array) -> jax.Array:
        """Predicted states [B, T, D] of whole rows, each from the states before it."""
        T = e_BTD.shape[1]
        return self(e_BTD, h_BTD, jnp.tri(T, k=-1, dtype=bool)[None])


def init_draft(spec: BeagleSpec, key: jax.Array) -> dict[str, jax.Array]:
    """Fresh parameters: linear weights N(0, init_std), norms one (method.md 2.4)."""
    one = jnp.zeros((1, 1, spec.hidden_size), jnp.float32)
    return BeagleBlock(spec).init(key, one, one, jnp.zeros((1, 1, 1), bool))["params"]

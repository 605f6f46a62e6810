"""The Beagle draft: one cross-attention block (method.md section 2).

The query is the embedding of the token at position i. Keys and values are projected from states at
positions below i; true and predicted states use the same projections. The block has no fusion
layer, no norm on keys and values, and no output norm: it predicts the target's state after the
final norm, and the target's frozen LM head reads the prediction.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from beagle_jax.model.cache import KVRows
from beagle_jax.model.draft import LayerBlock, LayerSpec


@dataclass(frozen=True, kw_only=True)
class BeagleSpec(LayerSpec):
    """Shape of the Beagle draft: every size is the target's (method.md 2.2)."""

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
    """The draft in parts: queries from embeddings, keys and values from states."""

    spec: BeagleSpec

    def fuse(self, e_BTD: jax.Array, h_BTD: jax.Array | None) -> jax.Array:
        """Returns the layer's inputs [B, T, D]: the tokens' embeddings alone."""
        return e_BTD

    def true_rows(self, h_BTD: jax.Array, next_BTD: jax.Array, positions_BT: jax.Array) -> KVRows:
        """Returns keys and values of true states; the next tokens are not used."""
        return self.keys_values(h_BTD, positions_BT)

    def teacher_forced(self, e_BTD: jax.Array, h_BTD: jax.Array) -> jax.Array:
        """Predicts states [B, T, D] of whole rows, each from the true states before it."""
        T = e_BTD.shape[1]
        return self(e_BTD, h_BTD, jnp.tri(T, k=-1, dtype=bool)[None])


def init_draft(spec: BeagleSpec, key: jax.Array) -> dict[str, jax.Array]:
    """Initialises parameters: linear weights N(0, init_std), norms one (method.md 2.4)."""
    x_11D = jnp.zeros((1, 1, spec.hidden_size), jnp.float32)
    return BeagleBlock(spec).init(key, x_11D, x_11D, jnp.zeros((1, 1, 1), bool))["params"]

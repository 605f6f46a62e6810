"""The EAGLE-1/2 draft, the baseline: a fusion layer and one decoder layer (method.md 8).

The layer has self-attention, and neither an input norm nor an output norm. Its inputs are shifted:
entry j fuses the token at position j + 1 with the state at position j, has rotary position j, and
predicts the state at position j + 1. It reuses the parts of `model/draft.py`, with fused inputs f
in place of embeddings and states.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from beagle_jax.config import DraftConfig
from beagle_jax.model.cache import KVRows
from beagle_jax.model.draft import LayerBlock, LayerSpec, project
from beagle_jax.model.layers import RopeScaling, rope_tables
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import TargetSpec


@dataclass(frozen=True, kw_only=True)
class EagleSpec(LayerSpec):
    """Shape of the EAGLE draft.

    Published drafts may have settings, such as rms_norm_eps, that differ from the target's.
    """

    kind: ClassVar[str] = "eagle"
    model_type: ClassVar[str] = "eagle_draft"
    axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "fc": ("model", "inner"),
        **LayerSpec.axes,
    }

    input_norm: bool = False
    fc_bias: bool = True  # bias of the fusion layer; published drafts for Llama 3 have none
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False  # biases of queries, keys, values; published drafts for Qwen2 have them

    @classmethod
    def from_settings(cls, settings: DraftConfig, target: TargetSpec) -> Self:
        """Describes the new draft that a config asks for.

        Raises:
          UserError: a size does not fit.
        """
        return replace(super().from_settings(settings, target), fc_bias=settings.fc_bias)

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every trainable tensor; matrices are [out, in], as in PyTorch."""
        D = self.hidden_size
        bias = {"fc_bias": (D,)} if self.fc_bias else {}
        shapes = {"fc": (D, 2 * D), **bias, **super().param_shapes()}
        if self.qkv_bias:
            shapes |= {f"{name}_bias": shapes[f"{name}_proj"][:1] for name in "qkv"}
        return shapes

    def rotary(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns cosines and sines [*positions.shape, H]."""
        return rope_tables(positions, self.head_dim, self.rope_theta, self.rope_scaling)


class EagleBlock(LayerBlock):
    """The draft in parts: `fuse`, then queries, keys_values and predict on its output.

    `row` runs them on whole rows. While decoding, the root x_n is fused with the true state
    h_{n-1}, and a token below it with its parent's predicted state. An entry sees the entries of
    true states before it, its ancestors, and itself. The root's entry is made of a true state too,
    so that the cache holds an entry for each true state, as Beagle's does.
    """

    spec: LayerSpec

    def fuse(self, e_BTD: jax.Array, h_BTD: jax.Array | None) -> jax.Array:
        """Returns inputs f [B, T, D]: each next token's embedding fused with the state before it.

        The embedding comes first in the concatenation.
        """
        assert h_BTD is not None  # EAGLE reads them
        f_BTD = project(jnp.concatenate([e_BTD, h_BTD], axis=-1), self.fc)
        has_bias = "fc_bias" in self.spec.param_shapes()
        return f_BTD + self.fc_bias.astype(f_BTD.dtype)[None, None] if has_bias else f_BTD

    def true_rows(self, h_BTD: jax.Array, next_BTD: jax.Array, positions_BT: jax.Array) -> KVRows:
        """Returns keys and values of true states, each fused with the token after it."""
        return self.keys_values(self.fuse(next_BTD, self.features(h_BTD)), positions_BT)

    def teacher_forced(self, e_BTD: jax.Array, h_BTD: jax.Array) -> jax.Array:
        """Predicts states [B, T - 1, D] of whole rows, at positions 1 to T - 1."""
        B, T = e_BTD.shape[:2]
        return self.row(e_BTD, h_BTD, causal_mask(jnp.full(B, T - 1), T - 1))

    def row(self, e_BLD: jax.Array, h_BLD: jax.Array, mask_BTT: jax.Array) -> jax.Array:
        """Predicts states [B, T, D] of rows of L = T + 1 positions.

        Entry j predicts position j + 1.

        e_BLD, h_BLD: embedding and true state of each position; this method shifts them. mask_BTT:
        which entries each entry sees, itself included (`masks.causal_mask`).
        """
        f_BTD = self.fuse(e_BLD[:, 1:], self.features(h_BLD[:, :-1]))
        return self.predict(f_BTD, self.attend(f_BTD, f_BTD, mask_BTT))


def init_eagle(spec: EagleSpec, key: jax.Array) -> dict[str, jax.Array]:
    """Initialises parameters: linear weights N(0, init_std), norms one, biases zero."""
    two = jnp.zeros((1, 2, spec.hidden_size), jnp.float32)
    return EagleBlock(spec).init(key, two, two, jnp.zeros((1, 1, 1), bool), method="row")["params"]

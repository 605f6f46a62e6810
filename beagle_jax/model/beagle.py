"""The Beagle draft: one cross-attention block (method.md sections 2 and 15).

The query is the embedding of the token at position i. Keys and values are projected from states at
positions below i; true and predicted states use the same projections. The block has no fusion
layer, no norm on keys and values, and no output norm: it predicts the target's state after the
final norm, and the target's frozen LM head reads the prediction.

With `state_layers`, keys and values of true states also have a projection of the streams that enter
these layers of the target. It starts at zero. Predicted states have no streams.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from beagle_jax.config import DraftConfig
from beagle_jax.model.cache import KVRows
from beagle_jax.model.draft import LayerBlock, LayerSpec, checked_layers, project
from beagle_jax.model.layers import rms_norm
from beagle_jax.model.target import FINAL, TargetSpec

_EPS = 1e-6  # added to the mean square of a stream


@dataclass(frozen=True, kw_only=True)
class BeagleSpec(LayerSpec):
    """Shape of the Beagle draft; a new one has the target's sizes (method.md 2.2)."""

    kind: ClassVar[str] = "beagle"
    model_type: ClassVar[str] = "beagle_draft"
    of_target: ClassVar[tuple[str, ...]] = ("hidden_size", "rope_theta", "rms_norm_eps")
    axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **LayerSpec.axes,
        "k_layers": ("inner", None),
        "v_layers": ("inner", None),
    }

    # streams of the target that keys and values of true states read beside the state, by the layer
    # that they enter; (): none, the paper's draft
    state_layers: tuple[int, ...] = ()

    @property
    def taps(self) -> tuple[int, ...]:
        """The streams, and the states after the final norm; () if the states are read alone."""
        return (*self.state_layers, FINAL) if self.state_layers else ()

    @classmethod
    def from_settings(cls, settings: DraftConfig, target: TargetSpec) -> Self:
        """Describes the new draft that a config asks for.

        Raises:
          UserError: a size does not fit, or the target lacks a stream of `draft.state_layers`.
        """
        spec = super().from_settings(settings, target)
        return replace(
            spec, state_layers=checked_layers(settings.state_layers or (), target.num_layers - 1)
        )

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every trainable tensor; matrices are [out, in], as in PyTorch."""
        shapes = super().param_shapes()
        if self.state_layers:
            width = len(self.state_layers) * self.hidden_size
            shapes |= {f"{name}_layers": (shapes[f"{name}_proj"][0], width) for name in "kv"}
        return shapes


class BeagleBlock(LayerBlock):
    """The draft in parts: queries from embeddings, keys and values from states."""

    zeros: ClassVar[tuple[str, ...]] = ("k_layers", "v_layers")

    spec: BeagleSpec

    def fuse(self, e_BTD: jax.Array, h_BTD: jax.Array | None) -> jax.Array:
        """Returns the layer's inputs [B, T, D]: the tokens' embeddings alone."""
        return e_BTD

    def true_rows(self, h_BTI: jax.Array, next_BTD: jax.Array, positions_BT: jax.Array) -> KVRows:
        """Returns keys and values of true states; the next tokens are not used."""
        return self.entry_rows(h_BTI, positions_BT)

    def entry_rows(self, x_BTI: jax.Array, positions_BT: jax.Array) -> KVRows:
        """Returns keys and values of true states, which stand after their streams in x_BTI."""
        if not self.spec.state_layers:
            return self.keys_values(x_BTI, positions_BT)
        D = self.spec.hidden_size
        streams_BTI, h_BTD = beside_state(x_BTI, D), x_BTI[..., -D:]
        of_state = self.keys_values(h_BTD, positions_BT)
        of_streams = self._rows(
            project(streams_BTI, self.k_layers), project(streams_BTI, self.v_layers), positions_BT
        )
        return KVRows(*(a + b for a, b in zip(of_state, of_streams, strict=True)))

    def teacher_forced(self, e_BTD: jax.Array, h_BTI: jax.Array) -> jax.Array:
        """Predicts states [B, T, D] of whole rows, each from the true states before it."""
        T = e_BTD.shape[1]
        return self(e_BTD, h_BTI, jnp.tri(T, k=-1, dtype=bool)[None])


def beside_state(x_BTI: jax.Array, D: int) -> jax.Array:
    """Returns the streams, each with the root mean square of its position's state.

    x_BTI: streams side by side and the state, D numbers each. Streams of different layers have very
    different sizes; this gives all of them the state's.
    """
    streams_BTSD = x_BTI[..., :-D].reshape(*x_BTI.shape[:2], -1, D)
    h_BTD = x_BTI[..., -D:].astype(jnp.float32)
    size_BT11 = jnp.sqrt(jnp.mean(jnp.square(h_BTD), axis=-1))[..., None, None]
    normed_BTSD = rms_norm(streams_BTSD.astype(jnp.float32), jnp.ones(D), _EPS) * size_BT11
    return normed_BTSD.astype(x_BTI.dtype).reshape(*x_BTI.shape[:2], -1)


def init_draft(spec: BeagleSpec, key: jax.Array) -> dict[str, jax.Array]:
    """Initialises parameters: linear weights N(0, init_std), norms one (method.md 2.4).

    The projections of streams start at zero (method.md 15).
    """
    x_11D = jnp.zeros((1, 1, spec.hidden_size), jnp.float32)
    x_11I = jnp.zeros((1, 1, spec.input_width), jnp.float32)
    return BeagleBlock(spec).init(key, x_11D, x_11I, jnp.zeros((1, 1, 1), bool))["params"]

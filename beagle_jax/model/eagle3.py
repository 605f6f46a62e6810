"""The EAGLE-3 draft: EAGLE's layer over features of several layers (method.md 14).

Entry j joins the token at position j + 1 with the feature g_j of position j, has rotary position j,
and predicts the token at j + 2, as EAGLE's. The feature of a true position is a linear map of the
streams that enter several layers of the target; that of a drafted position is the layer's own
output. The draft has a final norm and, as a rule, a head of its own over a vocabulary of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from beagle_jax.config import DraftConfig
from beagle_jax.model.cache import KVRows
from beagle_jax.model.draft import LayerSpec, checked_layers, project
from beagle_jax.model.eagle import EagleBlock
from beagle_jax.model.layers import RopeScaling, rms_norm, rope_tables
from beagle_jax.model.target import TargetSpec


@dataclass(frozen=True, kw_only=True)
class Eagle3Spec(LayerSpec):
    """Shape of the EAGLE-3 draft. `hidden_size` is its own width d, not the target's.

    The switches from `attention_bias` on are those of published drafts; a new draft has the
    defaults.
    """

    kind: ClassVar[str] = "eagle3"
    model_type: ClassVar[str] = "eagle3_draft"
    of_target: ClassVar[tuple[str, ...]] = ("target_hidden_size", "vocab_size")
    axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "fc": ("model", "inner"),
        **LayerSpec.axes,
    }

    target_hidden_size: int
    vocab_size: int  # of the target
    draft_vocab_size: int  # tokens that the draft scores
    # streams of the target that the features are made of, by the layer that they enter; the
    # target's number of layers stands for the stream that leaves the last one
    state_layers: tuple[int, ...]
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # biases of queries, keys, values and the output projection
    qk_norm: bool = False  # norms on each head's queries and keys before they are rotated (Qwen3)
    fc_bias: bool = False
    norm_before_residual: bool = False  # the residual is the normed feature
    norm_before_fc: bool = False  # one norm over all streams, side by side
    fc_norm: bool = False  # a norm over each stream
    norm_output: bool = False  # the next step's feature is the output after the final norm
    own_embedding: bool = False
    own_head: bool = True  # False: the target's rows of the scored tokens

    @property
    def taps(self) -> tuple[int, ...]:
        """The streams in the order of `state_layers`."""
        return self.state_layers

    @property
    def target_width(self) -> int:
        """D, the target's hidden size."""
        return self.target_hidden_size

    @classmethod
    def from_target(cls, spec: TargetSpec, init_std: float = 0.02) -> Self:
        """Describes a draft with the shape of one of the target's layers.

        It reads the streams that enter layers 2, L // 2 and L - 3 of L. Where these coincide or
        there is no such layer (L below 7), it reads fewer.
        """
        layers = spec.num_layers
        default = sorted({layer for layer in (2, layers // 2, layers - 3) if 0 <= layer <= layers})
        return cls(
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            rope_theta=spec.rope_theta,
            rms_norm_eps=spec.rms_norm_eps,
            embed_scale=spec.embed_scale,
            init_std=init_std,
            target_hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            draft_vocab_size=spec.vocab_size,
            state_layers=tuple(default),
        )

    @classmethod
    def from_settings(cls, settings: DraftConfig, target: TargetSpec) -> Self:
        """Describes the draft that a config asks for.

        Raises:
          UserError: a size does not fit, or the target lacks a stream of `draft.state_layers`.
        """
        spec = super().from_settings(settings, target)
        if settings.state_layers is None:
            return spec
        layers = checked_layers(settings.state_layers, target.num_layers)
        return replace(spec, state_layers=layers)

    def scoring(self, count: int) -> Self:
        """Returns the description of a draft whose head has `count` rows."""
        return replace(self, draft_vocab_size=count)

    def owning(self, *, own_embedding: bool, own_head: bool) -> Self:
        """Returns the description of a draft with or without tables of its own."""
        return replace(self, own_embedding=own_embedding, own_head=own_head)

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor; matrices are [out, in], as in PyTorch.

        fc_norm holds the weights of all streams' norms, one after another.
        """
        d, streams = self.hidden_size, len(self.state_layers) * self.target_hidden_size
        shapes: dict[str, tuple[int, ...]] = {"fc": (d, streams), **super().param_shapes()}
        shapes |= {f"{name}_proj": (shapes[f"{name}_proj"][0], 2 * d) for name in "qkv"}
        optional: dict[str, tuple[bool, tuple[int, ...]]] = {
            "fc_bias": (self.fc_bias, (d,)),
            "fc_input_norm": (self.norm_before_fc, (streams,)),
            "fc_norm": (self.fc_norm, (streams,)),
            **{
                f"{name}_bias": (self.attention_bias, shapes[f"{name}_proj"][:1]) for name in "qkvo"
            },
            **{f"{name}_norm": (self.qk_norm, (self.head_dim,)) for name in "qk"},
            "embed_VD": (self.own_embedding, (self.vocab_size, d)),
            "head_VD": (self.own_head, (self.draft_vocab_size, d)),
        }
        shapes |= {name: shape for name, (present, shape) in optional.items() if present}
        return {**shapes, "hidden_norm": (d,), "norm": (d,)}

    def rotary(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns cosines and sines [*positions.shape, H]."""
        return rope_tables(positions, self.head_dim, self.rope_theta, self.rope_scaling)

    def embedding(self, params: dict[str, jax.Array], target_VD: jax.Array) -> jax.Array:
        """Returns the target's embedding, or the draft's own; training changes neither."""
        return jax.lax.stop_gradient(params["embed_VD"]) if self.own_embedding else target_VD

    def final_norm(self, params: dict[str, jax.Array], state_BTD: jax.Array) -> jax.Array:
        """Returns what the head reads: the layer's output after the draft's final norm."""
        return rms_norm(state_BTD, params["norm"].astype(state_BTD.dtype), self.rms_norm_eps)

    def head(self, params: dict[str, jax.Array], target_VD: jax.Array) -> jax.Array:
        """Returns the draft's own head [V, d], or the target's rows."""
        return params["head_VD"] if self.own_head else target_VD


class Eagle3Block(EagleBlock):
    """The draft in parts. The layer's inputs are pairs: an embedding, and a feature beside it."""

    spec: Eagle3Spec

    def features(self, taps_BTI: jax.Array) -> jax.Array:
        """Returns g [B, T, d] of the target's streams, which stand side by side in taps_BTI."""
        spec = self.spec
        if spec.norm_before_fc:
            taps_BTI = self._norm("fc_input_norm", taps_BTI)
        if spec.fc_norm:
            streams = jnp.split(taps_BTI, len(spec.state_layers), axis=-1)
            weights = jnp.split(self.fc_norm.astype(taps_BTI.dtype), len(streams))
            pairs = zip(streams, weights, strict=True)
            normed = [rms_norm(x_BTD, weight_D, spec.rms_norm_eps) for x_BTD, weight_D in pairs]
            taps_BTI = jnp.concatenate(normed, axis=-1)
        g_BTD = project(taps_BTI, self.fc)
        return g_BTD + self.fc_bias.astype(g_BTD.dtype)[None, None] if spec.fc_bias else g_BTD

    def carried(self, state_BTD: jax.Array) -> jax.Array:
        """Returns the feature of a predicted position: the output, normed if the draft does so."""
        return self._norm("norm", state_BTD) if self.spec.norm_output else state_BTD

    def fuse(self, e_BTD: jax.Array, h_BTD: jax.Array | None) -> jax.Array:
        """Returns pairs [B, T, 2d]: each next token's embedding, and the feature before it."""
        assert h_BTD is not None, "EAGLE-3 joins each token with a feature"
        return jnp.concatenate([e_BTD, h_BTD], axis=-1)

    def queries(self, e_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns rotated queries [B, K, G, T, H] of pairs at their positions."""
        return self._rotate("q", self._projected("q", self._inputs(e_BTD)), positions_BT)

    def keys_values(self, h_BTD: jax.Array, positions_BT: jax.Array) -> KVRows:
        """Returns rotated keys, and values, of pairs at their positions."""
        return super().keys_values(self._inputs(h_BTD), positions_BT)

    def before_down(
        self, e_BTD: jax.Array, attended_BKGTH: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the residual stream [B, T, d] after attention and the MLP's inner [B, T, F].

        The stream begins with the pairs' features.
        """
        g_BTD = e_BTD[..., self.spec.hidden_size :]
        if self.spec.norm_before_residual:
            g_BTD = self._norm("hidden_norm", g_BTD)
        if self.spec.attention_bias:
            g_BTD = g_BTD + self.o_bias.astype(g_BTD.dtype)[None, None]
        return super().before_down(g_BTD, attended_BKGTH)

    def _inputs(self, pair_BTD: jax.Array) -> jax.Array:
        """Returns u [B, T, 2d]: embedding and feature, each normed."""
        e_BTD, g_BTD = jnp.split(pair_BTD, 2, axis=-1)
        normed = self._norm("input_layernorm", e_BTD), self._norm("hidden_norm", g_BTD)
        return jnp.concatenate(normed, axis=-1)

    def _head_norm(self, name: str, x_BKGTH: jax.Array) -> jax.Array:
        return self._norm(f"{name}_norm", x_BKGTH) if self.spec.qk_norm else x_BKGTH


def init_eagle3(spec: Eagle3Spec, key: jax.Array) -> dict[str, jax.Array]:
    """Initialises parameters: linear weights, head and embedding N(0, init_std), norms one."""
    two_12D = jnp.zeros((1, 2, spec.hidden_size), jnp.float32)
    taps_12I = jnp.zeros((1, 2, len(spec.taps) * spec.target_hidden_size), jnp.float32)
    sees_111 = jnp.zeros((1, 1, 1), bool)
    return Eagle3Block(spec).init(key, two_12D, taps_12I, sees_111, method="row")["params"]

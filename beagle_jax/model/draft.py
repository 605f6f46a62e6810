"""The interface of every trained draft, and the layer that Beagle and EAGLE share.

A kind of draft is a description (`DraftSpec`), a block of parameters and a way to initialise them;
model/kinds.py lists the kinds by name. Other packages decide which target states a draft reads and
how a stage trains it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from beagle_jax.config import DraftConfig
from beagle_jax.errors import UserError
from beagle_jax.model.attention import merge_attention, partial_attention
from beagle_jax.model.cache import KVRows
from beagle_jax.model.layers import apply_rope, join_heads, rms_norm, rope_tables, split_heads
from beagle_jax.model.target import FINAL, TargetSpec

# Sizes of a layer that a config may set; the target's where it does not.
SIZES = ("num_heads", "num_kv_heads", "head_dim", "intermediate_size")
_IN, _OUT = ("inner", "model"), ("model", "inner")  # to a layer's inner width, and back


@dataclass(frozen=True, kw_only=True)
class DraftSpec(ABC):
    """Description of a trained draft. Hashable; each kind is a subclass."""

    kind: ClassVar[str]  # its name in `draft.kind` and in each package's table of kinds
    model_type: ClassVar[str]  # in a draft's config.json
    # settings that must equal the target's; if they differ, the draft is for another target
    of_target: ClassVar[tuple[str, ...]] = ("hidden_size",)
    # logical axes of each parameter, by the names that ARRAYS uses (model/tensors.py); a parameter
    # without an entry is replicated
    axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}

    hidden_size: int
    embed_scale: float = 1.0  # multiplies the embedding that the draft reads

    if TYPE_CHECKING:  # the sizes that decoding's caches read from kinds with a layer
        intermediate_size: int
        num_heads: int
        num_kv_heads: int
        head_dim: int

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose outputs the draft reads, concatenated in this order.

        FINAL, as the last of them, stands for the states after the final norm. (): it reads these
        states alone, which are also what it predicts.
        """
        return ()

    @property
    def streams(self) -> tuple[int, ...]:
        """The taps that are streams of the target's layers."""
        return tuple(tap for tap in self.taps if tap != FINAL)

    @property
    def input_width(self) -> int:
        """Width of what the draft reads at a position of the target."""
        return self.target_width * max(len(self.taps), 1)

    @property
    def target_width(self) -> int:
        """The target's hidden size, which is a draft's own unless a kind says otherwise."""
        return self.hidden_size

    def embedding(self, params: dict[str, jax.Array], target_VD: jax.Array) -> jax.Array:
        """Returns the draft's token embedding: the target's, or a parameter of its own."""
        return target_VD

    def final_norm(self, params: dict[str, jax.Array], state_BTD: jax.Array) -> jax.Array:
        """Returns what the head reads: predicted states, or these after a norm of the draft."""
        return state_BTD

    def head(self, params: dict[str, jax.Array], target_VD: jax.Array) -> jax.Array:
        """Returns the draft's head: the target's, or a parameter of its own.

        target_VD: the target's rows for the tokens that the draft scores.
        """
        return target_VD

    def owns_head(self, params: dict[str, jax.Array]) -> bool:
        """Whether `head` returns a parameter, and not the target's rows."""
        targets_VD = jnp.zeros((0, 0))
        return self.head(params, targets_VD) is not targets_VD

    @classmethod
    @abstractmethod
    def from_target(cls, spec: TargetSpec, init_std: float = 0.02) -> Self:
        """Describes a new draft for this target.

        init_std: standard deviation of the initial linear weights.
        """

    @classmethod
    def from_settings(cls, settings: DraftConfig, target: TargetSpec) -> Self:
        """Describes the new draft that a config asks for.

        Raises:
          UserError: a setting does not fit the target.
        """
        return cls.from_target(target, settings.init_std)

    def scoring(self, count: int) -> Self:
        """Returns the description of a draft that scores `count` tokens of the vocabulary.

        Only kinds with a head of their own depend on it.
        """
        return self

    @abstractmethod
    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every trainable tensor; matrices are [out, in], as in PyTorch."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec(DraftSpec):
    """Shape of a draft of one decoder layer; a new one has the target's sizes (method.md 2.2)."""

    axes: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **dict.fromkeys(("q_proj", "gate_proj", "up_proj"), _IN),
        **dict.fromkeys(("k_proj", "v_proj"), ("kv", "model")),
        **dict.fromkeys(("o_proj", "down_proj"), _OUT),
    }

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    init_std: float = 0.02  # standard deviation of the initial linear weights
    # norms the inputs of queries; some published drafts do not (method.md 9.1)
    input_norm: bool = True

    @classmethod
    def from_target(cls, spec: TargetSpec, init_std: float = 0.02) -> Self:
        """Describes a draft with the shape of one of the target's layers."""
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
        )

    @classmethod
    def from_settings(cls, settings: DraftConfig, target: TargetSpec) -> Self:
        """Describes the new draft that a config asks for.

        Sizes that the config leaves out are the target's.

        Raises:
          UserError: a setting does not fit the target.
        """
        spec = cls.from_target(target, settings.init_std)
        sizes = {name: getattr(settings, name) for name in SIZES}
        spec = replace(spec, **{name: size for name, size in sizes.items() if size is not None})
        if spec.num_heads % spec.num_kv_heads:
            raise UserError(
                f"draft.num_heads is {spec.num_heads} and draft.num_kv_heads {spec.num_kv_heads} "
                f"(null: the target's, {target.num_heads} and {target.num_kv_heads}), but heads "
                "share keys and values in groups of one size; set the first to a multiple of the "
                "second"
            )
        return spec

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every trainable tensor; matrices are [out, in], as in PyTorch."""
        D, F = self.hidden_size, self.intermediate_size
        NH, KH = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {
            "q_proj": (NH, D),
            "k_proj": (KH, D),
            "v_proj": (KH, D),
            "o_proj": (D, NH),
            "gate_proj": (F, D),
            "up_proj": (F, D),
            "down_proj": (D, F),
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
        }
        return {
            name: shape
            for name, shape in shapes.items()
            if self.input_norm or name != "input_layernorm"
        }

    def rotary(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns cosines and sines [*positions.shape, H]."""
        return rope_tables(positions, self.head_dim, self.rope_theta)


class LayerBlock(nn.Module):
    """The layer in parts, which training and decoding combine differently.

    A subclass defines the layer's inputs (`fuse`, `true_rows`) and a pass over whole rows
    (`teacher_forced`). See method.md 4.5b, 6.2.
    """

    zeros: ClassVar[tuple[str, ...]] = ()  # matrices that start at zero

    spec: LayerSpec

    def setup(self) -> None:
        normal = nn.initializers.normal(self.spec.init_std)
        for name, shape in self.spec.param_shapes().items():
            first = normal if len(shape) == 2 else nn.initializers.ones
            if name.endswith("_bias") or name in self.zeros:
                first = nn.initializers.zeros
            setattr(self, name, self.param(name, first, shape))

    def features(self, taps_BTI: jax.Array) -> jax.Array:
        """Returns what `fuse` takes of true positions: the target's states as they are."""
        return taps_BTI

    def carried(self, state_BTD: jax.Array) -> jax.Array:
        """Returns what `fuse` takes of predicted positions: the predicted states as they are."""
        return state_BTD

    def fuse(self, e_BTD: jax.Array, h_BTD: jax.Array | None) -> jax.Array:
        """Returns the layer's inputs [B, T, D].

        e_BTD: embeddings of the tokens. h_BTD: the states before these tokens, if the kind reads
        them.
        """
        raise NotImplementedError

    def true_rows(self, h_BTD: jax.Array, next_BTD: jax.Array, positions_BT: jax.Array) -> KVRows:
        """Returns the keys and values of true states that decoding caches.

        next_BTD: embeddings of the tokens after these states, for kinds that need them.
        """
        raise NotImplementedError

    def teacher_forced(self, e_BTD: jax.Array, h_BTD: jax.Array) -> jax.Array:
        """Predicts states of whole rows, each from all true states before it.

        e_BTD, h_BTD: embedding and state of each position. A kind that needs a state before the
        token has no prediction for position 0.
        """
        raise NotImplementedError

    def queries(self, e_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns rotated queries [B, K, G, T, H] of token embeddings at their positions."""
        u_BTD = self._norm("input_layernorm", e_BTD) if self.spec.input_norm else e_BTD
        return self._rotate("q", self._projected("q", u_BTD), positions_BT)

    def keys_values(self, h_BTD: jax.Array, positions_BT: jax.Array) -> KVRows:
        """Returns rotated keys, and values, of true or predicted states at their positions."""
        return self._rows(self._projected("k", h_BTD), self._projected("v", h_BTD), positions_BT)

    def entry_rows(self, x_BTI: jax.Array, positions_BT: jax.Array) -> KVRows:
        """Returns keys and values of true entries: what `attend` takes, at their positions."""
        return self.keys_values(x_BTI, positions_BT)

    def _rows(self, k_BTF: jax.Array, v_BTF: jax.Array, positions_BT: jax.Array) -> KVRows:
        k_BKTH = self._rotate("k", k_BTF, positions_BT)[:, :, 0]
        v_BKTH = split_heads(v_BTF, self.spec.num_kv_heads, self.spec.head_dim)[:, :, 0]
        return KVRows(k_BKTH.swapaxes(2, 3), v_BKTH)

    def predict(self, e_BTD: jax.Array, attended_BKGTH: jax.Array) -> jax.Array:
        """Predicts states [B, T, D] from the embeddings and their queries' attention output."""
        y_BTD, gated_BTF = self.before_down(e_BTD, attended_BKGTH)
        return y_BTD + project(gated_BTF, self.down_proj)

    def before_down(
        self, e_BTD: jax.Array, attended_BKGTH: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the residual stream [B, T, D] after attention and the MLP's inner [B, T, F]."""
        y_BTD = e_BTD + project(join_heads(attended_BKGTH).astype(e_BTD.dtype), self.o_proj)
        z_BTD = self._norm("post_attention_layernorm", y_BTD)
        return y_BTD, jax.nn.silu(project(z_BTD, self.gate_proj)) * project(z_BTD, self.up_proj)

    def attend(
        self,
        e_BTD: jax.Array,
        h_BSI: jax.Array,
        mask_BTS: jax.Array,
        at_BT: jax.Array | None = None,
        at_BS: jax.Array | None = None,
    ) -> jax.Array:
        """Attention [B, K, G, T, H] of queries at positions at_BT over true entries at at_BS.

        Positions that are None are 0, 1, ..
        """
        at_BT = (
            jnp.broadcast_to(jnp.arange(e_BTD.shape[1]), e_BTD.shape[:2])
            if at_BT is None
            else at_BT
        )
        at_BS = (
            jnp.broadcast_to(jnp.arange(h_BSI.shape[1]), h_BSI.shape[:2])
            if at_BS is None
            else at_BS
        )
        rows = self.entry_rows(h_BSI, at_BS)
        return merge_attention(
            partial_attention(self.queries(e_BTD, at_BT), *rows, mask_BTS[:, None, None])
        )

    def __call__(
        self,
        e_BTD: jax.Array,
        h_BSI: jax.Array,
        mask_BTS: jax.Array,
        at_BT: jax.Array | None = None,
        at_BS: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts states [B, T, D] of whole rows with `attend` (method.md 2.1)."""
        return self.predict(e_BTD, self.attend(e_BTD, h_BSI, mask_BTS, at_BT, at_BS))

    def _norm(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """Norms with the weights of this name, in the dtype of x: float32 weights widen nothing."""
        weight_D = getattr(self, name).astype(x_BTD.dtype)
        return rms_norm(x_BTD, weight_D, self.spec.rms_norm_eps)

    def _projected(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """Projects to queries, keys or values ("q", "k", "v") [B, T, F].

        Adds the bias if the kind has one.
        """
        out_BTF = project(x_BTD, getattr(self, f"{name}_proj"))
        if f"{name}_bias" not in self.spec.param_shapes():
            return out_BTF
        return out_BTF + getattr(self, f"{name}_bias").astype(out_BTF.dtype)[None, None]

    def _head_norm(self, name: str, x_BKGTH: jax.Array) -> jax.Array:
        """Norms heads of queries or keys ("q", "k"), in kinds that do."""
        return x_BKGTH

    def _rotate(self, name: str, x_BTF: jax.Array, positions_BT: jax.Array) -> jax.Array:
        x_BKGTH = split_heads(x_BTF, self.spec.num_kv_heads, self.spec.head_dim)
        x_BKGTH = self._head_norm(name, x_BKGTH)
        cos_BTH, sin_BTH = self.spec.rotary(positions_BT)
        return apply_rope(x_BKGTH, cos_BTH[:, None, None], sin_BTH[:, None, None])


def checked_layers(layers: tuple[int, ...], last: int) -> tuple[int, ...]:
    """Returns the streams that `draft.state_layers` names.

    Raises:
      UserError: one is not between 0 and `last`.
    """
    if wrong := [layer for layer in layers if not 0 <= layer <= last]:
        raise UserError(
            f"draft.state_layers is {list(layers)}, but a draft of this kind can read the "
            f"target's streams 0 to {last}; leave out {wrong}"
        )
    return layers


def project(x_BTD: jax.Array, weight_FD: jax.Array) -> jax.Array:
    """Applies a linear map, [B, T, D] -> [B, T, F], in the dtype of x."""
    return jnp.einsum("BTD,FD->BTF", x_BTD, weight_FD.astype(x_BTD.dtype))

"""The frozen target: a Llama-family decoder as pure functions over a tree of arrays.

`TargetSpec` describes the architecture, `param_table` declares every tensor once (path, shape, Hugging Face
name), `forward` runs it. Matrices keep PyTorch's [out, in] layout and activations run as columns [D, M]: on a
CPU this makes eight rows cost little more than one (jax_notes C.18), and elsewhere it costs nothing.
The state of a token is the last hidden state after the final norm (method.md 1); logits are `head @ state`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from beagle_jax.errors import UserError
from beagle_jax.model.cache import KVRows, empty_rows
from beagle_jax.model.layers import apply_rope, merge_attention, partial_attention, rms_norm, rope_tables

Params = Mapping[str, Any]

# Products of 2, 3, 5, 6 or 7 columns run slower than those of 4 or 8 in XLA's CPU kernels (measured: 41 ms at
# 6 columns, 36 ms at 8, for all matrices of SmolLM2-135M), so columns are padded to a multiple of this.
_COLUMN_MULTIPLE = 4


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """Shape of a Llama-family decoder. Hashable, so that it can be a static argument of jit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_positions: int  # longest context the target was trained for, tokens
    tie_embeddings: bool  # the head is the embedding matrix

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], where: str) -> "TargetSpec":
        """Reads a Hugging Face `config.json`; raises UserError naming what this decoder cannot compute."""
        _refuse_unknown_architecture(config, where)
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in needed if key not in config]
        if missing:
            raise UserError(f"{where}: the model config lacks {', '.join(missing)}; give a complete config.json")
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rope_theta=_rope_theta(config, where),
            # The defaults below are Hugging Face's own for a Llama config that omits the key.
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            max_positions=config.get("max_position_embeddings", 2048),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def _refuse_unknown_architecture(config: Mapping[str, Any], where: str) -> None:
    model_type = config.get("model_type")
    if model_type != "llama":
        raise UserError(f"{where}: model_type is {model_type!r}; this version computes 'llama' (Llama, Vicuna, SmolLM2)")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(f"{where}: {key} is true; this version computes Llama blocks without biases")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act is {config['hidden_act']!r}; expected 'silu'")


def _rope_theta(config: Mapping[str, Any], where: str) -> float:
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{where}: rope type {kind!r} is not supported; expected 'default' (no scaling)")
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def param_table(spec: TargetSpec) -> dict[str, tuple[tuple[str | int, ...], tuple[int, ...]]]:
    """Every tensor of the target: Hugging Face name -> (path in the parameter tree, shape [out, in])."""
    D, F, V = spec.hidden_size, spec.intermediate_size, spec.vocab_size
    NH, KH = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    table: dict[str, tuple[tuple[str | int, ...], tuple[int, ...]]] = {
        "model.embed_tokens.weight": (("embed_VD",), (V, D)),
        "model.norm.weight": (("norm_D",), (D,)),
    }
    if not spec.tie_embeddings:
        table["lm_head.weight"] = (("head_VD",), (V, D))
    per_layer = {
        "input_layernorm": ("input_norm_D", (D,)),
        "self_attn.q_proj": ("q_FD", (NH, D)),
        "self_attn.k_proj": ("k_FD", (KH, D)),
        "self_attn.v_proj": ("v_FD", (KH, D)),
        "self_attn.o_proj": ("o_DF", (D, NH)),
        "post_attention_layernorm": ("mlp_norm_D", (D,)),
        "mlp.gate_proj": ("gate_FD", (F, D)),
        "mlp.up_proj": ("up_FD", (F, D)),
        "mlp.down_proj": ("down_DF", (D, F)),
    }
    for layer in range(spec.num_layers):
        for name, (key, shape) in per_layer.items():
            table[f"model.layers.{layer}.{name}.weight"] = (("layers", layer, key), shape)
    return table


def head(params: Params) -> jax.Array:
    """The LM head [V, D]: its own matrix, or the embedding when tied."""
    return params["head_VD"] if "head_VD" in params else params["embed_VD"]


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Embedding rows e(x) [*tokens.shape, D]."""
    return params["embed_VD"][tokens]


def logits(params: Params, states: jax.Array) -> jax.Array:
    """Logits in float32, [*states.shape[:-1], V], computed on columns as `forward` does.

    The barrier keeps XLA from carrying the last transpose back into the layers: with it a step of 256 rows takes
    0.55 s on a CPU, without it 0.77 to 0.92 (measured).
    """
    states = jax.lax.optimization_barrier(states)
    return logit_columns(head(params), states).T.reshape(*states.shape[:-1], -1)


def best_tokens(params: Params, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most likely next token after each state, int32 [*states.shape[:-1]], and whether its logit is finite.

    Reduces over the columns' first axis: with a transpose in between, XLA turns the product around to the row form,
    which takes 100 ms instead of 7 for four rows on a CPU (measured).
    """
    columns_VM = logit_columns(head(params), states)
    best_M = jnp.argmax(columns_VM, axis=0).astype(jnp.int32)
    # A NaN counts as the largest, so looking at the largest finds any.
    finite_M = jnp.isfinite(jnp.take_along_axis(columns_VM, best_M[None], axis=0)[0])
    return best_M.reshape(states.shape[:-1]), finite_M.reshape(states.shape[:-1])


def logit_columns(head_VD: jax.Array, states: jax.Array) -> jax.Array:
    """Float32 logits as columns [V, M], one for each of the M states [.., D]."""
    columns_DM = states.reshape(-1, states.shape[-1]).T
    count = columns_DM.shape[1]
    padded_DM = jnp.pad(columns_DM, ((0, 0), (0, _column_padding(count))))
    return jnp.einsum("VD,DM->VM", head_VD, padded_DM, preferred_element_type=jnp.float32)[:, :count]


def init_cache(spec: TargetSpec, batch: int, capacity: int, dtype: jnp.dtype) -> list[KVRows]:
    """An empty cache of `capacity` slots for every layer."""
    return [empty_rows(batch, spec.num_kv_heads, capacity, spec.head_dim, dtype) for _ in range(spec.num_layers)]


def forward(
    params: Params,
    spec: TargetSpec,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    mask_BTT: jax.Array,
    cache: Sequence[KVRows] | None = None,
    visible_BS: jax.Array | None = None,
) -> tuple[jax.Array, list[KVRows]]:
    """Runs T new tokens per sequence. The cache is only read; the caller writes the rows it wants to keep.

    mask_BTT: which new tokens (last axis) each new token (middle axis) sees: causal, or a tree's ancestors-or-self.
    cache, visible_BS: rows of earlier tokens, and which slots of them every new token of a sequence sees.
    Returns the states [B, T, D] after the final norm, and the key/value rows of the T tokens in each layer.
    """
    B, T = tokens_BT.shape
    cos_BTH, sin_BTH = rope_tables(positions_BT, spec.head_dim, spec.rope_theta)
    rotary = (cos_BTH[:, None, None], sin_BTH[:, None, None])
    slots = visible_BS[:, None, None, None] if cache else None
    x_DM = params["embed_VD"][tokens_BT.reshape(-1)].T
    x_DM = jnp.pad(x_DM, ((0, 0), (0, _column_padding(B * T))))
    new_rows = []
    for index, layer in enumerate(params["layers"]):
        with jax.named_scope(f"layer_{index}"):
            past = cache[index] if cache else None
            y_DM = rms_norm(x_DM, layer["input_norm_D"], spec.rms_norm_eps, axis=0)
            attended_DM, rows = _attention(layer, spec, y_DM, (B, T), rotary, mask_BTT, past, slots)
            x_DM = x_DM + attended_DM
            x_DM = x_DM + _swiglu(layer, rms_norm(x_DM, layer["mlp_norm_D"], spec.rms_norm_eps, axis=0))
            new_rows.append(rows)
    x_DM = rms_norm(x_DM, params["norm_D"], spec.rms_norm_eps, axis=0)
    return x_DM[:, : B * T].T.reshape(B, T, -1), new_rows


def _column_padding(count: int) -> int:
    return 0 if count == 1 else -count % _COLUMN_MULTIPLE


def _attention(layer, spec, y_DM, batch_shape, rotary, mask_BTT, past, slots):
    """Grouped-query attention of the new tokens over the cache and each other; returns [D, M] and the new rows."""
    B, T = batch_shape
    K, H, M = spec.num_kv_heads, spec.head_dim, y_DM.shape[1]
    q_BKGTH = apply_rope(_heads(layer["q_FD"], y_DM, B, T, K, H), *rotary)
    k_BK1TH = apply_rope(_heads(layer["k_FD"], y_DM, B, T, K, H), *rotary)
    rows = KVRows(k_BK1TH[:, :, 0].swapaxes(2, 3), _heads(layer["v_FD"], y_DM, B, T, K, H)[:, :, 0])
    parts = [partial_attention(q_BKGTH, *rows, mask_BTT[:, None, None])]
    if past is not None:
        parts.append(partial_attention(q_BKGTH, *past, slots))
    out_FM = merge_attention(*parts).astype(y_DM.dtype).transpose(1, 2, 4, 0, 3).reshape(-1, B * T)
    out_FM = jnp.pad(out_FM, ((0, 0), (0, M - B * T)))
    return jnp.einsum("DF,FM->DM", layer["o_DF"], out_FM), rows


def _heads(weight_FD: jax.Array, y_DM: jax.Array, B: int, T: int, K: int, H: int) -> jax.Array:
    """Projects columns and lays them out as [B, K, G, T, H], padding columns dropped."""
    out_FM = jnp.einsum("FD,DM->FM", weight_FD, y_DM)[:, : B * T]
    return out_FM.reshape(K, -1, H, B, T).transpose(3, 0, 1, 4, 2)


def _swiglu(layer: Params, y_DM: jax.Array) -> jax.Array:
    gate_FM = jnp.einsum("FD,DM->FM", layer["gate_FD"], y_DM)
    up_FM = jnp.einsum("FD,DM->FM", layer["up_FD"], y_DM)
    return jnp.einsum("DF,FM->DM", layer["down_DF"], jax.nn.silu(gate_FM) * up_FM)

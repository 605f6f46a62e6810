"""The frozen target: a Llama-family decoder as pure functions over a tree of arrays.

`TargetSpec` describes the architecture (`model/families.py` reads it from a config),
`model/tensors.py` declares its arrays, `forward` runs it. Matrices have PyTorch's [out, in] layout,
and activations are columns [D, M]. This layout was chosen on two Intel Xeon cores (2.3 GHz), where
eight columns cost little more than one (`python -m beagle_jax.tune` prints the cost per number of
columns); on a GPU, cuBLAS treats both layouts alike, and on a TPU it has not been measured. The
state of a token is the last hidden state after the final norm (method.md 1); logits are `head @
state`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from beagle_jax.arrays import AnyArray
from beagle_jax.model.attention import (
    PartialAttention,
    merge_attention,
    partial_attention,
    soft_cap,
)
from beagle_jax.model.cache import KVRows, empty_rows, finite
from beagle_jax.model.config_values import check_values, given_values
from beagle_jax.model.experts import Experts, choose, grouped, on_devices, routed
from beagle_jax.model.families import read_config
from beagle_jax.model.joined import GATE_UP, QKV, TURNED, split
from beagle_jax.model.layers import RopeFactors, RopeScaling, apply_rope, rms_norm, rope_tables
from beagle_jax.model.masks import causal_mask, within_window
from beagle_jax.model.precision import exact
from beagle_jax.model.quantised import times
from beagle_jax.model.tensors import JOINED, bias_key
from beagle_jax.model.wrapped import text_config

Params = Mapping[str, Any]

Rotary = tuple[jax.Array, jax.Array]  # cosines and sines [B, 1, 1, T, H]
# The tap (`forward`) that stands for the states after the final norm.
FINAL = -1

# Columns are padded to a multiple of this, for XLA's CPU kernels: products of 2, 3, 5, 6 or 7
# columns are slower there than those of 4 or 8. On two Intel Xeon cores (2.3 GHz), all matrices of
# SmolLM2-135M took 41 ms at 6 columns and 36 ms at 8. TPUs pad to larger tiles anyway.
_COLUMN_MULTIPLE = 4
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


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
    max_positions: int  # longest context that the target was trained for, in tokens
    tie_embeddings: bool  # the head is the embedding matrix

    # Additions of families to plain Llama.
    biases: tuple[
        str, ...
    ] = ()  # projections with a bias, by Hugging Face name: "self_attn.q_proj"
    qk_norm: bool = False  # norms on each head's queries and keys before they are rotated
    qk_norm_whole: bool = False  # these norms are over all heads together (OLMo 2)
    rotary_dim: int | None = None  # numbers of a head that are rotated; None: all
    unrotated: tuple[int, ...] = ()  # layers without a rotary embedding
    rope_scaling: RopeScaling | RopeFactors | None = None
    windows: tuple[
        int | None, ...
    ] = ()  # per layer, the number of tokens that a token sees, itself included; None: all
    local_rope_theta: float | None = (
        None  # unscaled rotary base of the layers with a window; None: that of all
    )
    experts: Experts | None = None  # routed experts in place of the MLP
    # norms multiply by norm_offset + weight; if it is not 0, in float32 with one rounding (Gemma)
    norm_offset: float = 0.0
    pre_norms: bool = True  # norms on the inputs of attention and MLP
    post_norms: bool = False  # norms on the outputs of attention and MLP
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the MLP's gate
    embed_scale: float = 1.0  # factor of input embeddings; a tied head is not scaled
    score_scale: float | None = None  # factor of attention scores; None: head_dim ** -0.5
    # attention scores are squeezed into -cap..cap (attention.soft_cap)
    score_cap: float | None = None
    # the same for logits; a draft's scores and losses need no cap, because it keeps the order
    logit_cap: float | None = None

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], where: str) -> "TargetSpec":
        """Reads a Hugging Face `config.json`.

        Raises:
          UserError: the config asks for something this decoder cannot compute. The message names
            it.
        """
        config = text_config(config)
        check_values(config, where)
        return cls(**read_config(given_values(config), where))

    @property
    def shortest_window(self) -> int | None:
        """Number of tokens up to which no sliding window hides any; None without windows."""
        return min((window for window in self.windows if window is not None), default=None)


def head(params: Params) -> jax.Array:
    """Returns the LM head [V, D], which is the embedding if they are tied."""
    return params["head_VD"] if "head_VD" in params else params["embed_VD"]


def embed(embed_VD: jax.Array, tokens: AnyArray, scale: float = 1.0) -> jax.Array:
    """Returns embedding vectors e(x) [*tokens.shape, D].

    scale: the target's `embed_scale`.
    """
    rows = embed_VD[tokens]
    return rows if scale == 1.0 else rows * jnp.asarray(scale, rows.dtype)


@exact
def logits(params: Params, spec: TargetSpec, states: jax.Array) -> jax.Array:
    """Returns float32 logits [*states.shape[:-1], V], computed on columns as in `forward`.

    The barrier keeps XLA from moving the last transpose into the layers. It was measured only on
    two Intel Xeon cores (2.3 GHz), where a step of 256 rows of SmolLM2-135M
    (`benchmarks/writing_answers.py`) took 0.55 s with it and 0.77 to 0.92 s without.
    """
    states = jax.lax.optimization_barrier(states)
    return soft_cap(logit_columns(head(params), states), spec.logit_cap).T.reshape(
        *states.shape[:-1], -1
    )


@exact
def best_tokens(params: Params, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the most likely next token of each state, int32 [*states.shape[:-1]].

    Also returns whether its logit is finite. A cap of the logits would not change the result.

    It reduces over the first axis of the columns. With a transpose in between, XLA computes the
    product by rows: 100 ms instead of 7 for four rows of SmolLM2-135M on two Intel Xeon cores
    (2.3 GHz), the only machine on which this was measured.
    """
    columns_VM = logit_columns(head(params), states)
    best_M = jnp.argmax(columns_VM, axis=0).astype(jnp.int32)
    # argmax treats NaN as the largest value, so checking the largest one finds any NaN.
    finite_M = jnp.isfinite(jnp.take_along_axis(columns_VM, best_M[None], axis=0)[0])
    return best_M.reshape(states.shape[:-1]), finite_M.reshape(states.shape[:-1])


def logit_columns(head_VD: jax.Array, states: jax.Array) -> jax.Array:
    """Returns float32 logits as columns [V, M], for the M states [.., D]."""
    columns_DM = states.reshape(-1, states.shape[-1]).T
    count = columns_DM.shape[1]
    padded_DM = jnp.pad(columns_DM, ((0, 0), (0, _column_padding(count))))
    return jnp.einsum("VD,DM->VM", head_VD, padded_DM, preferred_element_type=jnp.float32)[
        :, :count
    ]


def init_cache(spec: TargetSpec, batch: int, capacity: int, dtype: jnp.dtype) -> list[KVRows]:
    """Returns an empty cache of `capacity` slots for every layer."""
    return [
        empty_rows(batch, spec.num_kv_heads, capacity, spec.head_dim, dtype)
        for _ in range(spec.num_layers)
    ]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward:
    """The results of `forward` for T new tokens of each sequence.

    Unpacks as states and rows, for callers that need no taps.
    """

    states_BTD: jax.Array  # after the final norm; `logits` takes these
    rows: list[KVRows]  # keys and values of the T tokens, a pair for each layer
    taps: tuple[jax.Array, ...] = ()  # the requested residual streams [B, T, D], in that order

    @property
    def tapped_BTI(self) -> jax.Array | None:
        """The requested streams side by side, or None if there are none."""
        return jnp.concatenate(self.taps, axis=-1) if self.taps else None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.states_BTD, self.rows))


@exact
def forward(
    params: Params,
    spec: TargetSpec,
    tokens_BT: AnyArray,
    positions_BT: jax.Array,
    mask_BTT: jax.Array,
    cache: Sequence[KVRows] | None = None,
    visible_BS: jax.Array | None = None,
    slot_positions_BS: jax.Array | None = None,
    *,
    taps: Sequence[int] = (),
) -> Forward:
    """Runs T new tokens of each sequence through the target.

    The cache is only read; the caller writes the new keys and values to it.

    Args:
      params: the target's arrays.
      spec: its architecture.
      tokens_BT: ids of the new tokens.
      positions_BT: their positions in the text.
      mask_BTT: which new tokens (last axis) each new token (middle axis) sees: causal, or a tree's
        ancestors-or-self.
      cache: keys and values of earlier tokens in each layer; None if there are none.
      visible_BS: cache slots that all new tokens of a sequence see.
      slot_positions_BS: positions of the slots, for sliding windows; None: the slots' numbers.
      taps: layers whose input is returned too, without a norm: 0 is the embedding, i the residual
        stream that enters layer i, `num_layers` the stream that leaves the last layer. FINAL is
        the states, after the final norm. Without taps the compiled program is the same as if the
        argument did not exist.

    Raises:
      ValueError: a tap is neither FINAL nor between 0 and `num_layers`.
    """
    wrong = [tap for tap in taps if not (tap == FINAL or 0 <= tap <= spec.num_layers)]
    if wrong:
        raise ValueError(f"taps {wrong}: the target has streams 0 to {spec.num_layers}")
    B, T = tokens_BT.shape
    sees, rotary = (
        _layer_masks(spec, positions_BT, mask_BTT, visible_BS, slot_positions_BS),
        _layer_rotary(spec, positions_BT),
    )
    x_DM = embed(params["embed_VD"], tokens_BT.reshape(-1), spec.embed_scale).T
    x_DM = jnp.pad(x_DM, ((0, 0), (0, _column_padding(B * T))))

    def unpadded(columns_DM: jax.Array) -> jax.Array:
        return columns_DM[:, : B * T].T.reshape(B, T, -1)

    new_rows, streams = [], {}
    for index, layer in enumerate(params["layers"]):
        if index in taps:
            streams[index] = unpadded(x_DM)
        with jax.named_scope(f"layer_{index}"):
            past = cache[index] if cache else None
            x_DM, rows = _block(layer, spec, x_DM, (B, T), rotary[index], past, *sees[index])
            new_rows.append(rows)
    if spec.num_layers in taps:
        streams[spec.num_layers] = unpadded(x_DM)
    states_BTD = streams[FINAL] = unpadded(_norm(spec, x_DM, params["norm_D"], axis=0))
    return Forward(states_BTD, new_rows, tuple(streams[tap] for tap in taps))


def _block(
    layer: Params,
    spec: TargetSpec,
    x_DM: jax.Array,
    batch_shape: tuple[int, int],
    rotary: Rotary | None,
    past: KVRows | None,
    mask_BTT: jax.Array,
    slots: jax.Array | None,
) -> tuple[jax.Array, KVRows]:
    """Runs one layer; returns the residual stream after it, and the new keys and values."""
    norm = partial(_norm, spec, axis=0)
    y_DM = norm(x_DM, layer["input_norm_D"]) if spec.pre_norms else x_DM
    y_DM, rows = _attention(layer, spec, y_DM, batch_shape, rotary, past, mask_BTT, slots)
    x_DM = x_DM + (norm(y_DM, layer["after_attention_norm_D"]) if spec.post_norms else y_DM)
    y_DM = norm(x_DM, layer["mlp_norm_D"]) if spec.pre_norms else x_DM
    y_DM = _mlp(layer, spec, y_DM, batch_shape[0] * batch_shape[1])
    return x_DM + (norm(y_DM, layer["after_mlp_norm_D"]) if spec.post_norms else y_DM), rows


@exact
def causal_layer(layer: Params, spec: TargetSpec, index: int, x_BTD: jax.Array) -> jax.Array:
    """Runs one layer of `forward` on texts without padding and without a cache.

    x_BTD: the residual stream before the layer. Returns the stream after it.
    """
    B, T, D = x_BTD.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    sees = _layer_masks(spec, positions_BT, causal_mask(jnp.full(B, T), T), None)[index]
    out_DM, _ = _block(
        layer,
        spec,
        x_BTD.reshape(B * T, D).T,
        (B, T),
        _layer_rotary(spec, positions_BT)[index],
        None,
        *sees,
    )
    return out_DM.T.reshape(B, T, D)


def final_norm(params: Params, spec: TargetSpec, x_BTD: jax.Array) -> jax.Array:
    """Returns the states [B, T, D] of the residual stream after the last layer."""
    return _norm(spec, x_BTD, params["norm_D"])


def _norm(spec: TargetSpec, x: jax.Array, weight_D: jax.Array, axis: int = -1) -> jax.Array:
    return rms_norm(x, weight_D, spec.rms_norm_eps, axis, offset=spec.norm_offset)


def _column_padding(count: int) -> int:
    return 0 if count == 1 else -count % _COLUMN_MULTIPLE


def _layer_masks(
    spec: TargetSpec,
    positions_BT: jax.Array,
    mask_BTT: jax.Array,
    visible_BS: jax.Array | None,
    slot_positions_BS: jax.Array | None = None,
) -> list[tuple[jax.Array, jax.Array | None]]:
    """Returns, for each layer, the masks over new tokens and over slots.

    The mask over slots is None without a cache.
    """
    slots = None if visible_BS is None else visible_BS[:, None, None, None]
    masks: dict[int | None, tuple[jax.Array, jax.Array | None]] = {None: (mask_BTT, slots)}
    for window in set(spec.windows):
        if window is None:
            continue
        near_slots = slots
        if visible_BS is not None and slots is not None:
            at_BS = slot_positions_BS
            if at_BS is None:
                at_BS = jnp.arange(visible_BS.shape[1])[None]
            near_slots = slots & within_window(positions_BT, at_BS, window)[:, None, None]
        masks[window] = (mask_BTT & within_window(positions_BT, positions_BT, window), near_slots)
    return [masks[window] for window in spec.windows or (None,) * spec.num_layers]


def _layer_rotary(spec: TargetSpec, positions_BT: jax.Array) -> list[Rotary | None]:
    """Returns, for each layer, cosines and sines [B, 1, 1, T, H] of its rotary embedding.

    None for layers without one.
    """

    def tables(theta: float, scaling: RopeScaling | RopeFactors | None) -> Rotary:
        width = spec.rotary_dim or spec.head_dim
        cos_BTH, sin_BTH = rope_tables(positions_BT, width, theta, scaling)
        return cos_BTH[:, None, None], sin_BTH[:, None, None]

    far = near = tables(spec.rope_theta, spec.rope_scaling)
    if spec.local_rope_theta is not None:
        near = tables(spec.local_rope_theta, None)
    windows = spec.windows or (None,) * spec.num_layers
    return [
        None if layer in spec.unrotated else far if window is None else near
        for layer, window in enumerate(windows)
    ]


def _attention(
    layer: Params,
    spec: TargetSpec,
    y_DM: jax.Array,
    batch_shape: tuple[int, int],
    rotary: Rotary | None,
    past: KVRows | None,
    mask_BTT: jax.Array,
    slots: jax.Array | None,
) -> tuple[jax.Array, KVRows]:
    """Grouped-query attention of the new tokens over the cache and each other.

    Returns the output [D, M] and the new keys and values.
    """
    B, T = batch_shape
    K, H, M = spec.num_kv_heads, spec.head_dim, y_DM.shape[1]
    q_FM, k_FM, v_FM = _project_all(layer, QKV, y_DM)
    if spec.qk_norm_whole:
        q_FM = _norm(spec, q_FM, layer["q_norm_F"], axis=0)
        k_FM = _norm(spec, k_FM, layer["k_norm_F"], axis=0)
    q_BKGTH, k_BK1TH, v_BK1TH = (_heads(x_FM, B, T, K, H) for x_FM in (q_FM, k_FM, v_FM))
    if spec.qk_norm:
        q_BKGTH, k_BK1TH = (
            _norm(spec, q_BKGTH, layer["q_norm_H"]),
            _norm(spec, k_BK1TH, layer["k_norm_H"]),
        )
    if rotary is not None:
        q_BKGTH, k_BK1TH = apply_rope(q_BKGTH, *rotary), apply_rope(k_BK1TH, *rotary)
    rows = KVRows(k_BK1TH[:, :, 0].swapaxes(2, 3), v_BK1TH[:, :, 0])
    attend = partial(partial_attention, scale=spec.score_scale, cap=spec.score_cap)
    parts = [_attend_new(attend, q_BKGTH, rows, mask_BTT)]
    if past is not None:
        assert slots is not None  # a cache comes with the mask of its slots
        parts.append(attend(q_BKGTH, *past, slots))
    out_FM = merge_attention(*parts).astype(y_DM.dtype).transpose(1, 2, 4, 0, 3).reshape(-1, B * T)
    out_FM = jnp.pad(out_FM, ((0, 0), (0, M - B * T)))
    return _project(layer, "o_DF", out_FM), rows


def _attend_new(
    attend: Callable[..., PartialAttention], q_BKGTH: jax.Array, rows: KVRows, mask_BTT: jax.Array
) -> PartialAttention:
    """Attention over the new tokens' own keys and values.

    A token whose values are not finite affects only its own output. In a plain product, a masked
    value would reach other tokens too, as 0 times infinity, and a rejected draft token must not
    change the result. Tokens that follow such a token in an answer are unusable too
    (decoding/round.py).
    """
    v_BKTH = rows.v_BKSH
    if v_BKTH.shape[2] == 1:
        return attend(q_BKGTH, *rows, mask_BTT[:, None, None])
    part = attend(q_BKGTH, rows.k_BKHS, finite(v_BKTH), mask_BTT[:, None, None])
    own_BK1TH = (v_BKTH - v_BKTH)[:, :, None].astype(jnp.float32)  # 0, or NaN where not finite
    return part._replace(out_BKGTH=part.out_BKGTH + own_BK1TH)


def _project(layer: Params, key: str, x_IM: jax.Array) -> jax.Array:
    """Projects columns, [I, M] -> [.., O, M], and adds the bias if there is one."""
    out_OM = times(layer[key], x_IM)
    bias = layer.get(bias_key(key))
    return out_OM if bias is None else out_OM + bias[..., None]


def _project_all(layer: Params, key: str, x_IM: jax.Array) -> Iterator[jax.Array]:
    """Yields the columns [F, M] of projections that may be joined under this key."""
    if key in layer:
        yield from split(key, _project(layer, key, x_IM))
    else:
        yield from (_project(layer, part, x_IM) for part in JOINED[key].parts)


def _heads(out_FM: jax.Array, B: int, T: int, K: int, H: int) -> jax.Array:
    """Reshapes projected columns to [B, K, G, T, H] and drops padding columns."""
    return out_FM[:, : B * T].reshape(K, -1, H, B, T).transpose(3, 0, 1, 4, 2)


def _mlp(layer: Params, spec: TargetSpec, y_DM: jax.Array, count: int) -> jax.Array:
    """Applies the gated MLP, or routed experts.

    count: columns that are not padding.
    """
    act = _ACTIVATIONS[spec.activation]
    if "router_ED" not in layer:
        gate_FM, up_FM = _project_all(layer, GATE_UP, y_DM)
        return _project(layer, "down_DF", act(gate_FM) * up_FM)

    assert spec.experts is not None  # a layer with a router belongs to them
    choice = choose(layer["router_ED"], spec.experts, y_DM, count)
    form, keys = routed, [JOINED[key].parts[0] for key in TURNED]
    if TURNED[0] in layer:
        form, keys = grouped, list(TURNED)
    total_DM = on_devices(form, keys, spec.experts.spread)(
        choice, [layer[key] for key in keys], act, y_DM
    )
    return total_DM.astype(y_DM.dtype)

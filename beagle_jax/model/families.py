"""Supported Hugging Face configs, and what each family adds to plain Llama.

Reads a config and returns the fields of `model.target.TargetSpec`; no arrays are involved. Each
family has an entry in `_FAMILIES`. A setting that no field describes is an error that names it.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from beagle_jax.errors import UserError
from beagle_jax.model.experts import Experts
from beagle_jax.model.rope_config import Rope, read_rope

Config = Mapping[str, Any]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SLIDING, _FULL = "sliding_attention", "full_attention"


class _Gemma(NamedTuple):
    """Differences between Gemma's generations; Hugging Face's defaults for missing keys."""

    score_cap: float | None
    logit_cap: float | None
    score_size: int | None = 256  # scores are divided by its square root; None: the head width


class _Family(NamedTuple):
    """Properties of a model_type that its config does not state.

    Fields after `gemma` are Hugging Face's defaults for missing keys.
    """

    known_as: str
    biases: tuple[str, ...] = ()  # projections that always have one
    may_bias: tuple[str, ...] = ()  # settings of the config that add more
    qk_norm: bool = False
    # Norms of queries and keys are over all heads together.
    qk_norm_whole: bool = False
    # Norms before attention and MLP, after them, or both.
    norms: Literal["before", "after", "both"] = "before"
    # Layers without a rotary embedding. listed: those with a 0 in no_rope_layers.
    unrotated: Literal["none", "listed", "without window"] = "none"
    partial: bool = False  # a part of each head may be rotated
    # Layers with a sliding window. never: none; always: all; asked: all, if use_sliding_window is
    # set; late: as asked, except Qwen's first layers; mixed: all except every nth; hybrid: as
    # mixed, or none if sliding_window is null.
    windowed: Literal["never", "always", "asked", "late", "mixed", "hybrid"] = "never"
    local_theta: float | None = None  # rotary base of layers with a window; None: that of all
    experts: tuple[str, str, str, str] | None = None  # see Experts.names
    experts_only: bool = False  # every layer has them, and their chosen shares always sum to 1
    gemma: _Gemma | None = None  # Gemma's norms, scales, GELU and soft caps
    window: int | None = 4096
    every: int = 1  # n of windowed = "mixed"
    kv_heads: int | None = None  # None: the number of heads
    head_dim: int | None = None  # None: hidden_size / heads
    max_positions: int = 32768
    theta: float = 1e4
    eps: float = 1e-6
    tied: bool = False


_later_gemma = functools.partial(
    _Family,
    may_bias=("attention_bias",),
    norms="both",
    windowed="mixed",
    kv_heads=4,
    head_dim=256,
)
_FAMILIES = {
    "llama": _Family(
        "Llama, Vicuna, SmolLM2", may_bias=("attention_bias", "mlp_bias"), max_positions=2048
    ),
    "mistral": _Family("Mistral", windowed="always", kv_heads=8, max_positions=131072),
    "mixtral": _Family(
        "Mixtral",
        windowed="always",
        window=None,
        kv_heads=8,
        max_positions=131072,
        theta=1e6,
        eps=1e-5,
        experts_only=True,
        experts=(
            "block_sparse_moe.gate",
            "block_sparse_moe.experts.{}.w1",
            "block_sparse_moe.experts.{}.w3",
            "block_sparse_moe.experts.{}.w2",
        ),
    ),
    "qwen2": _Family("Qwen2, Qwen2.5", biases=_QKV, windowed="late", kv_heads=32),
    "qwen3": _Family(
        "Qwen3",
        may_bias=("attention_bias",),
        qk_norm=True,
        windowed="late",
        kv_heads=32,
        head_dim=128,
    ),
    "qwen3_moe": _Family(
        "Qwen3-MoE",
        may_bias=("attention_bias",),
        qk_norm=True,
        windowed="asked",
        kv_heads=4,
        experts=(
            "mlp.gate",
            "mlp.experts.{}.gate_proj",
            "mlp.experts.{}.up_proj",
            "mlp.experts.{}.down_proj",
        ),
    ),
    "gemma": _Family(
        "Gemma",
        may_bias=("attention_bias",),
        kv_heads=16,
        head_dim=256,
        max_positions=8192,
        gemma=_Gemma(None, None, score_size=None),
    ),
    "gemma2": _later_gemma("Gemma 2", every=2, max_positions=8192, gemma=_Gemma(50.0, 30.0)),
    "gemma3_text": _later_gemma(
        "Gemma 3 text",
        qk_norm=True,
        every=6,
        max_positions=131072,
        theta=1e6,
        local_theta=1e4,
        gemma=_Gemma(None, None),
    ),
    "olmo2": _Family(
        "OLMo 2",
        may_bias=("attention_bias",),
        qk_norm_whole=True,
        norms="after",
        max_positions=2048,
        eps=1e-5,
    ),
    "olmo3": _Family(
        "OLMo 3",
        may_bias=("attention_bias",),
        qk_norm_whole=True,
        norms="after",
        windowed="mixed",
        every=4,
        local_theta=5e5,
        max_positions=2048,
        theta=5e5,
        eps=1e-5,
    ),
    "smollm3": _Family(
        "SmolLM3",
        may_bias=("attention_bias", "mlp_bias"),
        unrotated="listed",
        kv_heads=4,
        theta=2e6,
        tied=True,
    ),
    "exaone4": _Family(
        "EXAONE 4.0",
        qk_norm=True,
        norms="after",
        windowed="hybrid",
        every=4,
        unrotated="without window",
        kv_heads=32,
        max_positions=2048,
        eps=1e-5,
    ),
    "phi3": _Family(
        "Phi-3, Phi-4-mini",
        windowed="always",
        window=None,
        partial=True,
        max_positions=4096,
        eps=1e-5,
    ),
}
# What these ask for that no field of the description says.
_REFUSED = {
    "granite": "scales of embeddings, residuals and logits",
    "granitemoe": "scales of embeddings, residuals and logits",
    "glm4": "norms and rotary pairs of another order",
    "gpt_oss": "attention sinks, and experts with biases and another activation",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "kimi_k2": "multi-head latent attention",
    "qwen3_next": "layers of linear attention",
    "kimi_linear": "layers of linear attention",
    "minimax": "layers of linear attention",
    "falcon_h1": "layers of a state space model",
    "nemotron_h": "layers of a state space model",
    "llama4_text": "attention in chunks and experts beside a shared one",
}
_BIASED_BY = {"attention_bias": _ATTENTION, "mlp_bias": _MLP}


def read_config(config: Config, where: str) -> dict[str, Any]:
    """Returns the fields of a TargetSpec.

    Raises:
      UserError: the config asks for something this decoder cannot compute. The message names it.
    """
    family = _family(config, where)
    _check_complete(
        config,
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ),
        where,
    )
    heads = config["num_attention_heads"]
    rope, windows = _rope(config, family, where), _windows(config, family, where)
    return dict(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        # null stands for the number of heads; a missing key has the family's default.
        num_kv_heads=config.get("num_key_value_heads", family.kv_heads) or heads,
        head_dim=config.get("head_dim", family.head_dim) or config["hidden_size"] // heads,
        rope_theta=rope.theta,
        rms_norm_eps=config.get("rms_norm_eps", family.eps),
        max_positions=config.get("max_position_embeddings", family.max_positions),
        tie_embeddings=bool(
            config.get("tie_word_embeddings", family.tied or family.gemma is not None)
        ),
        biases=_biases(config, family, where),
        qk_norm=family.qk_norm,
        qk_norm_whole=family.qk_norm_whole,
        rope_scaling=rope.scaling,
        rotary_dim=rope.rotary_dim,
        local_rope_theta=_local_theta(config, family, where),
        unrotated=_unrotated(config, family, windows),
        windows=windows,
        pre_norms=family.norms != "after",
        post_norms=family.norms != "before",
        experts=_experts(config, family, where),
        **_gemma(config, family, where),
    )


def is_family(model_type: object) -> bool:
    """Returns whether this is the `model_type` of a family that can be computed."""
    return isinstance(model_type, str) and model_type in _FAMILIES


def _family(config: Config, where: str) -> _Family:
    model_type = config.get("model_type")
    if model_type in _REFUSED:
        raise UserError(
            f"{where}: model_type {model_type!r} is not supported: it has {_REFUSED[model_type]}, "
            "which this decoder does not compute"
        )
    if model_type not in _FAMILIES:
        known = ", ".join(f"{name!r} ({family.known_as})" for name, family in _FAMILIES.items())
        raise UserError(f"{where}: model_type is {model_type!r}; this version supports {known}")
    family = _FAMILIES[model_type]
    key, expected = (
        ("hidden_activation", "gelu_pytorch_tanh") if family.gemma else ("hidden_act", "silu")
    )
    if (config.get(key) or expected) != expected:
        raise UserError(f"{where}: {key} is {config[key]!r}; expected {expected!r}")
    # Gemma's first releases say "gelu" but use its tanh approximation.
    if model_type == "gemma" and config.get("hidden_act", "gelu") not in ("gelu", expected):
        raise UserError(f"{where}: hidden_act is {config['hidden_act']!r}; expected {expected!r}")
    return family


def _check_complete(
    config: Config, needed: tuple[str, ...], where: str, part: str = "the model config"
) -> None:
    missing = [key for key in needed if key not in config]
    if missing:
        raise UserError(f"{where}: {part} lacks {', '.join(missing)}; give a complete config.json")


def _biases(config: Config, family: _Family, where: str) -> tuple[str, ...]:
    """Returns the projections that have a bias."""
    biased = family.biases
    for setting, projections in _BIASED_BY.items():
        if config.get(setting) and not set(projections) <= set(biased):
            if setting not in family.may_bias:
                raise UserError(
                    f"{where}: {setting} is true, which {config['model_type']!r} does not have"
                )
            biased += projections
    return biased


def _rope(config: Config, family: _Family, where: str) -> Rope:
    """Returns base and scaling of the rotary embedding.

    If layers with a window have their own, returns those of layers without one.
    """
    # transformers 5 writes rope_parameters (for Gemma 3, one per kind of layer); older files have
    # rope_theta and rope_scaling.
    rope: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get(_FULL) or {} if {_FULL, _SLIDING} & set(rope) else rope
    heads = config["num_attention_heads"]
    return read_rope(
        config,
        rope,
        where,
        head_dim=config.get("head_dim", family.head_dim) or config["hidden_size"] // heads,
        context=config.get("max_position_embeddings", family.max_positions),
        theta=family.theta,
        may_be_partial=family.partial,
    )


def _local_theta(config: Config, family: _Family, where: str) -> float | None:
    """Returns the rotary base of layers with a window; None if it is that of all.

    Raises:
      UserError: these layers have scaling.
    """
    if family.local_theta is None:
        return None
    rope: Config = config.get("rope_parameters") or {}
    local: Config = rope.get(_SLIDING) or {}
    if local.get("rope_type", "default") != "default":
        raise UserError(
            f"{where}: rope type {local['rope_type']!r} of sliding layers is not supported; "
            "expected 'default'"
        )
    theta: float = local.get("rope_theta", config.get("rope_local_base_freq", family.local_theta))
    return float(theta)


def _unrotated(config: Config, family: _Family, windows: tuple[int | None, ...]) -> tuple[int, ...]:
    """Returns the layers without a rotary embedding."""
    layers = range(config["num_hidden_layers"])
    if family.unrotated == "without window":  # of a model that has windows elsewhere
        return tuple(layer for layer in layers if windows and windows[layer] is None)
    if family.unrotated != "listed":
        return ()
    every = config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [(layer + 1) % every for layer in layers]
    return tuple(layer for layer in layers if not rotated[layer])


def _windows(config: Config, family: _Family, where: str) -> tuple[int | None, ...]:
    """Returns the sliding window of each layer; empty if no layer has one.

    None stands for a layer that sees everything.
    """
    enabled = family.windowed in ("always", "mixed", "hybrid") or (
        family.windowed != "never" and config.get("use_sliding_window", False)
    )
    window = config.get("sliding_window", family.window) if enabled else None
    if window is None:
        if family.windowed == "mixed":
            raise UserError(
                f"{where}: sliding_window is null; {config['model_type']!r} needs a number of "
                "tokens"
            )
        return ()
    layers = config["num_hidden_layers"]
    types = config.get("layer_types") or _layer_types(config, family)
    if family.windowed in ("always", "asked") and set(types) != {_SLIDING}:
        raise UserError(
            f"{where}: layer_types mixes kinds of attention, which {config['model_type']!r} "
            "does not have"
        )
    unknown = sorted(set(types) - {_SLIDING, _FULL})
    if unknown or len(types) != layers:
        raise UserError(
            f"{where}: layer_types has {len(types)} "
            f"entries{f', among them {unknown[0]!r}' if unknown else ''}; expected {layers} of "
            "'sliding_attention' or 'full_attention'"
        )
    windows = tuple(window if kind == _SLIDING else None for kind in types)
    return windows if any(windows) else ()


def _layer_types(config: Config, family: _Family) -> list[str]:
    """Returns the family's default for a config that does not list its layers' types."""
    every, layers = config.get("sliding_window_pattern", family.every), config["num_hidden_layers"]
    if isinstance(every, str):  # the last layer sees everything, whatever the letters say
        full_at = [every[layer % len(every)] == "G" for layer in range(layers - 1)] + [True]
        return [_FULL if full else _SLIDING for full in full_at]
    every = every or layers + 1
    full = {
        "late": lambda layer: layer < config.get("max_window_layers", 28),
        "mixed": lambda layer: (layer + 1) % every == 0,
        "hybrid": lambda layer: (layer + 1) % every == 0,
    }.get(family.windowed, lambda layer: False)
    return [_FULL if full(layer) else _SLIDING for layer in range(layers)]


def _experts(config: Config, family: _Family, where: str) -> Experts | None:
    """Returns the routed experts, None if the family has none."""
    if family.experts is None:
        return None
    # transformers 5 writes num_local_experts for every family.
    count_key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    width_key = "intermediate_size" if family.experts_only else "moe_intermediate_size"
    _check_complete(config, (count_key, "num_experts_per_tok", width_key), where)
    count, per_token = config[count_key], config["num_experts_per_tok"]
    if not 1 <= per_token <= count:
        raise UserError(
            f"{where}: num_experts_per_tok is {per_token}; expected 1 to {count} ({count_key})"
        )
    renormalised = True
    dense: tuple[int, ...] = ()
    if not family.experts_only:
        renormalised = bool(config.get("norm_topk_prob", False))
        step, plain = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
        dense = tuple(
            layer
            for layer in range(config["num_hidden_layers"])
            if layer in plain or (layer + 1) % step
        )
    return Experts(count, per_token, config[width_key], renormalised, dense, family.experts)


def _gemma(config: Config, family: _Family, where: str) -> dict[str, Any]:
    """Returns the fields that only Gemma has; {} for other families."""
    if family.gemma is None:
        return {}
    if config.get("use_bidirectional_attention"):
        raise UserError(
            f"{where}: use_bidirectional_attention is true; this version decodes causal models only"
        )
    size = config.get("query_pre_attn_scalar", family.gemma.score_size)
    return dict(
        norm_offset=1.0,
        activation="gelu_tanh",
        embed_scale=config["hidden_size"] ** 0.5,
        score_scale=None if size is None else size**-0.5,
        score_cap=config.get("attn_logit_softcapping", family.gemma.score_cap),
        logit_cap=config.get("final_logit_softcapping", family.gemma.logit_cap),
    )

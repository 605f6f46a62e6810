"""Supported Hugging Face configs, and what each family adds to plain Llama.

Reads a config and returns the fields of `model.target.TargetSpec`; no arrays are involved. Each
family has an entry in `_FAMILIES`. A setting that no field describes is an error that names it.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from beagle_jax.errors import UserError
from beagle_jax.model.experts import Experts
from beagle_jax.model.layers import RopeFactors, RopeScaling

Config = Mapping[str, Any]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SLIDING, _FULL = "sliding_attention", "full_attention"


class _Gemma(NamedTuple):
    """Differences between Gemma's generations; Hugging Face's defaults for missing keys."""

    score_cap: float | None
    logit_cap: float | None
    local_theta: float | None  # rotary base of layers with a window; None: that of the others
    post_norms: bool = True  # norms after attention and MLP too
    score_size: int | None = 256  # scores are divided by its square root; None: the head width


class _Family(NamedTuple):
    """Properties of a model_type that its config does not state.

    Fields after `gemma` are Hugging Face's defaults for missing keys.
    """

    known_as: str
    biases: tuple[str, ...] = ()  # projections that always have one
    may_bias: tuple[str, ...] = ()  # settings of the config that add more
    qk_norm: bool = False
    # Layers with a sliding window. never: none; always: all; asked: all, if use_sliding_window is
    # set; late: as asked, except Qwen's first layers; mixed: all except every nth.
    windowed: Literal["never", "always", "asked", "late", "mixed"] = "never"
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


_later_gemma = functools.partial(
    _Family, may_bias=("attention_bias",), windowed="mixed", kv_heads=4, head_dim=256
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
        gemma=_Gemma(None, None, None, post_norms=False, score_size=None),
    ),
    "gemma2": _later_gemma("Gemma 2", every=2, max_positions=8192, gemma=_Gemma(50.0, 30.0, None)),
    "gemma3_text": _later_gemma(
        "Gemma 3 text",
        qk_norm=True,
        every=6,
        max_positions=131072,
        theta=1e6,
        gemma=_Gemma(None, None, 1e4),
    ),
}
_BIASED_BY = {"attention_bias": _ATTENTION, "mlp_bias": _MLP}
# The keys that each rope type needs; other types are errors.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


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
    theta, scaling = _rope(config, family, where)
    return dict(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        # null stands for the number of heads; a missing key has the family's default.
        num_kv_heads=config.get("num_key_value_heads", family.kv_heads) or heads,
        head_dim=config.get("head_dim", family.head_dim) or config["hidden_size"] // heads,
        rope_theta=theta,
        rms_norm_eps=config.get("rms_norm_eps", family.eps),
        max_positions=config.get("max_position_embeddings", family.max_positions),
        tie_embeddings=bool(config.get("tie_word_embeddings", family.gemma is not None)),
        biases=_biases(config, family, where),
        qk_norm=family.qk_norm,
        rope_scaling=scaling,
        windows=_windows(config, family, where),
        experts=_experts(config, family, where),
        **_gemma(config, family, where),
    )


def is_family(model_type: object) -> bool:
    """Returns whether this is the `model_type` of a family that can be computed."""
    return isinstance(model_type, str) and model_type in _FAMILIES


def _family(config: Config, where: str) -> _Family:
    model_type = config.get("model_type")
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


def _rope(
    config: Config, family: _Family, where: str
) -> tuple[float, RopeScaling | RopeFactors | None]:
    """Returns base and scaling of the rotary embedding.

    If layers with a window have their own, returns those of layers without one.
    """
    # transformers 5 writes rope_parameters (for Gemma 3, one per kind of layer); older files have
    # rope_theta and rope_scaling.
    rope: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get(_FULL) or {} if {_FULL, _SLIDING} & set(rope) else rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise UserError(
            f"{where}: rope type {kind!r} is not supported; expected one of "
            f"{', '.join(map(repr, _ROPE_KEYS))}"
        )
    _check_complete(rope, _ROPE_KEYS[kind], where, f"rope type {kind!r}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UserError(
            f"{where}: partial_rotary_factor is {partial}; this version rotates whole heads (1.0)"
        )
    outer_theta: float = config.get("rope_theta", family.theta)
    theta = float(rope.get("rope_theta", outer_theta))
    if kind == "longrope":
        return theta, _rope_factors(config, rope, where)
    values = [float(rope[key]) for key in _ROPE_KEYS[kind]]
    return theta, RopeScaling(*values) if values else None


def _rope_factors(config: Config, rope: Config, where: str) -> RopeFactors:
    """Returns the factors of longrope.

    Supported if short and long texts have the same factors and the scores' scale is unchanged.
    """
    factors = tuple(map(float, rope["short_factor"]))
    if rope["long_factor"] != rope["short_factor"] or rope.get("attention_factor") != 1.0:
        raise UserError(
            f"{where}: rope type 'longrope' is not supported with long_factor other than "
            "short_factor, or attention_factor other than 1.0"
        )
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if len(factors) != head_dim // 2:
        raise UserError(
            f"{where}: short_factor has {len(factors)} numbers, expected {head_dim // 2}, one "
            "per rotary pair"
        )
    return RopeFactors(factors)


def _windows(config: Config, family: _Family, where: str) -> tuple[int | None, ...]:
    """Returns the sliding window of each layer; empty if no layer has one.

    None stands for a layer that sees everything.
    """
    enabled = family.windowed in ("always", "mixed") or (
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
    every = config.get("sliding_window_pattern", family.every)
    full = {
        "late": lambda layer: layer < config.get("max_window_layers", 28),
        "mixed": lambda layer: (layer + 1) % every == 0,
    }.get(family.windowed, lambda layer: False)
    return [_FULL if full(layer) else _SLIDING for layer in range(config["num_hidden_layers"])]


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
    local_theta = family.gemma.local_theta
    if local_theta is not None:
        rope: Config = config.get("rope_parameters") or {}
        local: Config = rope.get(_SLIDING) or {}
        if local.get("rope_type", "default") != "default":
            raise UserError(
                f"{where}: rope type {local['rope_type']!r} of sliding layers is not "
                "supported; expected 'default'"
            )
        local_theta = float(
            local.get("rope_theta", config.get("rope_local_base_freq", local_theta))
        )
    size = config.get("query_pre_attn_scalar", family.gemma.score_size)
    return dict(
        norm_offset=1.0,
        post_norms=family.gemma.post_norms,
        activation="gelu_tanh",
        embed_scale=config["hidden_size"] ** 0.5,
        score_scale=None if size is None else size**-0.5,
        score_cap=config.get("attn_logit_softcapping", family.gemma.score_cap),
        logit_cap=config.get("final_logit_softcapping", family.gemma.logit_cap),
        local_rope_theta=local_theta,
    )

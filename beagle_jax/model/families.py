"""Which Hugging Face configs this decoder computes, and what each family adds to plain Llama.

Knows config.json and nothing of arrays: a config goes in, the fields of `model.target.TargetSpec` come out. A family is
one line of `_FAMILIES`; what a config asks for and no field describes is refused by name.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from beagle_jax.errors import UserError
from beagle_jax.model.layers import RopeScaling

Config = Mapping[str, Any]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class _Family(NamedTuple):
    """What a model_type means beyond what its config says. The last four are Hugging Face's own for a missing key."""

    known_as: str
    biases: tuple[str, ...] = ()  # projections that always have one
    may_bias: tuple[str, ...] = ()  # settings of the config that add more
    qk_norm: bool = False
    windowed: Literal["never", "always", "if asked"] = "never"  # always: every layer; if asked: see use_sliding_window
    window: int = 4096
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / heads
    max_positions: int = 32768


_FAMILIES = {
    "llama": _Family("Llama, Vicuna, SmolLM2", may_bias=("attention_bias", "mlp_bias"), max_positions=2048),
    "mistral": _Family("Mistral", windowed="always", kv_heads=8, max_positions=131072),
    "qwen2": _Family("Qwen2, Qwen2.5", biases=_QKV, windowed="if asked", kv_heads=32),
    "qwen3": _Family("Qwen3", may_bias=("attention_bias",), qk_norm=True, windowed="if asked", kv_heads=32, head_dim=128),
}
_BIASED_BY = {"attention_bias": _ATTENTION, "mlp_bias": _MLP}
# The keys that each rope type needs; the types that are not here are refused.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(config: Config, where: str) -> dict[str, Any]:
    """The fields of a TargetSpec; raises UserError naming what this decoder cannot compute."""
    family = _family(config, where)
    _check_complete(config, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), where)
    heads = config["num_attention_heads"]
    theta, scaling = _rope(config, where)
    return dict(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        # A key that is null stands for the number of heads; one that is missing stands for the family's default.
        num_kv_heads=config.get("num_key_value_heads", family.kv_heads) or heads,
        head_dim=config.get("head_dim", family.head_dim) or config["hidden_size"] // heads,
        rope_theta=theta,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        max_positions=config.get("max_position_embeddings", family.max_positions),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        biases=_biases(config, family, where),
        qk_norm=family.qk_norm,
        rope_scaling=scaling,
        windows=_windows(config, family, where),
    )


def _family(config: Config, where: str) -> _Family:
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        known = ", ".join(f"{name!r} ({family.known_as})" for name, family in _FAMILIES.items())
        raise UserError(f"{where}: model_type is {model_type!r}; this version computes {known}")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act is {config['hidden_act']!r}; expected 'silu'")
    return _FAMILIES[model_type]


def _check_complete(config: Config, needed: tuple[str, ...], where: str, part: str = "the model config") -> None:
    missing = [key for key in needed if key not in config]
    if missing:
        raise UserError(f"{where}: {part} lacks {', '.join(missing)}; give a complete config.json")


def _biases(config: Config, family: _Family, where: str) -> tuple[str, ...]:
    """Projections with a bias."""
    found = family.biases
    for setting, projections in _BIASED_BY.items():
        if config.get(setting) and not set(projections) <= set(found):
            if setting not in family.may_bias:
                raise UserError(f"{where}: {setting} is true, which {config['model_type']!r} does not have")
            found += projections
    return found


def _rope(config: Config, where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding."""
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise UserError(f"{where}: rope type {kind!r} is not supported; expected one of {', '.join(map(repr, _ROPE_KEYS))}")
    _check_complete(rope, _ROPE_KEYS[kind], where, f"rope type {kind!r}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is {partial}; this version rotates whole heads (1.0)")
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    values = [float(rope[key]) for key in _ROPE_KEYS[kind]]
    return theta, RopeScaling(*values) if values else None


def _windows(config: Config, family: _Family, where: str) -> tuple[int | None, ...]:
    """The sliding window of each layer, None for one that sees everything; empty when no layer has one."""
    asked = family.windowed == "always" or (family.windowed == "if asked" and config.get("use_sliding_window", False))
    window = config.get("sliding_window", family.window) if asked else None
    if window is None:
        return ()
    layers = config["num_hidden_layers"]
    # Qwen's first layers see everything; Mistral has no such setting.
    first = 0 if family.windowed == "always" else config.get("max_window_layers", 28)
    types = config.get("layer_types") or ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if family.windowed == "always" and set(types) != {"sliding_attention"}:
        raise UserError(f"{where}: layer_types mixes kinds of attention, which {config['model_type']!r} does not have")
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown or len(types) != layers:
        raise UserError(f"{where}: layer_types has {len(types)} entries{f', among them {unknown[0]!r}' if unknown else ''}; expected "
                        f"{layers} of 'sliding_attention' or 'full_attention'")  # fmt: skip
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()

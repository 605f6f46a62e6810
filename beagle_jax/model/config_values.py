"""Checks the types and ranges of values in a Hugging Face config.

`model/families.py` interprets them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from beagle_jax.errors import UserError

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_COUNTS = (
    *_NEEDED,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "original_max_position_embeddings",
    "no_rope_layer_interval",
)
_NUMBERS = (
    "rope_theta",
    "rms_norm_eps",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_SWITCHES = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "norm_topk_prob",
    "use_bidirectional_attention",
)
_NAMES = ("model_type", "hidden_act", "hidden_activation", "rope_type", "type")
_ROPE = ("rope_parameters", "rope_scaling")
_LAYER_KINDS = ("full_attention", "sliding_attention")  # Gemma 3 has rope_parameters of each
_ROPE_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "rope_theta",
    "partial_rotary_factor",
)
_ROPE_LISTS = ("short_factor", "long_factor")
# Keys whose null differs from a missing key: null means no window, no cap, or a size that follows
# from others; a missing key has the family's default (model/families.py).
_NULL_MEANS = (
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_QUANTISED = ("quantization_config", "compression_config")
_MOST_LAYERS = 10_000  # limits the table of all tensors, which is built before any is read
_LARGEST = 2**31  # largest count
_LARGEST_NUMBER = 3e38  # about the largest float32


def given_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config without keys whose value is null; such keys take their defaults.

    Keys in _NULL_MEANS stay.
    """
    return {
        key: given_values(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value is not None or key in _NULL_MEANS
    }


def check_values(config: Mapping[str, Any], where: str) -> None:
    """Checks that every known key has a possible value; null stands for no value.

    Raises:
      UserError: some values are impossible. The message names their keys.
    """
    for key in _QUANTISED:
        if config.get(key) and fp8_block(config) is None:
            method = config[key].get("quant_method") if isinstance(config[key], Mapping) else None
            raise UserError(
                f"{where}: the model config has {key} ({method or config[key]!r}); this version "
                "reads weights in float32, float16 or bfloat16, and fp8 with weight_block_size; "
                "use the original model, and target.quantize to make it smaller"
            )
    problems = [f"{key} is null" for key in _NEEDED if key in config and config[key] is None]
    problems += _wrong(config, _COUNTS, _is_count, "a whole number above zero")
    problems += _wrong(config, _NUMBERS, _is_positive, "a number above zero")
    problems += _wrong(config, _SWITCHES, lambda value: isinstance(value, bool), "true or false")
    problems += _wrong(config, _NAMES, lambda value: isinstance(value, str), "a name")
    problems += _wrong(config, ("max_window_layers",), _is_index, "a whole number from zero")
    problems += _wrong(config, ("layer_types",), _list_of(_is_name), "a list of names")
    problems += _wrong(config, ("mlp_only_layers",), _list_of(_is_index), "a list of layers")
    problems += _wrong(config, ("no_rope_layers",), _list_of(_is_index), "a list of 0 and 1")
    pattern = ("sliding_window_pattern",)
    if config.get("model_type") == "exaone4":  # its local and global layers
        problems += _wrong(config, pattern, _is_pattern, "a number from zero, or letters L and G")
    else:
        problems += _wrong(config, pattern, _is_count, "a whole number above zero")
    for key in _ROPE:
        problems += _wrong_rope(config, key)
    if not problems:
        problems = _contradictions(config)
    if problems:
        raise UserError(
            f"{where}: the model config is not valid: {'; '.join(problems)}; is its file whole?"
        )


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns rows and columns of the blocks of fp8 weights; None if there are none."""
    given = config.get("quantization_config")
    if not isinstance(given, Mapping) or given.get("quant_method") != "fp8":
        return None
    block = given.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(map(_is_count, block)):
        return None
    return block[0], block[1]


def _wrong_rope(config: Mapping[str, Any], key: str) -> list[str]:
    """Lists the problems of a part of the config that describes the rotary embedding."""
    problems = _wrong(config, (key,), lambda value: isinstance(value, Mapping), "an object")
    rope = config.get(key)
    if problems or rope is None:
        return problems
    inner = _wrong(rope, _ROPE_NUMBERS, _is_positive, "a number above zero")
    inner += _wrong(rope, _NAMES, _is_name, "a name")
    inner += _wrong(rope, _ROPE_LISTS, _list_of(_is_positive), "a list of numbers above zero")
    for kind in _LAYER_KINDS:
        inner += _wrong_rope(rope, kind)
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if not inner and low is not None and high is not None and low >= high:
        inner.append(f"low_freq_factor is {low}, expected less than high_freq_factor ({high})")
    return [f"{key}.{problem}" for problem in inner]


def _contradictions(config: Mapping[str, Any]) -> list[str]:
    heads, problems = config.get("num_attention_heads"), []
    if heads and config.get("num_key_value_heads") and heads % config["num_key_value_heads"]:
        problems.append(
            f"{heads} attention heads cannot share {config['num_key_value_heads']} key/value heads"
        )
    if heads and not config.get("head_dim") and config.get("hidden_size", heads) % heads:
        problems.append(
            f"hidden_size {config['hidden_size']} is no multiple of {heads} heads, and "
            "head_dim is missing"
        )
    layers, rotated = config.get("num_hidden_layers") or 0, config.get("no_rope_layers")
    if rotated and len(rotated) < layers:
        problems.append(f"no_rope_layers has {len(rotated)} entries, expected {layers}")
    if layers > _MOST_LAYERS:
        problems.append(f"num_hidden_layers is {config['num_hidden_layers']}")
    return problems


def _wrong(
    config: Mapping[str, Any], keys: tuple[str, ...], fits: Callable[[Any], bool], expected: str
) -> list[str]:
    return [
        f"{key} is {config[key]!r}, expected {expected}"
        for key in keys
        if config.get(key) is not None and not fits(config[key])
    ]


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < _LARGEST_NUMBER


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < _LARGEST


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_pattern(value: Any) -> bool:
    letters = isinstance(value, str) and bool(value) and set(value) <= {"L", "G"}
    return _is_index(value) or letters


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))

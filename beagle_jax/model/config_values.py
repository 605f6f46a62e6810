"""What kind of value each key of a Hugging Face config may hold; what it means is
`model/families.py`'s to know.
"""

import math
from collections.abc import Mapping
from typing import Any

from beagle_jax.errors import UserError

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_COUNTS = (*_NEEDED, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
_NUMBERS = ("rope_theta", "rms_norm_eps", "partial_rotary_factor")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_NAMES = ("model_type", "hidden_act", "rope_type", "type")
_ROPE = ("rope_parameters", "rope_scaling")
_ROPE_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    *_NUMBERS,
)
_MOST_LAYERS = 10_000  # a table of all tensors is made before any is read


def check_values(config: Mapping[str, Any], where: str) -> None:
    """Raises UserError naming the keys whose values cannot be what they stand for. null stands for
    no value.
    """
    problems = [f"{key} is null" for key in _NEEDED if key in config and config[key] is None]
    problems += _wrong(
        config, _COUNTS, lambda value: type(value) is int and value > 0, "a whole number above zero"
    )
    problems += _wrong(config, _NUMBERS, _is_positive, "a number above zero")
    problems += _wrong(config, _SWITCHES, lambda value: isinstance(value, bool), "true or false")
    problems += _wrong(config, _NAMES, lambda value: isinstance(value, str), "a name")
    problems += _wrong(config, _ROPE, lambda value: isinstance(value, Mapping), "an object")
    for key in _ROPE:
        if isinstance(config.get(key), Mapping):
            problems += [
                f"{key}.{one}"
                for one in _wrong(config[key], _ROPE_NUMBERS, _is_positive, "a number above zero")
            ]
            problems += [
                f"{key}.{one}"
                for one in _wrong(
                    config[key], _NAMES, lambda value: isinstance(value, str), "a name"
                )
            ]
    if not problems:
        problems = _contradictions(config)
    if problems:
        raise UserError(
            f"{where}: the model config cannot be right: {'; '.join(problems)}; is its file whole?"
        )


def _contradictions(config: Mapping[str, Any]) -> list[str]:
    heads, problems = config.get("num_attention_heads"), []
    if heads and config.get("num_key_value_heads") and heads % config["num_key_value_heads"]:
        problems.append(
            f"{heads} attention heads cannot share {config['num_key_value_heads']} key/value heads"
        )
    if heads and not config.get("head_dim") and config.get("hidden_size", heads) % heads:
        problems.append(
            f"hidden_size {config['hidden_size']} is no multiple of {heads} heads, and there "
            "is no head_dim"
        )
    if (config.get("num_hidden_layers") or 0) > _MOST_LAYERS:
        problems.append(f"num_hidden_layers is {config['num_hidden_layers']}")
    return problems


def _wrong(config: Mapping[str, Any], keys: tuple[str, ...], fits, expected: str) -> list[str]:
    return [
        f"{key} is {config[key]!r}, expected {expected}"
        for key in keys
        if config.get(key) is not None and not fits(config[key])
    ]


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf

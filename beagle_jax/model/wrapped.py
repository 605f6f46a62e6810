"""Text models that a multimodal config wraps: their config, and their tensors' names."""

from collections.abc import Mapping
from typing import Any

# model_type of a wrapper -> what Hugging Face takes for keys that its text_config leaves out
_TEXT: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    }
}
# What stands beside text_config and is the text model's too.
_OUTER = ("eos_token_id", "bos_token_id", "pad_token_id", "torch_dtype", "quantization_config")
# Prefixes of the text model's tensors, and what they are elsewhere; longer ones first.
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "lm_head.": "lm_head.",
}


def is_wrapper(config: Mapping[str, Any]) -> bool:
    """Whether a config describes a text model among others."""
    model_type = config.get("model_type")
    known = isinstance(model_type, str) and model_type in _TEXT
    return known and isinstance(config.get("text_config"), Mapping)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the text model's own config; one that wraps nothing is returned as it is."""
    if not is_wrapper(config):
        return config
    outer = {key: config[key] for key in _OUTER if key in config}
    given = {key: value for key, value in config["text_config"].items() if value is not None}
    return {**_TEXT[config["model_type"]], **outer, **given}


def text_name(name: str) -> str | None:
    """Returns the name of a wrapper's tensor in the text model alone; None for other parts."""
    for prefix, plain in _PREFIXES.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return None

"""Converts the metadata of a GGUF file to a Hugging Face config.

A missing key has llama.cpp's default. A key that asks for something this decoder does not compute
is an error that names the key.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.weights.gguf_metadata import Metadata
from beagle_jax.weights.gguf_names import OPTIONAL_BIASES, Architecture, has_biases

# The decoder supports only these values of these keys. They are also llama.cpp's defaults.
_NEUTRAL = {
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
}
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_GEMMA_2_CAPS = (50.0, 30.0)
# Layers of Gemma's 27B models, which scale attention scores by hidden size / number of heads.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def hf_config(
    name: str,
    architecture: Architecture,
    metadata: Metadata,
    tensors: Collection[str],
    factors: np.ndarray | None,
) -> dict[str, Any]:
    """Returns the Hugging Face config.

    Args:
      name: `general.architecture`.
      architecture: its entry in ARCHITECTURES.
      metadata: the file's.
      tensors: GGUF names of all tensors in the file.
      factors: divisors of the rotary frequencies, [H / 2]; None for none.
    """
    _check_neutral(name, architecture, metadata)
    width = metadata.need(f"{name}.embedding_length")
    heads = metadata.uniform(f"{name}.attention.head_count")
    if type(heads) is not int or heads < 1:
        raise UserError(
            f"{metadata.path}: GGUF metadata '{name}.attention.head_count' is {heads!r}, expected "
            "a number of heads"
        )
    head_dim = _head_dim(name, metadata, width, heads)
    config = {
        "model_type": architecture.model_type,
        "vocab_size": _vocab_size(name, metadata),
        "hidden_size": width,
        "intermediate_size": metadata.uniform(f"{name}.feed_forward_length"),
        "num_hidden_layers": metadata.need(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.uniform(f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.need(f"{name}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.need(f"{name}.context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    for setting in OPTIONAL_BIASES:
        if has_biases(architecture, tensors, setting):
            config[setting] = True
    rope = _rope(name, metadata, factors)
    if name in _GEMMA_27B_LAYERS:
        return config | _gemma(name, architecture, metadata, config, rope)
    window = metadata.number(f"{name}.attention.sliding_window", 0)
    if window:  # in all layers, as in Mistral
        config |= {"model_type": "mistral", "sliding_window": window}
    return config | {"rope_parameters": rope}


def _check_neutral(name: str, architecture: Architecture, metadata: Metadata) -> None:
    experts = metadata.get(f"{name}.expert_count", 0)
    if experts:
        raise UserError(
            f"{metadata.path}: architecture {name!r} with {experts} experts (a mixture of experts, "
            "as Mixtral); this version reads no experts from GGUF files: use the model's Hugging "
            "Face folder"
        )
    neutral = dict(_NEUTRAL)
    if name not in _GEMMA_27B_LAYERS:
        neutral |= {cap: (0.0,) for cap in _CAPS}
        if not architecture.optional_biases:  # llama's window is Mistral's
            neutral["attention.sliding_window"] = (0,)
    for key, values in neutral.items():
        value = metadata.get(f"{name}.{key}", values[0])
        if value not in values:
            raise UserError(
                f"{metadata.path}: GGUF metadata '{name}.{key}' is {value!r}, which this version "
                f"does not support; expected {values[0]!r}"
            )


def _vocab_size(name: str, metadata: Metadata) -> int:
    """Returns the number of rows of the embedding.

    This is the number of tokens, which only files without a tokenizer lack.
    """
    if metadata.get("tokenizer.ggml.tokens") is None:
        return metadata.need(f"{name}.vocab_size")
    return len(metadata.list("tokenizer.ggml.tokens"))


def _head_dim(name: str, metadata: Metadata, width: int, heads: int) -> int:
    rotated = metadata.get(f"{name}.rope.dimension_count")
    head_dim = metadata.get(f"{name}.attention.key_length")
    if head_dim is None:
        head_dim = rotated or width // heads
    values = metadata.get(f"{name}.attention.value_length", head_dim)
    for what, size in (("rotates", rotated or head_dim), ("has values of", values)):
        if size != head_dim:
            raise UserError(
                f"{metadata.path}: attention has keys of {head_dim} dimensions and {what} {size}, "
                "which this version does not support"
            )
    return head_dim


def _rope(name: str, metadata: Metadata, factors: np.ndarray | None) -> dict[str, Any]:
    """Returns base and scaling of the rotary embedding."""
    theta = metadata.number(f"{name}.rope.freq_base", 10000.0)
    kind = metadata.get(f"{name}.rope.scaling.type", "linear")
    factor = metadata.number(f"{name}.rope.scaling.factor")
    if factor is None:
        factor = metadata.number(f"{name}.rope.scale_linear", 0)  # the key of old files
    if kind not in ("none", "linear"):
        raise UserError(f"{metadata.path}: RoPE scaling {kind!r} is not supported")
    linear = kind == "linear" and factor not in (0, 1)
    if factors is not None and not np.all(factors == 1):
        if linear:
            raise UserError(
                f"{metadata.path}: RoPE scaling by both a factor ({factor}) and a tensor "
                "rope_freqs is not supported"
            )
        listed = [float(value) for value in factors]
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": listed,
            "long_factor": listed,
            "attention_factor": 1.0,
            # Transformers requires these too. They have no effect if both lists are the same.
            "factor": 1.0,
            "original_max_position_embeddings": metadata.need(f"{name}.context_length"),
        }
    if linear:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _gemma(
    name: str,
    architecture: Architecture,
    metadata: Metadata,
    config: dict[str, Any],
    rope: dict[str, Any],
) -> dict[str, Any]:
    """Returns the settings that only Gemma 2 and 3 have."""
    defaults = _GEMMA_2_CAPS if name == "gemma2" else (None, None)
    caps = {
        cap: metadata.number(f"{name}.{cap}", default) or None
        for cap, default in zip(_CAPS, defaults, strict=True)
    }
    layers, width, heads = (
        config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    scalar = width // heads if layers == _GEMMA_27B_LAYERS[name] else config["head_dim"]
    if name == "gemma3":
        local = metadata.number(f"{name}.rope.freq_base_swa", 10000.0)
        rope = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return {
        **caps,
        **_gemma_windows(name, architecture, metadata, layers),
        "query_pre_attn_scalar": scalar,
        "rope_parameters": rope,
    }


def _gemma_windows(
    name: str, architecture: Architecture, metadata: Metadata, layers: Any
) -> dict[str, Any]:
    """Returns the sliding window and the layers that have it."""
    window = metadata.number(f"{name}.attention.sliding_window", architecture.window)
    pattern = metadata.get(f"{name}.attention.sliding_window_pattern", architecture.every)
    if not window:
        # The window's size does not matter, because no layer uses it.
        return {"sliding_window": 1, "layer_types": ["full_attention"] * _count(layers)}
    if type(pattern) is int:
        near = [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(_count(layers))]
    elif isinstance(pattern, list):
        near = [bool(value) for value in pattern]
    else:
        raise UserError(
            f"{metadata.path}: GGUF metadata '{name}.attention.sliding_window_pattern' is "
            f"{pattern!r}, expected a number or a list"
        )
    types = ["sliding_attention" if value else "full_attention" for value in near]
    return {"sliding_window": window, "layer_types": types}


def _count(layers: Any) -> int:
    """Returns a number of layers that a list can have.

    The check of the config reports what is wrong with the original value.
    """
    return layers if type(layers) is int and 0 < layers < 10_000 else 0

"""Supported GGUF architectures, and the Hugging Face names of their tensors.

llama.cpp's converter renames every tensor. `weights/gguf.py` undoes two more of its changes: it
interleaves the rotary pairs of llama's queries and keys, and it adds one to Gemma's norms.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FACTORS = "rope_freqs.weight"  # becomes part of the config, not a parameter
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
# Settings of a llama config that add biases, and the tensors that show them.
OPTIONAL_BIASES = {"attention_bias": tuple(_ATTENTION), "mlp_bias": tuple(_MLP)}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ANGLES = re.compile(r"blk\.(\d+)\.attn_rot_embd(?:\.weight)?")


class Architecture(NamedTuple):
    """How files of one `general.architecture` are read."""

    model_type: str  # in the Hugging Face config
    layer_names: dict[str, str]  # of a layer's weights, without layer number and suffix
    biases: tuple[str, ...] = ()  # GGUF names of the projections that always have one
    optional_biases: bool = False  # the file may hold OPTIONAL_BIASES
    interleaved: bool = False  # rows of attn_q and attn_k hold the rotary pairs side by side
    plus_one: bool = False  # norms are stored with one added
    window: int | None = None  # llama.cpp's default; None: no layer has a window
    every: int = 1  # one of this many layers has no window


_PLAIN = _TWO_NORMS | _ATTENTION | _MLP
ARCHITECTURES = {
    "llama": Architecture("llama", _PLAIN, optional_biases=True, interleaved=True),
    "qwen2": Architecture("qwen2", _PLAIN, biases=("attn_q", "attn_k", "attn_v")),
    "qwen3": Architecture("qwen3", _PLAIN | _HEAD_NORMS),
    "gemma": Architecture("gemma", _PLAIN, plus_one=True),
    "gemma2": Architecture(
        "gemma2", _FOUR_NORMS | _ATTENTION | _MLP, plus_one=True, window=4096, every=2
    ),
    "gemma3": Architecture(
        "gemma3_text", _FOUR_NORMS | _ATTENTION | _MLP | _HEAD_NORMS, plus_one=True, every=6
    ),
}


def hf_names(architecture: Architecture, names: Collection[str]) -> dict[str, str]:
    """Maps the GGUF name of every tensor in a file to its Hugging Face name.

    A tensor without a counterpart keeps its GGUF name, so that the error about it names it as the
    file does.
    """
    biased = set(architecture.biases)
    for setting, projections in OPTIONAL_BIASES.items():
        if has_biases(architecture, names, setting):
            biased |= set(projections)
    return {name: _hf_name(architecture, biased, name) for name in names}


def has_biases(architecture: Architecture, names: Collection[str], setting: str) -> bool:
    """Returns whether the first layer has all biases of this llama config setting."""
    return architecture.optional_biases and all(
        f"blk.0.{projection}.bias" in names for projection in OPTIONAL_BIASES[setting]
    )


def _hf_name(architecture: Architecture, biased: set[str], name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    if match := _ANGLES.fullmatch(name):
        return f"model.layers.{match[1]}.self_attn.rotary_emb.inv_freq"
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in architecture.layer_names:
        return name
    if match[3] == "bias" and match[2] not in biased:
        return name
    return f"model.layers.{match[1]}.{architecture.layer_names[match[2]]}.{match[3]}"

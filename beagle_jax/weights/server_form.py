"""What the forms of EAGLE and EAGLE-3 drafts for other servers have in common."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from beagle_jax.arrays import AnyArray
from beagle_jax.errors import UserError
from beagle_jax.model.draft import LayerSpec
from beagle_jax.model.layers import RopeFactors, RopeScaling
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.kinds import LAYER_TENSORS

TITLES = {
    "safeailab": "SafeAILab's EAGLE",
    "sglang": "SGLang",
    "vllm": "vLLM",
    "speculators": "speculators",
}


VLLM = "vLLM 0.32.0"  # the version that has served exports, on a CPU (benchmarks/vllm_cpu.py)
# What has loaded folders of each form and computed with them what this library does. The loaders of
# other servers were only read.
RUN = {"vllm": VLLM, "speculators": f"speculators 0.9.0 and {VLLM}"}


class Server(NamedTuple):
    """Whose loader a folder is for."""

    name: str  # a key of TITLES
    verifier: Mapping[str, Any] = {}  # the target's name and class, for speculators' config

    @property
    def title(self) -> str:
        """Its name in messages."""
        return TITLES[self.name]


class Form(NamedTuple):
    """A draft as a server's folder holds it."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    # what the folder reads back as: parameters, scored tokens and settings of the description
    params: Mapping[str, AnyArray]
    hot_ids: AnyArray | None
    settings: Mapping[str, Any]


def refuse(server: Server, reasons: Iterable[str]) -> None:
    """Raises UserError if there are reasons why the server cannot compute the draft."""
    if listed := [reason for reason in reasons if reason]:
        raise UserError(
            f"this draft cannot be written for {server.title}:\n  " + "\n  ".join(listed)
        )


def misfits(spec: LayerSpec, server: Server) -> list[str]:
    """Lists what no loader of these servers expresses in any draft of one layer."""
    reasons = []
    if spec.embed_scale != 1.0:
        reasons.append(
            f"it reads embeddings times {spec.embed_scale:.6g} (the target's own scale), and the "
            "loader takes them as they are"
        )
    if server.name != "safeailab":
        reasons.append(uneven_heads(spec))
    if server.name == "safeailab" and spec.head_dim * spec.num_heads != spec.hidden_size:
        reasons.append(
            f"its heads are {spec.head_dim} wide, and SafeAILab's loader computes the width as "
            f"hidden_size / heads ({spec.hidden_size} / {spec.num_heads}): it reads no head_dim"
        )
    return reasons


def uneven_heads(spec: LayerSpec) -> str:
    """Returns why transformers, which reads the config there, refuses it ("" if it does not)."""
    if spec.hidden_size % spec.num_heads == 0:
        return ""
    return (
        f"transformers refuses a config of {spec.num_heads} heads in a width of "
        f"{spec.hidden_size}, which is no multiple; set draft.num_heads to a divisor of it"
    )


def layer_config(spec: LayerSpec, target: TargetSpec) -> dict[str, Any]:
    """Returns the keys of a Llama config of one layer.

    The rotary base is written even where it is a default: loaders' defaults are not the target's.
    """
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": target.vocab_size,
        "max_position_embeddings": target.max_positions,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "initializer_range": spec.init_std,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def rope_scaling(
    scaling: RopeScaling | RopeFactors | None, server: Server
) -> tuple[dict[str, Any] | None, str]:
    """Returns the config's `rope_scaling`, and why the server cannot compute it ("" if it can)."""
    if scaling is None:
        return None, ""
    if isinstance(scaling, RopeFactors):
        return None, "its rotary frequencies have factors of their own, which no such config names"
    if scaling.original_positions is None:
        if server.name == "safeailab":  # exactly these two keys, and a factor above 1
            reason = "" if scaling.factor > 1 else f"a rope factor of {scaling.factor} is refused"
            return {"type": "linear", "factor": float(scaling.factor)}, reason
        return {"rope_type": "linear", "factor": float(scaling.factor)}, ""
    written = {
        "rope_type": "llama3",
        "factor": float(scaling.factor),
        "low_freq_factor": float(scaling.low_freq_factor),
        "high_freq_factor": float(scaling.high_freq_factor),
        "original_max_position_embeddings": int(scaling.original_positions),
    }
    unknown = "it has Llama 3's rope scaling, and SafeAILab's loader knows linear and dynamic alone"
    return written, unknown if server.name == "safeailab" else ""


def published_tensors(
    params: Mapping[str, AnyArray], names: Mapping[str, str], prefix: str
) -> dict[str, np.ndarray]:
    """Returns contiguous tensors by published name.

    names: parameter -> name in a native folder. prefix: of the names of the layer's own tensors.
    """
    inner = {*LAYER_TENSORS, *(f"{name}_bias" for name in "qkvo"), "q_norm", "k_norm"}
    inner |= {"hidden_norm"}
    return {
        (prefix if name in inner else "") + names[name]: np.ascontiguousarray(array, np.float32)
        for name, array in params.items()
    }


def settings_of(spec: LayerSpec, **changes: Any) -> dict[str, Any]:
    """Returns the description's settings, with those that the form changes."""
    return asdict(spec) | {"rope_scaling": getattr(spec, "rope_scaling", None)} | changes

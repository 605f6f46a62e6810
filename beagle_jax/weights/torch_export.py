"""Exports a draft as a PyTorch folder: weights, config and the module that runs them.

The tensors have the names and layouts of the native folder, which are PyTorch's. Before the folder
appears, the export is loaded with torch and must compute what the JAX block computes.
"""

import json
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.model.kinds import block_of
from beagle_jax.weights.draft import (
    DIGEST,
    Draft,
    draft_digest,
    file_tensors,
    settings,
)
from beagle_jax.weights.kinds import tensor_name, torch_form
from beagle_jax.weights.model_card import EXPORTED_WITH, installed
from beagle_jax.weights.safetensors_file import write_tensors

# DraftSpec field -> key in a transformers config.
CONFIG_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "input_norm": "input_norm",
    "state_layers": "state_layers",
    "fc_bias": "fc_bias",
    "qkv_bias": "qkv_bias",
    "rope_scaling": "frequency_scaling",  # transformers would interpret "rope_scaling" itself
}
TOLERANCE = 1e-5  # relative to the largest value; both sides compute in float32
_POSITIONS = 16  # compared positions


def require_torch() -> ModuleType:
    """Imports torch; no other module of the package needs it.

    Raises:
      UserError: torch is not installed. The message says how to install it.
    """
    try:
        return import_module("torch")
    except ImportError as error:
        raise UserError(
            "PyTorch is not installed, and converting needs it: pip install torch (a CPU build "
            "is enough)"
        ) from error


def write_torch_folder(folder: Path, draft: Draft, vocab_size: int, card: str) -> None:
    """Fills an empty folder with the exported draft.

    vocab_size: the target's. card: text of its README.md.
    """
    tensors = file_tensors(draft)
    write_tensors(folder / "model.safetensors", tensors)
    config = json.dumps(torch_config(draft, vocab_size, tensors), indent=1)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    for name in torch_form(draft.spec.kind).modules:
        (folder / f"{name}.py").write_text(module_source(name), encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def torch_config(draft: Draft, vocab_size: int, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns config.json: AutoModel's keys, the shape, and the draft's provenance."""
    form = torch_form(draft.spec.kind)
    classes = f"{form.modules[0]}.{form.classes}"
    return {
        "model_type": form.model_type,
        "architectures": [f"{form.classes}Draft"],
        "auto_map": {
            "AutoConfig": f"{classes}Config",
            "AutoModel": f"{classes}Draft",
        },
        "dtype": str(tensors[tensor_name(draft.spec, next(iter(draft.params)))].dtype),
        **{CONFIG_KEYS[key]: value for key, value in settings(draft.spec).items()},
        "vocab_size": vocab_size,
        "num_hot_tokens": 0 if draft.hot_ids is None else len(draft.hot_ids),
        "target": draft.provenance.get("target"),
        "tokenizer": draft.provenance.get("target"),  # the target's own
        DIGEST: draft_digest(draft.spec, tensors),
        "provenance": draft.provenance,
    }


def module_source(name: str) -> str:
    """Returns the source of a module that runs the folder's weights."""
    return (files("beagle_jax.weights") / f"{name}.py").read_text(encoding="utf-8")


# The comparison


def check_parity(folder: Path, draft: Draft, vocab_size: int) -> dict[str, float]:
    """Loads the folder with torch and compares it with the JAX block on random inputs.

    Returns the largest difference of predicted states and of logits, each relative to the largest
    value.

    Raises:
      UserError: a tensor differs, or a difference exceeds TOLERANCE.
    """
    torch = require_torch()
    from transformers import AutoModel  # imported late, because it takes a second

    module = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    held = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    wrong = [
        name
        for name, array in file_tensors(draft).items()
        if name not in held or not np.array_equal(held[name], _float32(array), equal_nan=True)
    ]
    if wrong or len(held) != len(file_tensors(draft)):
        raise UserError(
            "the tensors of the exported draft differ from those of the JAX draft "
            f"({', '.join(wrong) or 'extra tensors'}); nothing was written; this is a fault of "
            "the converter, please report it"
        )
    rng = np.random.default_rng(0)
    e_BTD = rng.standard_normal((1, _POSITIONS, draft.spec.hidden_size), np.float32)
    h_BSI = rng.standard_normal((1, _POSITIONS, draft.spec.input_width), np.float32)
    head_VD = rng.standard_normal((vocab_size, draft.spec.hidden_size), np.float32)
    with torch.no_grad():
        states = module(torch.from_numpy(e_BTD), torch.from_numpy(h_BSI))
        logits = states @ module.head_rows(torch.from_numpy(head_VD)).T
    expected = _jax_outputs(draft, e_BTD, h_BSI, head_VD)
    differences = {
        name: _difference(array.numpy(), expected[name])
        for name, array in (("states", states), ("logits", logits))
    }
    if not max(differences.values()) <= TOLERANCE:
        measured = ", ".join(f"{name} by {value:.1e}" for name, value in differences.items())
        raise UserError(
            f"the outputs of the exported draft differ from those of the JAX block: {measured} of "
            f"their scale (at most {TOLERANCE:.0e} is allowed); nothing was written; this is a "
            "fault of the converter, or of these versions "
            f"({', '.join(map(' '.join, installed(EXPORTED_WITH).items()))}), please report it"
        )
    return differences


def _jax_outputs(
    draft: Draft, e_BTD: np.ndarray, h_BSI: np.ndarray, head_VD: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns states and logits of the JAX block for the same inputs (`teacher_forced`)."""
    params = {name: jnp.asarray(array, jnp.float32) for name, array in draft.params.items()}
    rows_VD = head_VD if draft.hot_ids is None else head_VD[np.asarray(draft.hot_ids)]
    with jax.default_matmul_precision("highest"):
        states = block_of(draft.spec).apply(
            {"params": params}, jnp.asarray(e_BTD), jnp.asarray(h_BSI), method="teacher_forced"
        )
        return {"states": np.asarray(states), "logits": np.asarray(states @ rows_VD.T)}


def _difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference over the largest value; infinity if shapes differ."""
    return (
        float(np.abs(actual - expected).max() / np.abs(expected).max())
        if actual.shape == expected.shape
        else float("inf")
    )


def _float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.int32 else array.astype(np.float32)

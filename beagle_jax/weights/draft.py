"""A trained draft on disk: model.safetensors (PyTorch names, [out, in]) and config.json (method.md 9.5)."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from beagle_jax.errors import UserError
from beagle_jax.files import whole, write_text
from beagle_jax.model.beagle import DraftSpec
from beagle_jax.model.target import TargetSpec

TENSOR_NAMES = {
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
    "input_layernorm": "input_layernorm.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
}
HOT_TOKENS = "hot_tokens"  # int32 ids, most frequent first; absent when the draft scores the whole vocabulary


@dataclass(frozen=True)
class Draft:
    """A trained draft, ready to decode with."""

    spec: DraftSpec
    params: dict[str, jax.Array] = field(repr=False)
    hot_ids: jax.Array | None  # token ids that the draft scores; None: all
    provenance: dict[str, Any] = field(repr=False)  # target, data, stages: what config.json says of the training

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any weight."""
        digest = hashlib.sha256()
        for name in sorted(self.params):
            digest.update(np.asarray(self.params[name]).tobytes())
        return digest.hexdigest()[:16]


def save_draft(folder: str | Path, draft: Draft) -> None:
    """Writes the folder; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "model.safetensors") as partial:
        save_file(file_tensors(draft), partial, metadata={"format": "pt"})
    config = {"model_type": "beagle_draft", **asdict(draft.spec), **draft.provenance}
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")


def file_tensors(draft: Draft) -> dict[str, np.ndarray]:
    """Every tensor under its name in a file, which is PyTorch's; matrices are [out, in]."""
    # A transposed view would be written wrongly by safetensors, without an error.
    tensors = {TENSOR_NAMES[name]: np.ascontiguousarray(array) for name, array in draft.params.items()}
    if draft.hot_ids is not None:
        tensors[HOT_TOKENS] = np.ascontiguousarray(draft.hot_ids, np.int32)
    return tensors


def load_draft(folder: str | Path, target: TargetSpec) -> Draft:
    """Reads a draft for this target.

    Raises UserError naming the folder when a file or tensor is missing, extra or misshapen, or made for another target.
    """
    expected = DraftSpec.from_target(target)
    folder = Path(folder)
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.exists():
            raise UserError(f"{path}: no such file; train a draft first (python -m beagle_jax.train) or set draft.path")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_path}: not JSON ({error}); is the file whole?") from error
    if config.get("model_type") != "beagle_draft":
        raise UserError(f"{config_path}: model_type is {config.get('model_type')!r}, expected 'beagle_draft'")
    shape_keys = [key for key in asdict(expected) if key != "init_std"]
    wrong = [f"{key} {config.get(key)} there, {getattr(expected, key)} here" for key in shape_keys
             if config.get(key) != getattr(expected, key)]
    if wrong:
        raise UserError(f"{folder}: this draft belongs to another target ({'; '.join(wrong)})")
    tensors = _read(weights_path)
    hot_ids = tensors.pop(HOT_TOKENS, None)
    if hot_ids is not None and (hot_ids.min() < 0 or hot_ids.max() >= target.vocab_size):
        raise UserError(f"{folder}: this draft belongs to another target (it scores token {hot_ids.max()}, "
                        f"the vocabulary ends at {target.vocab_size - 1})")
    params = _match(tensors, expected, weights_path)
    provenance = {key: value for key, value in config.items() if key not in asdict(expected) and key != "model_type"}
    spec = replace(expected, init_std=config.get("init_std", expected.init_std))
    return Draft(spec, params, None if hot_ids is None else jnp.asarray(hot_ids), provenance)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); is the file whole?") from error


def _match(tensors: dict[str, np.ndarray], spec: DraftSpec, where: Path) -> dict[str, jax.Array]:
    shapes = {TENSOR_NAMES[name]: shape for name, shape in spec.param_shapes().items()}
    problems = [f"missing tensor {name} {list(shape)}" for name, shape in shapes.items() if name not in tensors]
    problems += [f"extra tensor {name}" for name in tensors if name not in shapes]
    problems += [f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
                 for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape]
    if problems:
        raise UserError(f"{where}: not the weights of this draft:\n  " + "\n  ".join(problems))
    return {name: jnp.asarray(tensors[file_name]) for name, file_name in TENSOR_NAMES.items()}

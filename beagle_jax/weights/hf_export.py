"""Writes a target as a Hugging Face folder, from any source: a GGUF file too.

transformers, vLLM and SGLang load it without code of its own.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from beagle_jax.errors import UserError
from beagle_jax.files import write_text
from beagle_jax.model.joined import separate_layer
from beagle_jax.model.target import TargetSpec
from beagle_jax.model.tensors import Tensor, tensors
from beagle_jax.weights.hf import HFFolder
from beagle_jax.weights.safetensors_file import write_tensors
from beagle_jax.weights.target import Target

_FUSED = ("phi3",)  # families whose files have fused projections
_SHARD_BYTES = 4 << 30  # of one file


def write_hf_folder(folder: Path, target: Target, config: dict[str, Any]) -> int:
    """Fills an empty folder with config, weights, tokenizer and end tokens.

    config: of the source, in Hugging Face's keys. The arrays are written in the target's dtype.
    Returns the bytes of the weights.

    Raises:
      UserError: a file cannot be written, or the folder does not describe the same target.
    """
    if config["model_type"] in _FUSED:
        raise UserError(
            f"{target.source}: {config['model_type']} stores projections as one matrix, which this "
            "version reads and does not write; use the folder that it was read from"
        )
    write_text(folder / "config.json", json.dumps(_completed(config, target), indent=1) + "\n")
    eos_ids = list(target.eos_ids)
    generation = {"eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0]}
    write_text(folder / "generation_config.json", json.dumps(generation) + "\n")
    target.tokenizer.save_pretrained(folder)
    written = _write_weights(folder, target)
    again = HFFolder(folder)
    if TargetSpec.from_hf_config(again.config(), str(folder)) != target.spec:
        raise UserError(
            "the config that was written describes another model than the source's; nothing was "
            "written; this is a fault of the writer, please report it"
        )
    return written


def _completed(config: dict[str, Any], target: Target) -> dict[str, Any]:
    """Returns the config with the class that computes it, its dtype and its special tokens."""
    from transformers.models.auto.modeling_auto import (  # imported late: it takes a second
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES,
    )

    eos_ids = list(target.eos_ids)
    given = {key: value for key, value in config.items() if value is not None}
    given.pop("quantization_config", None)  # fp8 weights are written in the target's dtype
    special = {
        "bos_token_id": target.tokenizer.bos_token_id,
        "eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0],
        "pad_token_id": target.tokenizer.pad_token_id,
    }
    return {
        "architectures": [CLASSES[config["model_type"]]],
        **{key: value for key, value in special.items() if value is not None},
        **given,
        "torch_dtype": jnp.dtype(target.dtype).name,
    }


def _write_weights(folder: Path, target: Target) -> int:
    """Writes the weights in files of at most _SHARD_BYTES, and their index if there are several."""
    width = jnp.dtype(target.dtype).itemsize
    total = sum(math.prod(tensor.shape) for tensor in tensors(target.spec)) * width
    parts = list(_parts(target.spec, width))
    index: dict[str, str] = {}
    with tqdm(total=total, desc="target", unit="B", unit_scale=True, leave=False) as bar:
        for number, part in enumerate(parts):
            name = "model.safetensors"
            if len(parts) > 1:
                name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
            arrays = {key: array for tensor in part for key, array in _named(target.params, tensor)}
            write_tensors(folder / name, arrays)
            index |= dict.fromkeys(arrays, name)
            bar.update(sum(array.nbytes for array in arrays.values()))
    if len(parts) > 1:
        written = {"metadata": {"total_size": total}, "weight_map": index}
        write_text(folder / "model.safetensors.index.json", json.dumps(written, indent=1) + "\n")
    return total


def _parts(spec: TargetSpec, width: int) -> Iterator[list[Tensor]]:
    """Yields the arrays of each file, in order."""
    part: list[Tensor] = []
    size = 0
    for tensor in tensors(spec):
        more = math.prod(tensor.shape) * width
        if part and size + more > _SHARD_BYTES:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += more
    yield part


def _named(params: Any, tensor: Tensor) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the names in files and the arrays of one parameter: several if it holds experts."""
    *place, key = tensor.path
    for step in place:
        params = params[step]
    held: Any = params if key in params else separate_layer(params)
    array = np.ascontiguousarray(jax.device_get(held[key]))
    if len(tensor.names) == 1:
        yield tensor.names[0], array.reshape(tensor.shape)
    else:
        for number, name in enumerate(tensor.names):
            yield name, np.ascontiguousarray(array[number])

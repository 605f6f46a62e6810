"""Tensors of a checkpoint in PyTorch's forms: safetensors files, or pickles if they are allowed."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.json_file import read_json
from beagle_jax.weights.draft import HOT_TOKENS
from beagle_jax.weights.safetensors_file import read_tensors
from beagle_jax.weights.torch_export import require_torch

Named = list[tuple[str, np.ndarray]]  # a list, since two files may hold the same name

_PICKLES = (".bin", ".pt", ".pth")


def read_weights(files: list[Path]) -> Named:
    """Every tensor, in file order; raises UserError naming the file that cannot be read."""
    return [
        pair
        for file in files
        for pair in (_read_pickle(file) if file.suffix in _PICKLES else _read(file))
    ]


def read_folder_config(source: Path) -> dict[str, Any]:
    """config.json beside the weights; empty where there is none."""
    path = (source if source.is_dir() else source.parent) / "config.json"
    return read_json(path, "") if path.exists() else {}


def weight_files(source: Path, allow_pickle: bool) -> list[Path]:
    """The weights in a folder, or the one file; raises UserError when there are none, or pickles
    that were not allowed.
    """
    if source.is_dir():
        found = sorted(source.glob("*.safetensors"))
        found = found or sorted(file for file in source.iterdir() if file.suffix in _PICKLES)
        if not found:
            raise UserError(
                f"{source}: no weights in this folder; expected *.safetensors, or *.bin or "
                "*.pt with --allow-pickle"
            )
    elif source.is_file() and source.suffix in (".safetensors", *_PICKLES):
        found = [source]
    elif source.exists():
        raise UserError(
            f"{source}: expected a folder, or a file that ends in .safetensors, "
            f"{', '.join(_PICKLES)}"
        )
    else:
        raise UserError(f"{source}: no such file or folder; --source names the draft to read")
    if found[0].suffix in _PICKLES and not allow_pickle:
        raise UserError(
            f"{found[0]} is a pickle, which may run code when it is read; convert it to "
            "safetensors, or give --allow-pickle (it is then read by "
            "torch.load(weights_only=True))"
        )
    return found


def _read(path: Path) -> Named:
    return list(read_tensors(path, integers=(HOT_TOKENS,)))


def _read_pickle(path: Path) -> Named:
    torch = require_torch()
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: torch.load(weights_only=True) cannot read it ({reason}); is it whole, "
            "and does it hold weights only?"
        ) from error
    if not isinstance(held, dict) or not all(
        isinstance(value, torch.Tensor) for value in held.values()
    ):
        raise UserError(
            f"{path}: holds something else than named tensors; give the file with the weights "
            "to --source"
        )
    return [(str(name), _array(tensor)) for name, tensor in held.items()]


def _array(tensor) -> np.ndarray:
    """numpy knows no bfloat16 of torch's; float32 holds each of its values."""
    tensor = tensor.detach()
    return (
        (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).contiguous().numpy()
    )

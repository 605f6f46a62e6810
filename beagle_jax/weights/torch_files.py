"""Reads tensors of PyTorch checkpoints: safetensors files, or pickles if allowed."""

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beagle_jax.errors import BadFile, UserError
from beagle_jax.json_file import read_json
from beagle_jax.weights.draft import HOT_TOKENS
from beagle_jax.weights.model_files import of_the_model, weights_in
from beagle_jax.weights.safetensors_file import read_tensors
from beagle_jax.weights.torch_export import require_torch

if TYPE_CHECKING:
    import torch

Named = list[tuple[str, np.ndarray]]  # a list, because two files may hold the same name

# d2t and t2d: an EAGLE-3 draft's vocabulary (method.md 14)
_INTEGERS = {HOT_TOKENS: ("I32",), "d2t": ("I64", "I32"), "t2d": ("BOOL",)}
_PICKLES = (".bin", ".pt", ".pth")


def read_weights(files: list[Path]) -> Named:
    """Reads every tensor, in file order.

    Raises:
      UserError: a file cannot be read. The message names it.
    """
    return [
        pair
        for file in files
        for pair in (_read_pickle(file) if file.suffix in _PICKLES else _read(file))
    ]


def read_folder_config(source: Path) -> dict[str, Any]:
    """Reads config.json beside the weights; returns {} if there is none."""
    path = (source if source.is_dir() else source.parent) / "config.json"
    return read_json(path, "") if path.exists() else {}


def weight_files(source: Path, allow_pickle: bool) -> list[Path]:
    """Returns the weight files in a folder, or the given single file.

    Raises:
      UserError: there are none, or they are pickles and those are not allowed.
    """
    if source.is_dir():
        files = of_the_model(weights_in(source, (".safetensors",)))
        files = files or of_the_model(weights_in(source, _PICKLES))
        if not files:
            raise UserError(
                f"{source}: no weights in this folder; expected *.safetensors, or "
                "*.bin or *.pt with --allow-pickle"
            )
    elif source.is_file() and source.suffix in (".safetensors", *_PICKLES):
        files = [source]
    elif source.exists():
        raise UserError(
            f"{source}: expected a folder, or a file that ends in .safetensors, "
            f"{', '.join(_PICKLES)}"
        )
    else:
        raise UserError(f"{source}: no such file or folder; --source names the draft to read")
    if files[0].suffix in _PICKLES and not allow_pickle:
        raise UserError(
            f"{files[0]} is a pickle, which may run code when it is read; convert it to "
            "safetensors, or give --allow-pickle to convert (allow_pickle=True to load_draft), "
            "which read it by torch.load(weights_only=True)"
        )
    return files


def _read(path: Path) -> Named:
    return list(read_tensors(path, integers=_INTEGERS))


def _read_pickle(path: Path) -> Named:
    torch = require_torch()
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadFile(
            path,
            f"torch.load(weights_only=True) cannot read it ({reason}); is it whole, "
            "and does it hold weights only?",
        ) from error
    if not isinstance(held, dict) or not all(
        isinstance(value, torch.Tensor) for value in held.values()
    ):
        raise BadFile(
            path,
            "expected named tensors, but it holds other values; give --source the file with the "
            "weights",
        )
    for name, tensor in held.items():
        integers = str(name).rpartition(".")[2] in _INTEGERS
        if tensor.is_complex() or tensor.is_floating_point() == integers:
            raise BadFile(
                path,
                f"tensor {name} is stored as {tensor.dtype}; expected "
                f"{'whole numbers' if integers else 'float32, float16 or bfloat16'}",
            )
    return [(str(name), _array(tensor)) for name, tensor in held.items()]


def _array(tensor: "torch.Tensor") -> np.ndarray:
    """Converts a tensor to numpy.

    numpy has no bfloat16; float32 represents each of its values exactly.
    """
    tensor = tensor.detach()
    return (
        (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).contiguous().numpy()
    )

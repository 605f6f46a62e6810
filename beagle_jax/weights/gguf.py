"""Reads GGUF files: config, tensors under Hugging Face names, tokenizer and chat template.

The `gguf` package dequantises. This module renames tensors (`gguf_names.py`) and undoes two changes
that llama.cpp's converter makes to values: it interleaves the rotary pairs of llama's q and k rows
(Hugging Face stores them as two halves), and it adds one to Gemma's norms.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from transformers import PreTrainedTokenizerBase

from beagle_jax.errors import BadFile, UserError
from beagle_jax.weights.gguf_config import hf_config
from beagle_jax.weights.gguf_header import Tensor, read_header
from beagle_jax.weights.gguf_metadata import Metadata
from beagle_jax.weights.gguf_names import ARCHITECTURES, ROPE_FACTORS, hf_names
from beagle_jax.weights.gguf_parts import check_parts, part_paths
from beagle_jax.weights.gguf_tokenizer import byte_level_tokenizer
from beagle_jax.weights.hf import HFTokenizer, generation_eos_ids
from beagle_jax.weights.safetensors_file import aligned

_ENDS = ("eos", "eot", "eom")  # tokens that end an answer: end of text, of turn, of message
_MOST_THREADS = 8
_VALUES = 1 << 18  # dequantised at a time; the package allocates several arrays of this size


class _Stored(NamedTuple):
    """A tensor and the file that holds it."""

    path: Path
    tensor: Tensor


class GGUFFile:
    """A GGUF model in one memory-mapped file or in several parts.

    Raises:
      UserError: the file is not a model, or its architecture is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        paths = part_paths(path)
        headers = [read_header(part) for part in paths]
        parts = [Metadata(part, header.values) for part, header in zip(paths, headers, strict=True)]
        self._metadata = parts[0]
        check_parts(parts)
        kind = self._metadata.get("general.type", "model")
        if kind != "model":
            raise BadFile(
                path,
                f"the type of this GGUF file is {kind!r} (general.type), not a model; "
                "give the file of the model itself",
            )
        self._name = self._metadata.need("general.architecture")
        if self._name not in ARCHITECTURES:
            raise BadFile(
                path,
                f"architecture is {self._name!r}; this version reads GGUF files of "
                f"{', '.join(map(repr, ARCHITECTURES))}; for other models use the Hugging Face "
                "folder",
            )
        self._architecture = ARCHITECTURES[self._name]
        self._stored: dict[str, _Stored] = {}
        for part, header in zip(paths, headers, strict=True):
            for tensor in header.tensors:
                if tensor.name in self._stored:
                    raise BadFile(path, f"tensor {tensor.name} is in two parts")
                self._stored[tensor.name] = _Stored(part, tensor)

    def config(self) -> dict[str, Any]:
        """Converts the metadata to a Hugging Face config."""
        factors = self._stored.get(ROPE_FACTORS) if self._architecture.interleaved else None
        values = None if factors is None else self._values(*factors)
        return hf_config(self._name, self._architecture, self._metadata, self._stored, values)

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Lists Hugging Face names and shapes [out, in].

        A tensor without a Hugging Face counterpart keeps its GGUF name.
        """
        return [(name, _shape(stored.tensor)) for name, stored in self._by_name.items()]

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """Reads a part of a tensor by its Hugging Face name.

        Only the rows of that part are dequantised, a few at a time.
        """
        path, tensor = self._by_name[name]
        shape, order = _shape(tensor), self._row_order(name, tensor)
        if len(shape) == 1:
            values = self._values(path, tensor)[order]
            if self._architecture.plus_one and name.endswith("norm.weight"):
                values = values - 1.0
            return values[index].astype(dtype)
        stored = _bytes_of(path, tensor)
        order = order[index[0]]
        values_OI = aligned((len(order), len(range(*index[1].indices(shape[1])))), dtype)
        step = max(_VALUES // shape[1], 1)

        def fill(start: int) -> None:
            rows = stored[order[start : start + step]]
            values_OI[start : start + step] = self._dequantised(tensor, rows).reshape(
                len(rows), shape[1]
            )[:, index[1]]

        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, _MOST_THREADS)) as workers:
            list(workers.map(fill, range(0, len(order), step)))
        return values_OI

    @cached_property
    def _by_name(self) -> dict[str, _Stored]:
        names = hf_names(self._architecture, self._stored)
        hidden = {ROPE_FACTORS} if self._architecture.interleaved else set()
        return {names[name]: stored for name, stored in self._stored.items() if name not in hidden}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (Hugging Face name, float32 array [out, in]), one tensor at a time."""
        for name, shape in self.shapes():
            yield name, self.read(name, tuple(map(slice, shape)), np.dtype(np.float32))

    def _values(self, path: Path, tensor: Tensor) -> np.ndarray:
        """Reads a whole vector in float32."""
        return self._dequantised(tensor, _bytes_of(path, tensor)).reshape(_shape(tensor))

    def _dequantised(self, tensor: Tensor, rows: np.ndarray) -> np.ndarray:
        """Dequantises some of a tensor's rows to float32, concatenated."""
        try:
            # One long row, because the package processes a matrix in groups of sixteen rows, with
            # a dozen numpy calls for each group.
            return gguf.quants.dequantize(rows.reshape(1, -1), tensor.kind).astype(
                np.float32, copy=False
            )
        except NotImplementedError:
            raise UserError(
                f"{self.path}: {tensor.name} is stored as {tensor.kind.name}, which the "
                "gguf package cannot decode; use a file in F32, F16, BF16, Q8_0 or Q4_K"
            ) from None

    def _row_order(self, name: str, tensor: Tensor) -> np.ndarray:
        """Returns, for each row in Hugging Face's order, its index in the file.

        name: the Hugging Face name.
        """
        order = np.arange(_shape(tensor)[0])
        part = name.rpartition(".")[0]
        if not self._architecture.interleaved or not part.endswith((".q_proj", ".k_proj")):
            return order
        key = f"{self._name}.attention.head_count"
        count = self._metadata.uniform(key)
        if part.endswith(".k_proj"):
            count = self._metadata.uniform(f"{key}_kv", count)
        if len(tensor.shape) > 2 or type(count) is not int or count < 1 or len(order) % (2 * count):
            raise UserError(
                f"{self.path}: {tensor.name} of shape {list(_shape(tensor))} does not fit "
                f"{count!r} heads; download it again"
            )
        return _unpermute_rows(order[:, None], count)[:, 0]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer beside the file, else builds one from the file's metadata.

        The second is the file's byte-level BPE with its chat template.
        """
        if (self.path.parent / "tokenizer_config.json").exists():
            return HFTokenizer(self.path.parent).tokenizer()
        return byte_level_tokenizer(self._metadata)

    def eos_ids(self) -> tuple[int, ...]:
        """Returns ids of the tokens that end an answer.

        These are the ones that the file names and those of a generation_config.json beside it. (Of
        a model folder, only the first file that names any counts: `HFTokenizer.eos_ids` in hf.py.)
        """
        count = self.config()["vocab_size"]
        named = (self._metadata.token_id(name, count) for name in _ENDS)
        ids = [token for token in named if token is not None]
        ids += generation_eos_ids(self.path.parent) or ()
        if not ids:
            raise UserError(
                f"{self.path}: GGUF metadata names no token that ends an answer "
                "(tokenizer.ggml.eos_token_id); put a generation_config.json with eos_token_id "
                "beside the file"
            )
        return tuple(dict.fromkeys(ids))


def _bytes_of(path: Path, tensor: Tensor) -> np.ndarray:
    """Reads a tensor's stored bytes, one row for each of its rows.

    They are read and not mapped: pages of a map count as memory of this process while it lasts.
    """
    stored = np.fromfile(path, np.uint8, tensor.size, offset=tensor.start)
    return stored.reshape(*_shape(tensor)[:-1], -1)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Returns the shape in numpy's order; GGUF lists the fastest dimension first."""
    return tensor.shape[::-1]


def _unpermute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from interleaved to half-split rotary pairs.

    Interleaved pairs are (0 1)(2 3)..; Hugging Face's half-split pairs are (0 h/2)(1 h/2+1)..
    """
    rows, width = weight.shape
    return np.ascontiguousarray(
        weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
    )

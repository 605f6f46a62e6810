"""Reads one safetensors file, a tensor at a time.

The library checks the header against the file (no gap, no overlap, nothing past the end). This
module adds messages that name the byte, and refuses tensors that are named twice and dtypes that
are not of weights.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from beagle_jax.errors import BadFile, UserError

_NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
WEIGHT_DTYPES = tuple(_NUMPY)
FP8 = np.dtype(jnp.float8_e4m3fn)  # only of matrices with scales (weights/block_scales.py)
_IN_MODELS = _NUMPY | {"F8_E4M3": FP8}
_LENGTH_BYTES = 8  # the file begins with the length of its JSON header
_PIECE = 16 << 20  # bytes read by one call
_VALUES = 1 << 20  # numbers converted at a time


def read_tensors(
    path: Path, integers: Mapping[str, tuple[str, ...]] = MappingProxyType({})
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array in its stored dtype), with one array in memory at a time.

    integers: names of tensors that hold no weights: int32 or int64 numbers, or bool.

    Raises:
      UserError: the file is broken. The message names the file, and the byte or the tensor.
    """
    _check_names(path)
    try:
        with safe_open(path, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                dtype = opened.get_slice(name).get_dtype()
                allowed = integers.get(name.rpartition(".")[2], WEIGHT_DTYPES)
                if dtype not in allowed:
                    raise BadFile(
                        path, f"tensor {name} is stored as {dtype}; expected {' or '.join(allowed)}"
                    )
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise BadFile(
            path, f"cannot be read as safetensors ({error}); is the file whole?"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes contiguous tensors to a file in PyTorch's form.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); free some space or choose another folder, "
            "then run again"
        ) from error


class Place(NamedTuple):
    """The place of a tensor in a file.

    Reading a part touches only its bytes, or the pages around them if the part has only some
    columns of each row. No map of the file stays open: pages that a map has touched count as memory
    of the process as long as the map exists.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """Reads the part `index` (a slice per dimension, step 1) and converts it to `dtype`."""
        ranges = [range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
        shape = tuple(map(len, ranges))
        values = aligned(shape, dtype)
        if shape[1:] != self.shape[1:]:
            values[...] = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[index]
            return values
        # Whole rows are contiguous in the file: they are read straight into the array, or converted
        # piece by piece.
        start = self.offset + (
            ranges[0].start * math.prod(self.shape[1:]) * self.dtype.itemsize if ranges else 0
        )
        with self.path.open("rb", buffering=0) as stream:
            if dtype == self.dtype:
                _read_into(
                    stream.fileno(), start, values.reshape(-1).view(np.uint8).data, self.path
                )
            else:
                self._convert_into(stream.fileno(), start, values.reshape(-1))
        return values

    def _convert_into(self, descriptor: int, start: int, values: np.ndarray) -> None:
        """Fills `values` with the converted numbers from byte `start` on.

        Only a few pieces of a large tensor are in memory in both dtypes.
        """

        def convert(begin: int) -> None:
            part = values[begin : begin + _VALUES]
            stored = np.empty(len(part), self.dtype)
            _read_into(
                descriptor,
                start + begin * self.dtype.itemsize,
                stored.view(np.uint8).data,
                self.path,
            )
            part[...] = stored

        _in_turns(convert, len(values), _VALUES)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array that begins at a multiple of 64 bytes.

    A CPU device uses such an array without copying it. A large array requests huge pages: touching
    its 4 KB pages for the first time would take longer than reading the file.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _PIECE:
        room = np.empty(size + 64, np.uint8)
        start = -room.ctypes.data % 64
        return room[start : start + size].view(dtype).reshape(shape)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


def _in_turns(work: Callable[[int], None], count: int, step: int) -> None:
    """Calls work(0), work(step), .. below `count`, alternating between two threads.

    One thread can then read from disk while the other copies in memory.
    """
    if count <= step:
        work(0)
        return
    with ThreadPoolExecutor(max_workers=2) as workers:
        list(workers.map(work, range(0, count, step)))


def _read_into(descriptor: int, start: int, part: memoryview, path: Path) -> None:
    """Fills `part` with the file's bytes from `start` on."""

    def read_piece(begin: int) -> None:
        at, end = begin, min(begin + _PIECE, len(part))
        while at < end:
            count = os.preadv(descriptor, [part[at:end]], start + at)
            if not count:
                raise BadFile(
                    path,
                    f"the file ends in the middle of a tensor, {len(part) - at:,} "
                    "bytes early; was it replaced while it was read?",
                )
            at += count

    _in_turns(read_piece, len(part), _PIECE)


def places(path: Path) -> dict[str, Place]:
    """Returns the place of each tensor in a file.

    Raises:
      UserError: as in `read_tensors`, before any tensor is read.
    """
    header, start = _check_names(path)
    places_by_name = {}
    try:
        with safe_open(path, framework="np") as opened:  # checks the header against the file
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                part = opened.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _IN_MODELS:
                    raise BadFile(
                        path,
                        f"tensor {name} is stored as {dtype}; expected "
                        f"{' or '.join(WEIGHT_DTYPES)}",
                    )
                offset, shape = start + header[name]["data_offsets"][0], tuple(part.get_shape())
                places_by_name[name] = Place(path, _IN_MODELS[dtype], shape, offset)
    except SafetensorError as error:
        raise BadFile(
            path, f"cannot be read as safetensors ({error}); is the file whole?"
        ) from error
    return places_by_name


def digest(tensors: Mapping[str, np.ndarray], settings: str) -> str:
    """SHA-256 of settings and of all names, dtypes, shapes and values, sorted by name."""
    sha256 = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        sha256.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        sha256.update(array.reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def _check_names(path: Path) -> tuple[dict, int]:
    """Reads the header; returns it and the byte where the tensors begin.

    Raises:
      UserError: the header is cut off, is not JSON, names a tensor twice, or promises more bytes
        than the file holds.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            text = stream.read(length) if length <= size - _LENGTH_BYTES else None
    except OSError as error:
        raise BadFile(path, f"cannot be read ({error})") from error
    if text is None or size < _LENGTH_BYTES:
        raise _not_whole(
            path,
            f"its header should end at byte {_LENGTH_BYTES + length:,}, the file ends at byte "
            f"{size:,}",
        )
    twice: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        twice.extend(name for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise _not_whole(
            path, f"byte {_LENGTH_BYTES + error.start:,} of its header is not UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise _not_whole(
            path, f"its header is not JSON from byte {_LENGTH_BYTES + error.pos:,} on ({error.msg})"
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # raised for thousands of digits, and for thousands of brackets
        raise _not_whole(path, f"its header cannot be parsed ({error})") from error
    if twice:
        raise BadFile(path, f"the header names {', '.join(twice)} twice; write the file again")
    ends = (
        [entry["data_offsets"][1] for entry in header.values() if _has_offsets(entry)]
        if isinstance(header, dict)
        else []
    )
    end = _LENGTH_BYTES + length + max(ends, default=0)
    if end != size:
        raise _not_whole(
            path, f"its tensors should end at byte {end:,}, the file ends at byte {size:,}"
        )
    return header, _LENGTH_BYTES + length


def _has_offsets(entry: object) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return (
        isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(offset) is int for offset in offsets)
    )


def _not_whole(path: Path, problem: str) -> BadFile:
    return BadFile(
        path,
        f"cannot be read as safetensors ({problem}); is the file whole? Copy or download it again",
    )

"""Reads one safetensors file, a tensor at a time; what is wrong with it is said with the byte where
it shows.

The library checks the header against the file (no gap, no overlap, nothing past the end); what is
added here are words that lead to the place, tensors that are named twice, and dtypes that are no
weights.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from beagle_jax.errors import UserError

_NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
WEIGHT_DTYPES = tuple(_NUMPY)
_LENGTH_BYTES = 8  # the file begins with the length of its JSON header
_PIECE = 16 << 20  # bytes read by one call
_VALUES = 1 << 20  # converted at a time


def read_tensors(path: Path, integers: tuple[str, ...] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array in its stored dtype), one in memory at a time. integers: names of tensors that
    hold int32.

    Raises UserError naming the file, and the byte or the tensor that is wrong.
    """
    _check_names(path)
    try:
        with safe_open(path, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                dtype = opened.get_slice(name).get_dtype()
                allowed = ("I32",) if name.rpartition(".")[2] in integers else WEIGHT_DTYPES
                if dtype not in allowed:
                    raise UserError(
                        f"{path}: tensor {name} is stored as {dtype}; expected "
                        f"{' or '.join(allowed)}"
                    )
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise UserError(
            f"{path}: cannot be read as safetensors ({error}); is the file whole?"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A file of tensors, contiguous ones, in PyTorch's form. Raises UserError when it cannot be
    written.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); free some space or choose another folder, "
            "then run again"
        ) from error


class Place(NamedTuple):
    """Where a tensor lies in a file. Reading it touches those bytes alone, of a part of every row
    the pages that they lie on, and leaves no map of the file behind: pages that a map has touched
    would count as the process's memory for as long as the file is open.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The part `index` (a slice for each dimension, step 1), converted."""
        picked = [range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
        shape = tuple(map(len, picked))
        found = aligned(shape, dtype)
        if shape[1:] != self.shape[1:]:
            found[...] = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[index]
            return found
        # Rows side by side: from the file into the array, without a copy on the way, or converted
        # piece by piece.
        start = self.offset + (
            picked[0].start * math.prod(self.shape[1:]) * self.dtype.itemsize if picked else 0
        )
        with self.path.open("rb", buffering=0) as stream:
            if dtype == self.dtype:
                _read_into(
                    stream.fileno(), start, memoryview(found.reshape(-1).view(np.uint8)), self.path
                )
            else:
                self._convert_into(stream.fileno(), start, found.reshape(-1))
        return found

    def _convert_into(self, descriptor: int, start: int, found: np.ndarray) -> None:
        """Fills `found` with the numbers from byte `start` on; of a large tensor only some pieces
        are in memory in two dtypes.
        """

        def convert(begin: int) -> None:
            part = found[begin : begin + _VALUES]
            stored = np.empty(len(part), self.dtype)
            _read_into(
                descriptor,
                start + begin * self.dtype.itemsize,
                memoryview(stored.view(np.uint8)),
                self.path,
            )
            part[...] = stored

        _in_turns(convert, len(found), _VALUES)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins at a multiple of 64 bytes: a CPU device takes over such an array
    without copying it.

    A large one asks for huge pages: the first touch of its pages, 4 KB each, would take longer than
    reading the file.
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
    """work(0), work(step), .. below `count`; two threads take turns, so that the disk never waits
    for the memory.
    """
    if count <= step:
        work(0)
        return
    with ThreadPoolExecutor(max_workers=2) as workers:
        list(workers.map(work, range(0, count, step)))


def _read_into(descriptor: int, start: int, part: memoryview, path: Path) -> None:
    """Fills `part` from byte `start` on."""

    def read_piece(begin: int) -> None:
        at, end = begin, min(begin + _PIECE, len(part))
        while at < end:
            count = os.preadv(descriptor, [part[at:end]], start + at)
            if not count:
                raise UserError(
                    f"{path}: the file ends in the middle of a tensor, {len(part) - at:,} "
                    "bytes early; was it replaced while it was read?"
                )
            at += count

    _in_turns(read_piece, len(part), _PIECE)


def places(path: Path) -> dict[str, Place]:
    """Where each tensor of a file lies; errors as in `read_tensors`, before anything is read."""
    header, start = _check_names(path)
    found = {}
    try:
        with safe_open(path, framework="np") as opened:  # checks the header against the file
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                part = opened.get_slice(name)
                if part.get_dtype() not in WEIGHT_DTYPES:
                    raise UserError(
                        f"{path}: tensor {name} is stored as {part.get_dtype()}; expected "
                        f"{' or '.join(WEIGHT_DTYPES)}"
                    )
                offset = start + header[name]["data_offsets"][0]
                found[name] = Place(path, _NUMPY[part.get_dtype()], tuple(part.get_shape()), offset)
    except SafetensorError as error:
        raise UserError(
            f"{path}: cannot be read as safetensors ({error}); is the file whole?"
        ) from error
    return found


def digest(tensors: Mapping[str, np.ndarray], settings: str) -> str:
    """SHA-256 of settings, then of names, dtypes, shapes and values in the order of the names."""
    found = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        found.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        found.update(array.reshape(-1).view(np.uint8))
    return found.hexdigest()


def _check_names(path: Path) -> tuple[dict, int]:
    """The header, and the byte where the tensors begin. Raises UserError where the header is cut,
    is no JSON, names a tensor twice or promises more than the file holds.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            text = stream.read(length) if length <= size - _LENGTH_BYTES else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
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
    ) as error:  # a number of thousands of digits; thousands of brackets
        raise _not_whole(path, f"its header cannot be parsed ({error})") from error
    if twice:
        raise UserError(f"{path}: the header names {', '.join(twice)} twice; write the file again")
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


def _not_whole(path: Path, found: str) -> UserError:
    return UserError(
        f"{path}: cannot be read as safetensors ({found}); is the file whole? Copy or download "
        "it again"
    )

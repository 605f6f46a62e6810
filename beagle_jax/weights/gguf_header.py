"""Reads and checks the header of a GGUF file.

The gguf package's reader trusts the counts in a file: a damaged one makes it loop for hours, index
past the end or read another tensor's bytes. It also makes several arrays for each string of a
vocabulary, which took half of the time to load a small model. This module checks every length
against the size of the file, and what llama.cpp's own reader checks: types are known, tensors
follow one another without gaps, and all of them lie inside the file.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from beagle_jax.errors import BadFile, UserError

_SCALARS: dict[int, str] = {
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.BOOL: "?",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT64: "d",
}
_STRING, _ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
_MOST_DIMENSIONS = 4


class Tensor(NamedTuple):
    """Where and how a tensor is stored."""

    name: str
    shape: tuple[int, ...]  # fastest dimension first
    kind: gguf.GGMLQuantizationType
    start: int  # byte of the file
    size: int  # bytes


class Header(NamedTuple):
    """What a file says of itself."""

    values: dict[str, Any]  # metadata by key
    tensors: list[Tensor]


def read_header(path: Path) -> Header:
    """Reads the header of a little-endian GGUF file of version 2 or 3.

    Raises:
      UserError: the header is wrong. The message names the file, the byte and the problem.
    """
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Walk(path, data).header()
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise BadFile(path, f"not a readable GGUF file ({error}); download it again") from error


class _Walk:
    """A cursor that advances through the file with every value it reads."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> Header:
        """Reads the whole header, and checks where each tensor's bytes lie."""
        if self._bytes(4) != b"GGUF":
            raise self._broken("it does not begin with GGUF", 0)
        if (version := self._count("I")) not in (2, 3):
            raise self._broken(f"version {version}, expected 2 or 3")
        tensors, fields = self._count("Q"), self._count("Q")
        values: dict[str, Any] = {}
        for _ in range(fields):
            key = self._string()
            if key in values:
                raise self._broken(f"{key!r} appears twice")
            values[key] = self._value(self._count("I"))
        alignment = values.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._broken(f"general.alignment is {alignment!r}, expected a power of two")
        return Header(values, self._tensors(tensors, alignment))

    def _tensors(self, count: int, alignment: int) -> list[Tensor]:
        """Reads names, sizes and offsets of the tensors, which must follow one another."""
        tensors: dict[str, Tensor] = {}
        expected = 0
        for _ in range(count):
            name = self._string()
            if name in tensors:
                raise self._broken(f"tensor {name} appears twice")
            dimensions = self._count("I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise self._broken(f"tensor {name} has {dimensions} dimensions")
            shape = [self._count("Q") for _ in range(dimensions)]
            kind, offset = self._count("I"), self._count("Q")
            if kind not in gguf.GGML_QUANT_SIZES:
                raise self._broken(f"tensor {name} is stored as type {kind}, which does not exist")
            stored = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
            if 0 in shape or shape[0] % block:
                raise self._broken(
                    f"tensor {name} has shape {shape[::-1]}, which blocks of {block} do not fill"
                )
            if offset != expected:
                raise self._broken(
                    f"tensor {name} should begin at byte {expected:,} of the data, and begins "
                    f"at {offset:,}"
                )
            size = math.prod(shape) // block * block_bytes
            end, expected = offset + size, -(-(offset + size) // alignment) * alignment
            if end > len(self._data):
                raise self._broken(f"tensor {name} of {size:,} bytes is larger than the file")
            tensors[name] = Tensor(name, tuple(shape), stored, offset, size)
        start = -(-self._at // alignment) * alignment
        if count and start + end > len(self._data):
            raise self._broken(
                f"its tensors end at byte {start + end:,}, the file at {len(self._data):,}",
                len(self._data),
            )
        return [tensor._replace(start=start + tensor.start) for tensor in tensors.values()]

    def _value(self, kind: int) -> Any:
        """Reads one value, or a list of them."""
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._broken(f"a value of type {kind}, which does not exist")
        kind, count = self._count("I"), self._count("Q")
        if kind == _ARRAY or count > len(self._data) - self._at:
            raise self._broken(
                f"an array of {count:,} values of type {kind}, which does not fit in the file"
            )
        if kind in _SCALARS:
            code = _SCALARS[kind]
            return list(
                struct.unpack(f"<{count}{code}", self._bytes(count * struct.calcsize(code)))
            )
        return [self._value(kind) for _ in range(count)]

    def _string(self) -> str:
        start, length = self._at, self._count("Q")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._broken("a string that is not UTF-8", start) from error

    def _scalar(self, code: str) -> int | float:
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]

    def _count(self, code: str) -> int:
        number = self._scalar(code)
        assert isinstance(number, int)  # I and Q are whole numbers
        return number

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise self._broken(
                f"{count:,} bytes should follow, and the file ends at byte {len(self._data):,}"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def _broken(self, problem: str, at: int | None = None) -> UserError:
        at = self._at if at is None else at
        return BadFile(
            self._path,
            f"not a readable GGUF file (byte {at:,}: {problem}); is the file "
            "whole? Download it again",
        )

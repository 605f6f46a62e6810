"""Reads one safetensors file, a tensor at a time; what is wrong with it is said with the byte where it shows.

The library checks the header against the file (no gap, no overlap, nothing past the end); what is added here are words
that lead to the place, tensors that are named twice, and dtypes that are no weights.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax  # noqa: F401  (numpy knows bfloat16 through it)
import numpy as np
from safetensors import SafetensorError, safe_open

from beagle_jax.errors import UserError

WEIGHT_DTYPES = ("F32", "F16", "BF16")
_LENGTH_BYTES = 8  # the file begins with the length of its JSON header


def read_tensors(path: Path, integers: tuple[str, ...] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array in its stored dtype), one in memory at a time. integers: names of tensors that hold int32.

    Raises UserError naming the file, and the byte or the tensor that is wrong.
    """
    _check_names(path)
    try:
        with safe_open(path, framework="np") as opened:
            for name in opened.keys():
                dtype = opened.get_slice(name).get_dtype()
                allowed = ("I32",) if name.rpartition(".")[2] in integers else WEIGHT_DTYPES
                if dtype not in allowed:
                    raise UserError(f"{path}: tensor {name} is stored as {dtype}; expected {' or '.join(allowed)}")
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); is the file whole?") from error


def digest(tensors: Mapping[str, np.ndarray], settings: str) -> str:
    """SHA-256 of settings, then of names, dtypes, shapes and values in the order of the names."""
    found = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        found.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        found.update(array.reshape(-1).view(np.uint8))
    return found.hexdigest()


def _check_names(path: Path) -> None:
    """Raises UserError where the header is cut, is no JSON, names a tensor twice or promises more than the file holds."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            text = stream.read(length) if length <= size - _LENGTH_BYTES else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if text is None or size < _LENGTH_BYTES:
        raise _not_whole(path, f"its header should end at byte {_LENGTH_BYTES + length:,}, the file ends at byte {size:,}")
    twice: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        twice.extend(name for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise _not_whole(path, f"byte {_LENGTH_BYTES + error.start:,} of its header is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _not_whole(path, f"its header is not JSON from byte {_LENGTH_BYTES + error.pos:,} on ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise _not_whole(path, f"its header cannot be parsed ({error})") from error
    if twice:
        raise UserError(f"{path}: the header names {', '.join(twice)} twice; write the file again")
    ends = [entry["data_offsets"][1] for entry in header.values() if _has_offsets(entry)] if isinstance(header, dict) else []
    end = _LENGTH_BYTES + length + max(ends, default=0)
    if end != size:
        raise _not_whole(path, f"its tensors should end at byte {end:,}, the file ends at byte {size:,}")


def _has_offsets(entry: object) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)


def _not_whole(path: Path, found: str) -> UserError:
    return UserError(f"{path}: cannot be read as safetensors ({found}); is the file whole? Copy or download it again")

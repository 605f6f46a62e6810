"""The target's states of every training token, in one file per part of the text.

`part-0000.states` has one record per token (data/state_records.py), row after row. Its index,
`part-0000.states.json`, gives the hash of the tokens, the dtype, and the length and checksum of
each row. The checksum is compared at every read of a row. The states of answers that the target
writes are stored while it writes them; for other rows the target runs once. Each file is written
atomically.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from beagle_jax.data.behind import Behind
from beagle_jax.data.state_records import (
    Records,
    checksum,
    decode,
    encode,
    record_bytes,
    streams_of,
)
from beagle_jax.data.target_forward import TOKENS, compute
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.files import whole, write_text
from beagle_jax.json_file import read_json
from beagle_jax.model.target import Params, TargetSpec
from beagle_jax.remote import fetch, remove, size_of
from beagle_jax.terminal import size

_WAITING = 256 << 20  # bytes of states that wait for the disk at most
_MAPPED = 256  # files that are mapped at the same time; each takes a file descriptor
_AGAIN = "run prepare or train again"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredStates:
    """States [length, D] of one row in a file that is mapped into memory.

    Reading raises UserError if the file is truncated or damaged. `np.asarray` gives float32, or
    bfloat16 if stored as bfloat16.
    """

    path: Path
    row: int
    start: int  # offset in bytes
    shape: tuple[int, int]
    dtype: str  # on disk
    sum64: int | None  # `checksum` of the row; None for files of versions that stored none
    crc32: int | None = None  # in files of version 0.1.0

    def records(self) -> Records:
        """Returns the row as it is stored, as views of the file."""
        end = self.start + self.shape[0] * record_bytes(self.shape[1], self.dtype)
        data = _mapped(self.path)[self.start : end]
        if len(data) < end - self.start or self._is_changed(data):
            raise UserError(
                f"{self.path}, row {self.row}: the states are incomplete or were changed after "
                f"they were written; delete {self.path.name} and {_AGAIN}"
            )
        return decode(data, self.shape[1], self.dtype)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.records().floats(), dtype)

    def _is_changed(self, data: np.ndarray) -> bool:
        if self.sum64 is not None:
            return checksum(data) != self.sum64
        return self.crc32 is not None and zlib.crc32(data.data) != self.crc32


def _mapped(path: Path) -> np.ndarray:
    """Returns the bytes of a file, mapped; a file that was replaced is mapped anew."""
    there = path.stat()
    if not there.st_size:  # an empty file cannot be mapped
        return np.empty(0, np.uint8)
    return _mapping(path, there.st_ino, there.st_size, there.st_mtime_ns)


@lru_cache(_MAPPED)
def _mapping(path: Path, *_state: int) -> np.ndarray:
    return np.asarray(np.memmap(path, np.uint8, mode="r"))  # a plain array is sliced faster


def stored_dtype(params: Params, dtype: str | None) -> str:
    """Returns `data.states_dtype`; the target's dtype if it is None."""
    return dtype or np.dtype(params["embed_VD"].dtype).name


def target_states(
    params: Params,
    spec: TargetSpec,
    rows: Sequence[Row],
    path: Path,
    dtype: str | None = None,
    taps: tuple[int, ...] = (),
) -> list[StoredStates]:
    """Returns the states of each row, stored in `path`.

    Computes and writes them first (`store_states`) unless they are there.

    Raises:
        UserError: the file holds other taps, or there is too little disk space.
    """
    store_states(params, spec, [(path, rows)], dtype, taps)
    fetch(path)
    dtype, width = stored_dtype(params, dtype), record_width(spec, taps)
    index = read_json(_index(path), _AGAIN, f"delete it and {_AGAIN}")
    record = record_bytes(width, dtype)
    starts = np.cumsum([0, *(len(row.tokens) for row in rows)]) * record
    unknown = [None] * len(rows)
    sums = zip(index.get("sum64", unknown), index.get("crc32", unknown), strict=True)
    return [
        StoredStates(path, number, int(start), (len(row.tokens), width), dtype, *known)
        for number, (row, start, known) in enumerate(zip(rows, starts[:-1], sums, strict=True))
    ]


def store_states(
    params: Params,
    spec: TargetSpec,
    parts: Sequence[tuple[Path, Sequence[Row]]],
    dtype: str | None = None,
    taps: tuple[int, ...] = (),
    tokens: int = TOKENS,
) -> float | None:
    """Computes and writes the states of the rows of each file that does not hold them yet.

    A thread writes while the target runs, also past the end of a file. The target runs on the mesh
    of its parameters, if they have one (data/target_forward.py).

    taps: layers that the draft reads (`DraftSpec.taps`); they precede the state after the final
    norm in each record. tokens: of one forward pass, on each device. Returns the share of the time
    in which the target waited for the writer; None if nothing was written.

    Raises:
        UserError: a file holds other taps, or there is too little disk space.
    """
    taps = streams_of(taps)
    dtype, width = stored_dtype(params, dtype), record_width(spec, taps)
    missing = [part for part in parts if not is_stored(*part, width, dtype, taps)]
    if not missing:
        return None
    total = sum(len(row.tokens) for _, rows in missing for row in rows)
    clock = time.perf_counter()
    with (
        Behind(_WAITING) as behind,
        tqdm(total=total, desc="target states", unit="tok", smoothing=0.05) as bar,
    ):
        for path, rows in missing:
            _reserve(path, rows, width, dtype)
            write = partial(_write, path, rows, width, dtype, taps=taps)
            states = _compute(params, spec, rows, taps, dtype, tokens)
            counted = _counted(states, rows, bar)
            behind.send(write, counted, lambda item: item[1].nbytes)
    seconds = time.perf_counter() - clock
    _log.info(
        f"target states: {total:,} tokens in {seconds:.1f} s; the target waited for the disk "
        f"{behind.waited / seconds:.1%} of this time"
    )
    return behind.waited / seconds


_compute = compute


def _counted(
    states: Iterable[tuple[int, Records]], rows: Sequence[Row], bar: tqdm
) -> Iterator[tuple[int, Records]]:
    for number, records in states:
        yield number, records
        bar.update(len(rows[number].tokens))


def keep_states(
    path: Path,
    rows: Sequence[Row],
    states: Sequence[np.ndarray],
    dtype: str | None = None,
    taps: tuple[int, ...] = (),
) -> None:
    """Writes the states [length, D] of each row, which the target computed with its answer.

    dtype: None keeps the dtype of the states. taps: layers that precede the state after the final
    norm in each record.

    Raises:
        UserError: there is too little disk space, or the file cannot be written.
    """
    dtype = dtype or states[0].dtype.name
    _reserve(path, rows, states[0].shape[1], dtype)
    _write(path, rows, states[0].shape[1], dtype, enumerate(states), taps)


def is_stored(
    path: Path, rows: Sequence[Row], width: int, dtype: str, taps: tuple[int, ...] = ()
) -> bool:
    """Returns whether a complete file holds the states of these rows in this dtype.

    Raises:
        UserError: the file has other taps. It is not replaced, as another draft may use it.
    """
    stored_bytes = size_of(path)
    if stored_bytes is None or not fetch(_index(path)).exists():
        return False
    index = read_json(_index(path), _AGAIN, f"delete it and {_AGAIN}")
    taps, there = (
        streams_of(taps),
        tuple(index.get("taps", ())),
    )  # files of versions without taps have none
    if there != taps:
        raise UserError(
            f"{path}: holds states of {_named(there)}, and this draft reads {_named(taps)}; set "
            f"another data.folder, or delete {path.name} to write it again"
        )
    wanted = _description(rows, width, dtype)
    lists = [index[key] for key in ("sum64", "crc32") if key in index]
    whole_file = stored_bytes == states_bytes(rows, width, dtype)
    return (
        whole_file
        and all(len(sums) == len(rows) for sums in lists)
        and all(index.get(key) == wanted[key] for key in wanted)
    )


def record_width(spec: TargetSpec, taps: tuple[int, ...] = ()) -> int:
    """Returns how many numbers a token's record has: its taps and its final state."""
    return spec.hidden_size * (len(streams_of(taps)) + 1)


def _named(taps: tuple[int, ...]) -> str:
    return f"the target's streams {list(taps)}" if taps else "the target's final norm alone"


def states_bytes(rows: Sequence[Row], width: int, dtype: str) -> int:
    """Returns the size on disk of the rows' states, in bytes."""
    return sum(len(row.tokens) for row in rows) * record_bytes(width, dtype)


def _description(rows: Sequence[Row], width: int, dtype: str) -> dict:
    tokens = np.concatenate([row.tokens for row in rows]).astype(np.int32)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return {"shape": [len(tokens), width], "dtype": dtype, "tokens_sha256": digest}


def _index(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".json")


def _reserve(path: Path, rows: Sequence[Row], width: int, dtype: str) -> None:
    """Raises UserError if the disk has too little space; called before anything is written."""
    needed, free = states_bytes(rows, width, dtype), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path}: the target's states need {size(needed)}, {size(free)} are free; lower "
            "data.answer_tokens, set data.states_dtype: int8 or data.states: online, or "
            "data.folder on a larger disk"
        )


def _write(
    path: Path,
    rows: Sequence[Row],
    width: int,
    dtype: str,
    states: Iterable[tuple[int, np.ndarray | Records]],
    taps: tuple[int, ...],
) -> None:
    """Writes the file and its index.

    states: (row number, states [length, D]) pairs in any order; `Records` are stored as they are.
    """
    starts = np.cumsum([0, *(len(row.tokens) for row in rows)]) * record_bytes(width, dtype)
    sums = [0] * len(rows)
    try:
        with whole(path) as partial_path:
            with partial_path.open("wb") as stream:
                for number, states_LD in states:
                    data = encode(states_LD, dtype)
                    sums[number] = checksum(np.frombuffer(data, np.uint8))
                    stream.seek(starts[number])
                    stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())  # a full disk may raise only here
            remove(_index(path))  # new states must not have an old index
        index = _description(rows, width, dtype) | {
            "taps": list(taps),
            "row_tokens": [len(row.tokens) for row in rows],
            "sum64": sums,
        }
        write_text(_index(path), json.dumps(index))
    except OSError as error:
        raise UserError(
            f"{path}: the target's states cannot be written ({error.strerror}); earlier parts "
            "are kept. Free some space, then run again to continue"
        ) from error

"""The target's states for every training token: one file beside each part of the text, and its
index.

`part-0000.states` has one record per token, rows end to end: D numbers in float32 or bfloat16, or D
int8 numbers and their float32 scale. `part-0000.states.json`, its index, says for which tokens and
in which dtype, and has each row's length and CRC-32, which is checked whenever the row is read.
Answers written by the target bring their states along; other rows are run through it once. A file
appears whole or not at all.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.files import whole, write_text
from beagle_jax.json_file import read_json
from beagle_jax.model.masks import chats_mask
from beagle_jax.model.packing import places
from beagle_jax.model.target import Params, TargetSpec, forward
from beagle_jax.terminal import size

_TOKENS_PER_BATCH = 2048  # work of one forward: more adds memory, not speed
_WIDTH_MULTIPLE = 32  # row lengths are padded to a multiple of this: one compile each
_INT8_MAX = 127
_AGAIN = "run prepare or train again"


@dataclass(frozen=True)
class StoredStates:
    """The states [length, D] of one row in a file; np.asarray reads them: float32, or bfloat16 if
    stored so.
    """

    path: Path
    row: int
    start: int  # in bytes
    shape: tuple[int, int]
    dtype: str  # on disk
    crc: int | None  # None in files of before there was one

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        wanted = self.shape[0] * record_bytes(self.shape[1], self.dtype)
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            data = stream.read(wanted)
        if len(data) < wanted or (self.crc is not None and zlib.crc32(data) != self.crc):
            raise UserError(
                f"{self.path}, row {self.row}: the states are not those that were written (cut "
                f"off or changed); delete {self.path.name} and {_AGAIN}"
            )
        return np.asarray(_decode(data, self.shape, self.dtype), dtype)


def states_at(
    params: Params,
    spec: TargetSpec,
    tokens_BL: jax.Array,
    length_BC: jax.Array,
    taps: tuple[int, ...] = (),
) -> jax.Array:
    """The target's states [B, L, D] of each chat on its own (model/packing.py); what stands in the
    padding is not zero. Not jitted.

    taps: streams (`forward`) to put before them, [B, L, (taps + 1) * D].
    """
    L = tokens_BL.shape[1]
    found = forward(
        params,
        spec,
        tokens_BL,
        places(L, length_BC).place_BX,
        chats_mask(length_BC, L),
        taps=taps,
    )
    return jnp.concatenate([*found.taps, found.states_BTD], axis=-1) if taps else found.states_BTD


_states = partial(jax.jit, static_argnames=("spec", "taps"))(states_at)


def states_in_memory(
    params: Params,
    spec: TargetSpec,
    tokens_BL: np.ndarray,
    length_BC: np.ndarray,
    taps: tuple[int, ...] = (),
) -> np.ndarray:
    """The same on the host, a few rows at a time; for what is small."""
    lines = max(1, _TOKENS_PER_BATCH // tokens_BL.shape[1])
    parts = [slice(first, first + lines) for first in range(0, len(tokens_BL), lines)]
    return np.concatenate(
        [
            np.asarray(_states(params, spec, tokens_BL[part], length_BC[part], taps))
            for part in parts
        ]
    )


def stored_dtype(params: Params, dtype: str | None) -> str:
    """`data.states_dtype`, or the target's own for None."""
    return dtype or np.dtype(params["embed_VD"].dtype).name


def target_states(
    params: Params,
    spec: TargetSpec,
    rows: Sequence[Row],
    path: Path,
    dtype: str | None = None,
    taps: tuple[int, ...] = (),
) -> list[StoredStates]:
    """States of each row, in `path`; computed if they are not there for these rows in this
    dtype.

    taps: of the draft (`DraftSpec.taps`); the state after the final norm stands behind them.
    Raises UserError if the file holds other taps.
    """
    dtype, width = stored_dtype(params, dtype), record_width(spec, taps)
    if not is_stored(path, rows, width, dtype, taps):
        _reserve(path, rows, width, dtype)
        _write(path, rows, width, dtype, _compute(params, spec, rows, taps), taps)
    index = read_json(_index(path), _AGAIN, f"delete it and {_AGAIN}")
    record = record_bytes(width, dtype)
    starts = np.cumsum([0, *(len(row.tokens) for row in rows)]) * record
    return [
        StoredStates(path, number, int(start), (len(row.tokens), width), dtype, crc)
        for number, (row, start, crc) in enumerate(
            zip(rows, starts[:-1], index.get("crc32", [None] * len(rows)), strict=True)
        )
    ]


def keep_states(
    path: Path,
    rows: Sequence[Row],
    states: Sequence[np.ndarray],
    dtype: str | None = None,
    taps: tuple[int, ...] = (),
) -> None:
    """Writes the states [length, D] that came with each row; dtype None: as they are.

    taps: what stands before the state after the final norm in each record.
    """
    dtype = dtype or states[0].dtype.name
    _reserve(path, rows, states[0].shape[1], dtype)
    _write(path, rows, states[0].shape[1], dtype, enumerate(states), taps)


def is_stored(
    path: Path, rows: Sequence[Row], width: int, dtype: str, taps: tuple[int, ...] = ()
) -> bool:
    """Whether a whole file holds the states of these rows in this dtype.

    Raises UserError for a file of other taps, which another kind of draft still reads.
    """
    if not path.exists() or not _index(path).exists():
        return False
    found = read_json(_index(path), _AGAIN, f"delete it and {_AGAIN}")
    there = tuple(found.get("taps", ()))  # versions before taps stored what has none
    if there != taps:
        raise UserError(
            f"{path}: holds states of {_named(there)}, and this draft reads {_named(taps)}; set "
            f"another data.folder, or delete {path.name} to have it written anew"
        )
    wanted = _description(rows, width, dtype)
    whole_file = path.stat().st_size == states_bytes(rows, width, dtype) and len(
        found.get("crc32", rows)
    ) == len(rows)
    return whole_file and all(found.get(key) == wanted[key] for key in wanted)


def record_width(spec: TargetSpec, taps: tuple[int, ...] = ()) -> int:
    """Numbers stored for a token: its taps and its state after the final norm."""
    return spec.hidden_size * (len(taps) + 1)


def _named(taps: tuple[int, ...]) -> str:
    return f"the target's streams {list(taps)}" if taps else "the target's final norm alone"


def states_bytes(rows: Sequence[Row], width: int, dtype: str) -> int:
    """Size of the rows' states on disk."""
    return sum(len(row.tokens) for row in rows) * record_bytes(width, dtype)


def _description(rows: Sequence[Row], width: int, dtype: str) -> dict:
    tokens = np.concatenate([row.tokens for row in rows]).astype(np.int32)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return {"shape": [len(tokens), width], "dtype": dtype, "tokens_sha256": digest}


def _index(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".json")


def _reserve(path: Path, rows: Sequence[Row], width: int, dtype: str) -> None:
    """Refuses a disk that is too small before anything is written to it."""
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
    states: Iterable[tuple[int, np.ndarray]],
    taps: tuple[int, ...],
) -> None:
    """Writes the file and its index. states: the number of a row and its states [length, D], in any
    order.
    """
    starts = np.cumsum([0, *(len(row.tokens) for row in rows)]) * record_bytes(width, dtype)
    crc = [0] * len(rows)
    try:
        with whole(path) as partial_path:
            with partial_path.open("wb") as stream:
                for number, states_LD in states:
                    data = _encode(states_LD, dtype)
                    crc[number] = zlib.crc32(data)
                    stream.seek(starts[number])
                    stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())  # a disk that is full may say so only now
            _index(path).unlink(missing_ok=True)  # never an old index beside new states
        index = _description(rows, width, dtype) | {
            "taps": list(taps),
            "row_tokens": [len(row.tokens) for row in rows],
            "crc32": crc,
        }
        write_text(_index(path), json.dumps(index))
    except OSError as error:
        raise UserError(
            f"{path}: the target's states cannot be written ({error.strerror}); the parts "
            "before it are kept, make room and run again to go on"
        ) from error


def record_bytes(width: int, dtype: str) -> int:
    """Bytes on disk of one token's state."""
    return width + 4 if dtype == "int8" else width * np.dtype(dtype).itemsize


def _encode(states_LD: np.ndarray, dtype: str) -> bytes:
    """Records of the tokens. int8: the state over its scale, which is its largest magnitude /
    127.
    """
    if dtype != "int8":
        return np.ascontiguousarray(states_LD, np.dtype(dtype)).tobytes()
    states_LD = np.asarray(states_LD, np.float32)
    scale_L = np.abs(states_LD).max(axis=1) / _INT8_MAX
    records = np.empty(len(states_LD), _int8_record(states_LD.shape[1]))
    records["state"] = np.rint(states_LD / np.where(scale_L == 0, 1, scale_L)[:, None])
    records["scale"] = scale_L
    return records.tobytes()


def _decode(data: bytes, shape: tuple[int, int], dtype: str) -> np.ndarray:
    if dtype != "int8":
        return np.frombuffer(data, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).reshape(
            shape
        )
    records = np.frombuffer(data, _int8_record(shape[1]))
    return records["state"].astype(np.float32) * records["scale"][:, None]


def _int8_record(width: int) -> np.dtype:
    return np.dtype([("state", np.int8, (width,)), ("scale", np.float32)])


def _compute(
    params: Params, spec: TargetSpec, rows: Sequence[Row], taps: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray]]:
    """Number and states of every row, longest first: neighbours share a padded width, and the worst
    memory need shows at once.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
    with tqdm(
        total=sum(len(row.tokens) for row in rows), desc="target states", unit="tok", smoothing=0.05
    ) as bar:
        while order:
            width = -(-len(rows[order[0]].tokens) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
            lines = max(1, _TOKENS_PER_BATCH // width)
            picked, order = order[:lines], order[lines:]
            tokens_BL, length_B1 = np.zeros((lines, width), np.int32), np.ones((lines, 1), np.int32)
            for line, index in enumerate(picked):
                length_B1[line] = len(rows[index].tokens)
                tokens_BL[line, : len(rows[index].tokens)] = rows[index].tokens
            states_BLD = np.asarray(_states(params, spec, tokens_BL, length_B1, taps))
            for line, index in enumerate(picked):
                yield index, states_BLD[line, : len(rows[index].tokens)]
            bar.update(int(length_B1[: len(picked)].sum()))

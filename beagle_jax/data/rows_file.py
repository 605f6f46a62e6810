"""Token rows in a file: prompts, answers and supervision, memory-mapped by row number.

The one format of text on disk: `data.folder` holds such files, `prepare --export` writes them and
`data.source` reads them. A `.rows` file is a safetensors file of N tokens in R rows:

    tokens         uint16 [N] (uint32 if an id needs it)   all rows, one after another
    supervised     bool [N]        the draft learns from the token (method.md 5.2)
    start          int64 [R + 1]   the index: row r is tokens[start[r] : start[r + 1]]
    prompt_tokens  int32 [R]       tokens before the first supervised one
    answer_tokens  int32 [R]       supervised tokens; 0 if the target is to answer the row

Its metadata is {"beagle_jax.rows/1": a `Header` as JSON}.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import overload

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.files import whole

FORMAT = "beagle_jax.rows/1"
SUFFIX = ".rows"
_DTYPES = {
    "tokens": ("U16", "U32"),
    "supervised": ("BOOL",),
    "start": ("I64",),
    "prompt_tokens": ("I32",),
    "answer_tokens": ("I32",),
}
_NUMPY = {"U16": np.uint16, "U32": np.uint32, "BOOL": np.bool_, "I64": np.int64, "I32": np.int32}


@dataclass(frozen=True)
class Header:
    """What the rows of a file were made for, and from."""

    # "target" (its source) and the hashes of data/fingerprint.py; a hash that is missing here is
    # not known
    made_for: Mapping[str, str] = field(default_factory=dict)
    # where the text came from: name, sha256 of the content and, of a dataset, revision
    sources: Sequence[Mapping[str, str | None]] = ()
    items: int | None = None  # chats or prompts of the source that became these rows
    rows_sha256: str = ""  # of tokens and supervision; `write_rows` computes it


class RowsFile(Sequence[Row]):
    """The rows of a file. Arrays are views of the mapped file and are read when they are used."""

    def __init__(self, path: Path, header: Header, arrays: Mapping[str, np.ndarray]):
        """See `open_rows`."""
        self.path, self.header = path, header
        self.tokens_N, self.supervised_N = arrays["tokens"], arrays["supervised"]
        self.start_R = arrays["start"]  # R + 1 entries
        self.prompt_tokens_R = arrays["prompt_tokens"]
        self.answer_tokens_R = arrays["answer_tokens"]

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.start_R) - 1

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        """Returns one row, or a list of rows, as Python numbers."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        tokens_L, supervised_L = self.arrays(range(len(self))[place])
        return Row(tokens_L.tolist(), supervised_L.tolist())

    def __iter__(self) -> Iterator[Row]:
        """Yields the rows in order."""
        return (self[number] for number in range(len(self)))

    def arrays(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens [length] and supervision [length] of a row, without a copy."""
        part = slice(int(self.start_R[number]), int(self.start_R[number + 1]))
        return self.tokens_N[part], self.supervised_N[part]


def write_rows(path: Path, rows: Sequence[Row], header: Header) -> None:
    """Writes a file of rows, as a whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    tokens_N, supervised_N, start_R = _joined(rows)
    short = np.uint16 if not len(tokens_N) or tokens_N.max() < 2**16 else np.uint32
    arrays = {
        "tokens": tokens_N.astype(short),
        "supervised": supervised_N,
        "start": start_R,
        "prompt_tokens": np.array([_prompt_length(row) for row in rows], np.int32),
        "answer_tokens": np.array([sum(row.supervised) for row in rows], np.int32),
    }
    digest = _digest(tokens_N, supervised_N, start_R)
    described = json.dumps(asdict(header) | {"rows_sha256": digest})
    try:
        with whole(path) as partial:
            # One key: safetensors writes several in any order, and equal rows make equal files.
            save_file(arrays, partial, {FORMAT: described})
    except OSError as error:
        raise UserError(
            f"{path}: the text cannot be written ({error}); make room, and run again to go on"
        ) from error


def open_rows(path: str | Path) -> RowsFile:
    """Maps a file of rows into memory.

    Raises:
        UserError: the file cannot be read, is of another format, or its rows are not those that
            were written.
    """
    path = Path(path)
    header, places = _described(path)
    raw = np.asarray(np.memmap(path, np.uint8, mode="r"))  # a plain array is sliced faster
    arrays: dict[str, np.ndarray] = {
        name: raw[begin:end].view(_NUMPY[dtype]) for name, (dtype, begin, end) in places.items()
    }
    mapped = RowsFile(path, header, arrays)
    if fault := _fault(mapped):
        raise UserError(f"{path}: {fault}; the file is damaged: get or write it anew")
    return mapped


def rows_digest(rows: Sequence[Row]) -> str:
    """Returns the SHA-256 of rows: of their tokens, supervision, lengths and order."""
    return _digest(*_joined(rows))


def _joined(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens [N] and supervision [N] of all rows, and the index [R + 1]."""
    tokens_N = np.concatenate([[], *(row.tokens for row in rows)]).astype(np.int64)
    supervised_N = np.concatenate([[], *(row.supervised for row in rows)]).astype(bool)
    return tokens_N, supervised_N, np.cumsum([0, *(len(row.tokens) for row in rows)])


def _digest(tokens_N: np.ndarray, supervised_N: np.ndarray, start_R: np.ndarray) -> str:
    """Returns the hash of rows, whatever the dtype of their tokens."""
    digest = hashlib.sha256()
    for array, dtype in ((tokens_N, np.uint32), (supervised_N, np.uint8), (start_R, np.int64)):
        for begin in range(0, len(array), 1 << 24):  # a copy of the whole text may not fit
            digest.update(array[begin : begin + (1 << 24)].astype(dtype).tobytes())
    return digest.hexdigest()


def _prompt_length(row: Row) -> int:
    return row.supervised.index(True) if any(row.supervised) else len(row.tokens)


def _described(path: Path) -> tuple[Header, dict[str, tuple[str, int, int]]]:
    """Returns the header, and dtype, first and last byte of each array."""
    try:
        with safe_open(path, "numpy") as opened:  # checks the whole layout against the file's size
            about = opened.metadata() or {}
        with path.open("rb") as stream:
            count = int.from_bytes(stream.read(8), "little")
            layout = json.loads(stream.read(count))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as token rows ({error})") from error
    if FORMAT not in about:
        raise UserError(
            f"{path}: its metadata has {', '.join(about) or 'nothing'}; expected {FORMAT}, as "
            "prepare --export writes it"
        )
    wrong = [name for name in _DTYPES if layout.get(name, {}).get("dtype") not in _DTYPES[name]]
    if wrong:
        raise UserError(f"{path}: has no array {wrong[0]} of type {' or '.join(_DTYPES[wrong[0]])}")
    places = {
        name: (layout[name]["dtype"], *(8 + count + at for at in layout[name]["data_offsets"]))
        for name in _DTYPES
    }
    try:
        return Header(**json.loads(about[FORMAT])), places
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its header cannot be read ({error!r})") from error


def _fault(mapped: RowsFile) -> str:
    """Describes what is wrong with the arrays; returns "" if nothing is."""
    R, N, start_R = len(mapped), len(mapped.tokens_N), mapped.start_R
    if len(start_R) < 1 or start_R[0] != 0 or start_R[-1] != N or (np.diff(start_R) < 1).any():
        return f"its index does not divide {N} tokens into rows"
    sizes = (len(mapped.supervised_N), len(mapped.prompt_tokens_R), len(mapped.answer_tokens_R))
    if sizes != (N, R, R):
        return f"it has {N} tokens in {R} rows, and lists of {sizes} for them"
    if _digest(mapped.tokens_N, mapped.supervised_N, start_R) != mapped.header.rows_sha256:
        return "its rows are not those that its header describes (rows_sha256)"
    return ""

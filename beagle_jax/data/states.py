"""The target's states for every training token, kept beside each part of the text.

`part-0000.states` is one array [tokens of the part, D] in the target's dtype, rows end to end; `part-0000.states.json`
says for what it was made. Answers written by the target bring their states along; others are run through it once.
A states file is written under another name first, so a broken run leaves no half file behind.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.files import whole, write_text
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import Params, TargetSpec, forward

_TOKENS_PER_BATCH = 2048  # work of one forward: more adds memory, not speed
_WIDTH_MULTIPLE = 32  # row lengths are padded to a multiple of this: one compile each


@partial(jax.jit, static_argnames=("spec",))
def _states(params: Params, spec: TargetSpec, tokens_BL: jax.Array, length_B: jax.Array) -> jax.Array:
    B, L = tokens_BL.shape
    positions_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    return forward(params, spec, tokens_BL, positions_BL, causal_mask(length_B, L))[0]


def target_states(params: Params, spec: TargetSpec, rows: Sequence[Row], path: Path) -> list[np.ndarray]:
    """States [length, D] of each row, memory-mapped from `path`; computed if they are not there for these rows."""
    dtype = np.dtype(params["embed_VD"].dtype)
    if not _made_for(path, rows, spec.hidden_size, dtype):
        _reserve(path, rows, spec.hidden_size, dtype)
        _write(path, rows, spec.hidden_size, dtype, lambda out: _compute(out, params, spec, rows))
    total = sum(len(row.tokens) for row in rows)
    return _by_row(np.memmap(path, dtype, mode="r", shape=(total, spec.hidden_size)), rows)


def keep_states(path: Path, rows: Sequence[Row], states: Sequence[np.ndarray]) -> None:
    """Writes the states [length, D] that came with each row."""

    def fill(out: np.ndarray) -> None:
        for row_LD, states_LD in zip(_by_row(out, rows), states, strict=True):
            row_LD[:] = states_LD

    _reserve(path, rows, states[0].shape[1], states[0].dtype)
    _write(path, rows, states[0].shape[1], states[0].dtype, fill)


def _made_for(path: Path, rows: Sequence[Row], width: int, dtype: np.dtype) -> bool:
    note = _note(path)
    return path.exists() and note.exists() and json.loads(note.read_text()) == _description(rows, width, dtype)


def _description(rows: Sequence[Row], width: int, dtype: np.dtype) -> dict:
    tokens = np.concatenate([row.tokens for row in rows]).astype(np.int32)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return {"shape": [len(tokens), width], "dtype": dtype.name, "tokens_sha256": digest}


def _note(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".json")


def _reserve(path: Path, rows: Sequence[Row], width: int, dtype: np.dtype) -> None:
    """Refuses a disk that is too small before anything is written to it."""
    size = sum(len(row.tokens) for row in rows) * width * dtype.itemsize
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(f"{path}: the target's states need {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                        "lower data.answer_tokens or set data.folder on a larger disk")


def _write(path: Path, rows: Sequence[Row], width: int, dtype: np.dtype, fill) -> None:
    wanted = _description(rows, width, dtype)
    with whole(path) as partial_path:
        out = np.memmap(partial_path, dtype, mode="w+", shape=tuple(wanted["shape"]))
        fill(out)
        out.flush()
        _note(path).unlink(missing_ok=True)  # never an old description beside new states
    write_text(_note(path), json.dumps(wanted))


def _by_row(states_MD: np.ndarray, rows: Sequence[Row]) -> list[np.ndarray]:
    start = np.cumsum([0, *(len(row.tokens) for row in rows)])
    return [states_MD[begin:end] for begin, end in zip(start[:-1], start[1:])]


def _compute(out: np.ndarray, params: Params, spec: TargetSpec, rows: Sequence[Row]) -> None:
    into = _by_row(out, rows)
    # Longest first: neighbours share a padded width, and the worst memory need shows at once.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
    with tqdm(total=len(out), desc="target states", unit="tok", smoothing=0.05) as bar:
        while order:
            width = -(-len(rows[order[0]].tokens) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
            lines = max(1, _TOKENS_PER_BATCH // width)
            picked, order = order[:lines], order[lines:]
            tokens_BL, length_B = np.zeros((lines, width), np.int32), np.ones(lines, np.int32)
            for line, index in enumerate(picked):
                length_B[line] = len(rows[index].tokens)
                tokens_BL[line, : length_B[line]] = rows[index].tokens
            states_BLD = np.asarray(_states(params, spec, tokens_BL, length_B))
            for line, index in enumerate(picked):
                into[index][:] = states_BLD[line, : length_B[line]]
            bar.update(int(length_B[: len(picked)].sum()))

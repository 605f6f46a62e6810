"""The target's states for every training token, computed once and kept beside the text.

`states.bin` is one array [tokens, D] in the target's dtype, all rows end to end; `states.json` says for what it was
made. It is written under another name first, so a broken run leaves no half file behind.
"""

import hashlib
import json
import os
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
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import Params, TargetSpec, forward

_TOKENS_PER_BATCH = 2048  # work of one forward: more adds memory, not speed
_WIDTH_MULTIPLE = 32  # row lengths are padded to a multiple of this: one compile each


@partial(jax.jit, static_argnames=("spec",))
def _states(params: Params, spec: TargetSpec, tokens_BL: jax.Array, length_B: jax.Array) -> jax.Array:
    B, L = tokens_BL.shape
    positions_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    return forward(params, spec, tokens_BL, positions_BL, causal_mask(length_B, L))[0]


def target_states(params: Params, spec: TargetSpec, rows: Sequence[Row], folder: str) -> np.ndarray:
    """States [sum of row lengths, D], memory-mapped; computed on the first call, read back on later ones."""
    path, made_for = Path(folder) / "states.bin", Path(folder) / "states.json"
    dtype = np.dtype(params["embed_VD"].dtype)
    total = sum(len(row.tokens) for row in rows)
    shape = (total, spec.hidden_size)
    digest = hashlib.sha256(np.concatenate([row.tokens for row in rows]).astype(np.int32).tobytes()).hexdigest()
    wanted = {"shape": list(shape), "dtype": dtype.name, "tokens_sha256": digest}
    if path.exists() and made_for.exists() and json.loads(made_for.read_text()) == wanted:
        return np.memmap(path, dtype, mode="r", shape=shape)
    size = total * spec.hidden_size * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{folder}: the target's states need {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                        "lower data.answer_tokens or set data.folder on a larger disk")
    tqdm.write(f"target states: {total:,} tokens, {size / 1e9:.2f} GB in {path}")
    partial_path = path.with_suffix(".partial")
    out = np.memmap(partial_path, dtype, mode="w+", shape=shape)
    _fill(out, params, spec, rows)
    out.flush()
    made_for.unlink(missing_ok=True)  # never an old description beside new states
    os.replace(partial_path, path)
    partial_path.write_text(json.dumps(wanted))
    os.replace(partial_path, made_for)
    return np.memmap(path, dtype, mode="r", shape=shape)


def _fill(out: np.ndarray, params: Params, spec: TargetSpec, rows: Sequence[Row]) -> None:
    start = np.cumsum([0, *(len(row.tokens) for row in rows)])
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
                out[start[index] : start[index + 1]] = states_BLD[line, : length_B[line]]
            bar.update(int(length_B[: len(picked)].sum()))

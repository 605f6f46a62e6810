"""The target's states of rows of text, by one forward pass for each batch of rows.

On a mesh, the rows of a batch are split over the axes `data` and `fsdp`. The target's parameters
lie where they were placed, so XLA gathers them along `fsdp` and splits products along `tensor`.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.arrays import AnyArray
from beagle_jax.data.state_records import INT8_MAX, Records, streams_of
from beagle_jax.data.template import Row
from beagle_jax.model.masks import chats_mask
from beagle_jax.model.packing import places
from beagle_jax.model.target import Params, TargetSpec, forward
from beagle_jax.sharding import mesh_of, place_rows, row_parts

TOKENS = 8192  # of one forward pass, on each device
_IN_MEMORY = 2048  # tokens of one forward pass whose states stay in memory
_WIDTH_MULTIPLE = 32  # rows are padded to a multiple of this; each new size recompiles


def states_at(
    params: Params,
    spec: TargetSpec,
    tokens_BL: AnyArray,
    length_BC: AnyArray,
    taps: tuple[int, ...] = (),
) -> jax.Array:
    """Computes the target's states [B, L, D]; chats of a row do not attend to each other.

    See model/packing.py for rows of several chats. Padding positions are not zero. Not jitted.

    taps: residual streams (see `forward`) that precede the states, giving [B, L, (taps + 1) * D].
    FINAL among them adds nothing.
    """
    L, taps = tokens_BL.shape[1], streams_of(taps)
    out = forward(
        params,
        spec,
        tokens_BL,
        places(L, length_BC).place_BX,
        chats_mask(length_BC, L),
        taps=taps,
    )
    return jnp.concatenate([*out.taps, out.states_BTD], axis=-1) if taps else out.states_BTD


_states = partial(jax.jit, static_argnames=("spec", "taps"))(states_at)


def states_in_memory(
    params: Params,
    spec: TargetSpec,
    tokens_BL: AnyArray,
    length_BC: AnyArray,
    taps: tuple[int, ...] = (),
) -> np.ndarray:
    """Computes `states_at` a few rows at a time, into host memory; for small inputs."""
    lines = max(1, _IN_MEMORY // tokens_BL.shape[1])
    parts = [slice(first, first + lines) for first in range(0, len(tokens_BL), lines)]
    return np.concatenate(
        [
            np.asarray(_states(params, spec, tokens_BL[part], length_BC[part], taps))
            for part in parts
        ]
    )


@partial(jax.jit, static_argnames=("spec", "taps", "dtype"))
def _stored(
    params: Params,
    spec: TargetSpec,
    tokens_BL: AnyArray,
    length_BC: AnyArray,
    taps: tuple[int, ...],
    dtype: str,
) -> tuple[jax.Array, jax.Array | None]:
    """Computes states as a file stores them: int8 with scales [B, L], or another dtype and None.

    The device divides by the scales, because fewer bytes then leave it.
    """
    states_BLI = states_at(params, spec, tokens_BL, length_BC, taps)
    if dtype != "int8":
        return states_BLI.astype(dtype), None
    states_BLI = states_BLI.astype(jnp.float32)
    scale_BL = jnp.abs(states_BLI).max(axis=-1) / INT8_MAX
    divided_BLI = states_BLI / jnp.where(scale_BL == 0, 1, scale_BL)[..., None]
    return jnp.rint(divided_BLI).astype(jnp.int8), scale_BL


def compute(
    params: Params,
    spec: TargetSpec,
    rows: Sequence[Row],
    taps: tuple[int, ...],
    dtype: str,
    tokens: int = TOKENS,
) -> Iterator[tuple[int, Records]]:
    """Yields the number and the states of every row, longest rows first.

    Neighbouring rows then have the same padded width, and the largest batch runs first, so that a
    lack of memory shows at the start. The next batch runs while the caller has the rows of one.

    dtype: of the records. tokens: of one forward pass, on each device.
    """
    ahead: tuple[list[int], tuple[jax.Array, jax.Array | None]] | None = None
    for numbers, tokens_BL, length_B1 in _batches(params, rows, tokens):
        running = numbers, _stored(params, spec, tokens_BL, length_B1, taps, dtype)
        if ahead is not None:
            yield from _rows_of(*ahead, rows)
        ahead = running
    if ahead is not None:
        yield from _rows_of(*ahead, rows)


def _batches(
    params: Params, rows: Sequence[Row], tokens: int
) -> Iterator[tuple[list[int], AnyArray, AnyArray]]:
    """Yields the numbers of a batch's rows, their tokens [B, L] and lengths [B, 1]."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
    mesh = mesh_of(params["embed_VD"])
    parts = row_parts(mesh)
    while order:
        width = -(-len(rows[order[0]].tokens) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        # The last batch of a file has fewer rows: a power of two, as each number compiles.
        needed = 1 << (-(-len(order) // parts) - 1).bit_length()
        lines = parts * min(max(1, tokens // width), needed)
        numbers, order = order[:lines], order[lines:]
        tokens_BL, length_B1 = np.zeros((lines, width), np.int32), np.ones((lines, 1), np.int32)
        for line, index in enumerate(numbers):
            length_B1[line] = len(rows[index].tokens)
            tokens_BL[line, : len(rows[index].tokens)] = rows[index].tokens
        if mesh is None:
            yield numbers, tokens_BL, length_B1
        else:
            yield numbers, *place_rows((tokens_BL, length_B1), mesh)


def _rows_of(
    numbers: Sequence[int], batch: tuple[jax.Array, jax.Array | None], rows: Sequence[Row]
) -> Iterator[tuple[int, Records]]:
    states_BLI = np.asarray(batch[0])
    scale_BL = None if batch[1] is None else np.asarray(batch[1])
    for line, index in enumerate(numbers):
        length = len(rows[index].tokens)
        scale_L = None if scale_BL is None else scale_BL[line, :length]
        yield index, Records(states_BLI[line, :length], scale_L)

"""Training's programs that run per device, with collectives of their own (`jax.shard_map`).

Elsewhere XLA splits the work by the shardings of its arrays (sharding.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from beagle_jax.sharding import DATA, FSDP, SEQUENCE, TENSOR

_ROWS = (DATA, FSDP)


class OwnShare(NamedTuple):
    """One device's view in `over_rows`: the mesh axes of collectives, which may be none."""

    vocabulary: tuple[str, ...]  # devices along these hold parts of the vocabulary, the same rows
    rows: tuple[str, ...]  # devices along these hold different rows
    first_token: Callable[
        [int], jax.Array | int
    ]  # size of this device's part of the vocabulary -> id of the part's first token


def over_rows(
    function: Callable, vocab_size: int, mesh: Mesh, *, gives_head: bool = False
) -> Callable:
    """Wraps `function(share, heads, *arrays_M)` to run per device; returns arrays by row.

    Each device gets its own rows and its part of the heads, which may be several. gives_head: the
    function returns a pair, of an array by row and of one like its part of a head, which must be
    the same on all devices with that part.
    """
    vocabulary = () if mesh.shape[TENSOR] == 1 or vocab_size % mesh.shape[TENSOR] else (TENSOR,)

    def first_token(size: int) -> jax.Array | int:
        return jax.lax.axis_index(TENSOR) * size if vocabulary else 0

    axes = position_axes(mesh)
    share = OwnShare(vocabulary, tuple(axis for axis in axes if mesh.shape[axis] > 1), first_token)

    def on_all(heads: Any, *arrays_M: jax.Array) -> Any:
        specs = (P(vocabulary or None), *(P(axes) for _ in arrays_M))
        out_specs = (P(axes), P(vocabulary or None)) if gives_head else P(axes)
        return jax.shard_map(
            partial(function, share),
            mesh=mesh,
            in_specs=specs,
            out_specs=out_specs,
            check_vma=False,
        )(heads, *arrays_M)

    return on_all


def position_axes(mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes that split the predictions of a batch, M."""
    return (*_ROWS, SEQUENCE) if SEQUENCE in mesh.axis_names else _ROWS


def over_positions(function: Callable, mesh: Mesh) -> Callable:
    """Wraps `function(index, join, shared, arrays_B, arrays_BL)` to run per device.

    Returns arrays by prediction, [M]. index: the device's number along `sequence`. join: joins the
    parts of an array along an axis. shared: a tree that every device has. arrays_B: each device
    gets its rows. arrays_BL: it gets its part of the positions of its rows.
    """

    axes = position_axes(mesh)
    along = axes[len(_ROWS) :]  # SEQUENCE, if the mesh has it

    def join(x: jax.Array, axis: int) -> jax.Array:
        return jax.lax.all_gather(x, along, axis=axis, tiled=True) if along else x

    def on_each(shared: Any, arrays_B: Any, arrays_BL: Any) -> Any:
        index = jax.lax.axis_index(SEQUENCE) if along else 0
        return function(index, join, shared, arrays_B, arrays_BL)

    return jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=(P(), P(_ROWS), P(_ROWS, along)),
        out_specs=P(axes),
        axis_names=set(axes),
        check_vma=False,
    )

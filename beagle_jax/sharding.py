"""The only file that knows the mesh: axes, where each array lives, placement.

Three axes, any of them of size 1. `data` splits the rows of a batch; `fsdp` splits them too, and
with them every matrix that is trained and its optimizer state, which is put together where it is
used; `tensor` splits heads, MLP width and vocabulary. Arrays are annotated, programs are not:
`jax.jit` takes shardings for what goes in and out (what used to be pjit) and XLA inserts the
collectives. A dimension that its axis does not divide stays whole.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from beagle_jax.config import MeshConfig
from beagle_jax.errors import UserError
from beagle_jax.model.cache import KVRows
from beagle_jax.model.kinds import KINDS
from beagle_jax.model.tensors import ARRAYS, Tensor

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
_ROWS = (DATA, FSDP)  # the axes over which a batch is split

# The one table: which axis of the mesh splits what the target's arrays (model/tensors.py) and the
# parameters of each kind of draft (`DraftSpec.axes`) name; anything else is on every device.
# Products that end in the hidden size (o, down, fc) are split along what they sum over, so one
# all-reduce follows each. The vocabulary is never split over fsdp: each row needs all of it, and
# gathering it would cost more memory than splitting it saves.
_RULES = {"vocabulary": TENSOR, "inner": TENSOR, "model": FSDP, None: None}


def _axes_of(name: str) -> tuple[str | None, ...] | None:
    """What splits the dimensions of an array of this name; None: nothing is declared."""
    declared: list[tuple[str | None, ...]] = [ARRAYS[name].axes] if name in ARRAYS else []
    declared += [kind.spec.axes[name] for kind in KINDS.values() if name in kind.spec.axes]
    return tuple(_RULES[axis] for axis in declared[0]) if declared else None


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run over all devices, or those given. Raises UserError when the sizes do not
    multiply to their number.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.model_dump()
    known = math.prod(size for size in sizes.values() if size > 0)
    rest = len(devices) // known
    shape = [size if size > 0 else rest for size in sizes.values()]
    if math.prod(shape) != len(devices):
        asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"{asked} does not fit {len(devices)} devices: the three sizes must multiply to "
            "their number; -1 stands for what the others leave"
        )
    # Auto axes: XLA completes the shardings. jax.make_mesh would make Explicit ones, under which
    # flax's init fails.
    return Mesh(np.array(devices).reshape(shape), (DATA, FSDP, TENSOR))


def tensor_mesh(size: int) -> Mesh:
    """A mesh of the first `size` devices along the tensor axis. Raises UserError when there are
    fewer.
    """
    devices = jax.devices()
    if not 1 <= size <= len(devices):
        raise UserError(f"a mesh of {size} devices was asked for; this process sees {len(devices)}")
    return make_mesh(MeshConfig(data=1, tensor=size), devices[:size])


def check_rows(batch: int, mesh: Mesh) -> None:
    """Raises UserError unless the mesh can split `train.batch` rows evenly."""
    parts = math.prod(mesh.shape[axis] for axis in _ROWS)
    if batch % parts:
        raise UserError(
            f"train.batch is {batch}, but the mesh splits rows over {parts} devices (data "
            f"{mesh.shape[DATA]} x fsdp {mesh.shape[FSDP]}); set it to a multiple of {parts}, "
            "or mesh.data and mesh.fsdp to less"
        )


def shardings(tree, mesh: Mesh):
    """Where each array of a tree lives: parameters and their optimizer state by name, the rest on
    every device.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, array: NamedSharding(mesh, _spec(path, array.shape, mesh)), tree
    )


def place(tree, mesh: Mesh | None):
    """Arrays put where `shardings` says; unchanged without a mesh."""
    return tree if mesh is None else jax.device_put(tree, shardings(tree, mesh))


def born(make: Callable, mesh: Mesh, *arguments):
    """`make(*arguments)`, a tree of arrays, each made where it stays: no device ever holds more
    than its part.
    """
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, *arguments), mesh))(
        *arguments
    )


def target_sharding(tensor: Tensor, mesh: Mesh | None) -> Sharding:
    """Where one array of the target lives; on the first device without a mesh."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    axes = tuple(_RULES[axis] for axis in tensor.axes)
    return NamedSharding(mesh, _divided(axes, tensor.shape, mesh))


def replicate(tree, mesh: Mesh | None):
    """A copy of every array on every device; unchanged without a mesh."""
    return tree if mesh is None else jax.device_put(tree, whole(mesh))


def whole(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
    """Split along the first dimension, the rows of a batch."""
    return NamedSharding(mesh, P(_ROWS))


def share_of_rows(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch's rows this process's devices hold, and of how many: processes along
    `tensor` hold the same ones.

    Raises UserError for a mesh on which two processes hold some rows in common and others not.
    """
    owner_RT = np.array([device.process_index for device in mesh.devices.flat]).reshape(
        -1, mesh.shape[TENSOR]
    )
    held = {
        process: np.flatnonzero((owner_RT == process).any(axis=1))
        for process in np.unique(owner_RT)
    }
    mine = held[jax.process_index()]
    if any(
        len(rows) != len(mine) or rows[0] % len(mine) or rows[-1] - rows[0] >= len(mine)
        for rows in held.values()
    ):
        raise UserError(
            f"mesh.tensor is {mesh.shape[TENSOR]}, which splits a row over devices of several "
            "processes unevenly; set it to a divisor or a multiple of the devices that each "
            "process has"
        )
    return int(mine[0]) // len(mine), len(owner_RT) // len(mine)


def place_rows(batch, mesh: Mesh):
    """A batch of host arrays on the devices. With several processes each gives the rows that
    `share_of_rows` says.
    """
    return jax.tree.map(partial(jax.make_array_from_process_local_data, rows(mesh)), batch)


def gathered(params: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """Inside jit: parameters put together along fsdp, as their use needs them; gradients come back
    split.
    """
    if mesh.shape[FSDP] == 1:
        return params
    used = {
        name: P(*(None if axis == FSDP else axis for axis in _spec_of(name, x.shape, mesh)))
        for name, x in params.items()
    }
    return {
        name: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, used[name]))
        for name, x in params.items()
    }


class OwnShare(NamedTuple):
    """What `over_rows` tells a function of its device: the mesh axes (maybe none) that collectives
    go over.
    """

    vocabulary: tuple[str, ...]  # each holds a part of the vocabulary, for the same rows
    rows: tuple[str, ...]  # each holds other rows
    first_token: Callable[
        [int], jax.Array | int
    ]  # id of the first token of this device's part, given the part's size


def over_rows(function: Callable, vocab_size: int, mesh: Mesh) -> Callable:
    """`function(share, head_VD, *arrays_M)` on each device's own rows and its part of the head;
    returns arrays by row.
    """
    vocabulary = () if mesh.shape[TENSOR] == 1 or vocab_size % mesh.shape[TENSOR] else (TENSOR,)

    def first_token(size):
        return jax.lax.axis_index(TENSOR) * size if vocabulary else 0

    share = OwnShare(vocabulary, tuple(axis for axis in _ROWS if mesh.shape[axis] > 1), first_token)

    def on_all(head_VD, *arrays_M):
        specs = (P(vocabulary or None), *(P(_ROWS) for _ in arrays_M))
        return jax.shard_map(
            partial(function, share), mesh=mesh, in_specs=specs, out_specs=P(_ROWS), check_vma=False
        )(head_VD, *arrays_M)

    return on_all


def cache_shardings(cache: Sequence[KVRows], mesh: Mesh) -> list[KVRows]:
    """Where key and value rows live: split by head."""

    def put(x):
        return NamedSharding(mesh, _divided((None, TENSOR, None, None), x.shape, mesh))

    return [KVRows(put(rows.k_BKHS), put(rows.v_BKSH)) for rows in cache]


def _spec(path: tuple, shape: tuple[int, ...], mesh: Mesh) -> P:
    """By the last name in the path that the table knows: the optimizer keeps trees shaped like the
    parameters.
    """
    keys = [getattr(key, "key", getattr(key, "name", "")) for key in path]
    if "layers" in keys and keys[-1] not in ARRAYS:
        raise ValueError(
            f"the target's array {keys[-1]} has no axes; declare it in model/tensors.py"
        )
    names = [key for key in keys if _axes_of(key) is not None]
    return _spec_of(names[-1], shape, mesh) if names else P()


def _spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    axes = _axes_of(name) or ()
    return _divided(axes, shape, mesh) if len(axes) == len(shape) else P()


def _divided(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    return P(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )

"""The mesh: its axes, where each array lives, and placement on devices.

No other file than this one and training/per_device.py names its axes. It has three, each of size 1
or more. `data` splits the rows of a batch. `fsdp` splits them too, and also every trained matrix
and its optimizer state; a matrix is gathered where it is used. `tensor` splits heads, MLP width and
vocabulary. Arrays carry shardings, programs do not: `jax.jit` takes shardings of inputs and outputs
(formerly pjit), and XLA inserts the collectives. A dimension that its axis does not divide is not
split.

Above 1, two more settings add an axis. `sequence`, in training only, splits the positions of each
row while the draft is computed. `expert`, not in training, splits the experts of a layer, and
everything else as `tensor` does: devices along it hold different experts, devices along `tensor`
different parts of each expert (model/experts.py has the program, `with_experts` prepares it).

On a mesh for decoding, `expert` and `tensor` together are no larger than the number of KV heads.
The rest of each is an axis of its own, `expert_copies` and `copies`: devices along these hold the
same keys and values, but different query heads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from beagle_jax.config import MeshConfig
from beagle_jax.errors import UserError
from beagle_jax.model.experts import Spread
from beagle_jax.model.kinds import KINDS
from beagle_jax.model.target import TargetSpec
from beagle_jax.model.tensors import ARRAYS, JOINED, Tensor

T = TypeVar("T")

DATA, FSDP, SEQUENCE, EXPERT, TENSOR = "data", "fsdp", "sequence", "expert", "tensor"
EXPERT_COPIES, COPIES = "expert_copies", "copies"  # the rest of `expert` and `tensor` in decoding
_ROWS = (DATA, FSDP)  # the axes over which a batch of training is split

# The only table of logical axis -> mesh axis. The target's arrays (model/tensors.py) and the
# parameters of each kind of draft (`DraftSpec.axes`) name logical axes; other arrays are
# replicated. Products that end in the hidden size (o, down, fc) are split along the dimension that
# they sum over, so one all-reduce follows each. The vocabulary is never split over fsdp: each row
# needs all of it, and gathering it would cost more memory than splitting it saves.
_RULES: dict[str | None, tuple[str, ...]] = {
    "vocabulary": (EXPERT, TENSOR, EXPERT_COPIES, COPIES),
    "inner": (EXPERT, TENSOR, EXPERT_COPIES, COPIES),
    "kv": (EXPERT, TENSOR),
    "experts": (EXPERT, EXPERT_COPIES),
    "expert": (TENSOR, COPIES),  # the inner width of an expert
    "model": (FSDP,),
    "row": (DATA,),  # of a batch in decoding
    None: (),
}
_Axes = tuple[str | None, ...]  # the logical axes of each dimension


def _axes_of(name: str) -> _Axes | None:
    """Returns the logical axes of the array with this name; None if none are declared."""
    declared: list[tuple[str | None, ...]] = [
        table[name].axes for table in (ARRAYS, JOINED) if name in table
    ]
    declared += [kind.spec.axes[name] for kind in KINDS.values() if name in kind.spec.axes]
    return declared[0] if declared else None


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a run over all devices, or over the given ones.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.model_dump()  # in the order of the axes
    known = math.prod(size for size in sizes.values() if size > 0)
    rest = len(devices) // known
    shape = {name: size if size > 0 else rest for name, size in sizes.items()}
    if math.prod(shape.values()) != len(devices):
        requested = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise UserError(
            f"{requested} does not fit {len(devices)} devices: the product of the sizes must "
            "be their number; -1 is replaced by what the others leave"
        )
    for axis in (SEQUENCE, EXPERT):
        if shape[axis] == 1:
            del shape[axis]
    # The axes are Auto: XLA completes the shardings. jax.make_mesh makes Explicit axes, with which
    # flax's init fails.
    return Mesh(np.array(devices).reshape(tuple(shape.values())), tuple(shape))


def tensor_mesh(size: int) -> Mesh:
    """Returns a mesh of the first `size` devices along the tensor axis.

    Raises:
      UserError: there are fewer devices.
    """
    devices = jax.devices()
    if not 1 <= size <= len(devices):
        raise UserError(f"the mesh needs {size} devices, but this process has {len(devices)}")
    return make_mesh(MeshConfig(data=1, tensor=size), devices[:size])


def own_part(mesh: Mesh) -> Mesh:
    """Returns the mesh on which text and states are computed.

    One process uses the whole mesh; with several processes each uses its own devices, along
    `expert` as many of them as the whole mesh has, if their number allows it.
    """
    if jax.process_count() == 1:
        return mesh
    devices = jax.local_devices()
    experts = math.gcd(mesh.shape.get(EXPERT, 1), len(devices))
    return make_mesh(MeshConfig(data=1, expert=experts, tensor=-1), devices)


def mesh_for_decoding(
    config: MeshConfig,
    rows: int,
    what: str,
    devices: Sequence[jax.Device] | None = None,
    *,
    always: bool = False,
) -> Mesh | None:
    """Returns the mesh of a decoder on the first devices; None for a mesh of one device.

    `mesh.data` of -1 is 1 here, as decoding has few rows. rows, what: how many rows it decodes at
    once, and which command, for the message. always: one device has a mesh too.

    Raises:
      UserError: there are fewer devices, the rows cannot be split over `mesh.data`, or
        `mesh.sequence` is not 1.
    """
    devices = jax.devices() if devices is None else devices
    if config.sequence != 1:
        raise UserError(
            f"mesh.sequence is {config.sequence}, which splits the rows of training, but {what} "
            "decodes; set mesh.sequence=1, and mesh.tensor to the number of devices"
        )
    sizes = config.model_dump() | ({"data": 1} if config.data == -1 else {})
    if rows % sizes["data"]:
        raise UserError(
            f"mesh.data is {sizes['data']}, but {what} decodes {rows} rows at once, which cannot "
            f"be split into {sizes['data']} equal parts; set mesh.data=1, and mesh.tensor to the "
            "number of devices"
        )
    known = math.prod(size for size in sizes.values() if size > 0)
    sizes = {name: size if size > 0 else len(devices) // known for name, size in sizes.items()}
    count = math.prod(sizes.values())
    if not 1 <= count <= len(devices):
        requested = ", ".join(f"mesh.{name}={size}" for name, size in config.model_dump().items())
        raise UserError(
            f"{requested} needs {max(count, known)} devices, but there are {len(devices)}; lower "
            "mesh.tensor or mesh.fsdp"
        )
    alone = count == 1 and not always
    return None if alone else make_mesh(MeshConfig(**sizes), devices[:count])


def decoding_mesh(mesh: Mesh, num_kv_heads: int) -> Mesh:
    """Returns the mesh with its tensor axis split into (tensor, copies) for these KV heads.

    The expert axis, if there is one, is split first. The devices keep their order, so arrays that
    are split alike on both meshes are not moved.
    """
    if COPIES in mesh.axis_names:
        return mesh
    shape, left = dict(mesh.shape), num_kv_heads
    split: dict[str, int] = {}
    for axis, size in shape.items():
        split[axis] = size
        if copies := {EXPERT: EXPERT_COPIES, TENSOR: COPIES}.get(axis):
            split[axis] = math.gcd(size, left)
            split[copies], left = size // split[axis], left // split[axis]
    return Mesh(mesh.devices.reshape(tuple(split.values())), tuple(split))


def splits_heads(mesh: Mesh | None, num_kv_heads: int) -> bool:
    """Returns whether queries, keys and values are split alike, by whole KV heads, or not at all.

    Otherwise there are more devices along `expert` and `tensor` than KV heads.
    """
    if mesh is None:
        return True
    copies = _count((EXPERT_COPIES, COPIES), mesh)
    return copies == 1 and num_kv_heads % _count(_RULES["kv"], mesh) == 0


def joins_heads(mesh: Mesh | None, num_kv_heads: int) -> bool:
    """Returns whether queries, keys and values are joined on these devices (model/joined.py).

    XLA joins their products on GPUs by itself. Joined arrays made its compiler for an H100 turn a
    cache at the beginning and end of each call (benchmarks/in_place.py). None: this process's
    devices.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform in ("cpu", "tpu") and splits_heads(mesh, num_kv_heads)


def check_split(mesh: Mesh, inner: Sequence[int], model: int) -> None:
    """Checks that each axis of a decoder's mesh splits something of the target.

    inner: the widths that `mesh.tensor` and `mesh.expert` can split. model: the target's hidden
    size.

    Raises:
      UserError: an axis would have no effect.
    """
    tensor = _count(_RULES["inner"], mesh)
    if all(size % tensor for size in inner):
        axes = "mesh.expert x mesh.tensor" if EXPERT in mesh.axis_names else "mesh.tensor"
        raise UserError(
            f"{axes} is {tensor}, which divides none of the widths that it splits (queries, "
            f"MLP and vocabulary: {', '.join(map(str, inner))}); choose a divisor of one of them"
        )
    if model % mesh.shape[FSDP]:
        raise UserError(
            f"mesh.fsdp is {mesh.shape[FSDP]}, which does not divide the target's hidden size, "
            f"{model}; choose a divisor of it"
        )


def with_experts(spec: TargetSpec, mesh: Mesh | None) -> TargetSpec:
    """Returns the spec of a target whose arrays lie on this mesh: who computes which experts.

    `forward` needs it where the mesh has an axis for experts. Without it the tokens are the same,
    but each device receives the experts of all others. mesh: None leaves arrays and spec as they
    are.

    Raises:
      UserError: `mesh.expert` cannot split the experts of this target.
    """
    if mesh is None:
        return spec
    experts, parts = spec.experts, _count(_RULES["experts"], mesh)
    if experts is None:
        if parts == 1:
            return spec
        raise UserError(
            f"mesh.expert is {parts}, but the target has no experts; set mesh.expert=1, and "
            "mesh.tensor to the number of devices"
        )
    if experts.count % parts:
        raise UserError(
            f"mesh.expert is {parts}, which does not divide the target's {experts.count} experts; "
            "choose a divisor of their number, and split each expert further with mesh.tensor"
        )
    spread = Spread(
        mesh,
        axes_used("experts", experts.count, mesh),
        axes_used("expert", experts.width, mesh),
    )
    return replace(spec, experts=replace(experts, spread=spread if parts > 1 else None))


def decoding_parts(mesh: Mesh | None) -> int:
    """Returns into how many parts decoding splits the rows of a batch."""
    return 1 if mesh is None else mesh.shape[DATA]


def check_rows(batch: int, mesh: Mesh) -> None:
    """Checks that the mesh can split `train.batch` rows evenly.

    Raises:
      UserError: it cannot.
    """
    parts = row_parts(mesh)
    if batch % parts:
        raise UserError(
            f"train.batch is {batch}, but the mesh splits rows over {parts} devices (data "
            f"{mesh.shape[DATA]} x fsdp {mesh.shape[FSDP]}); set it to a multiple of {parts}, "
            "or mesh.data and mesh.fsdp to less"
        )


def check_no_experts(mesh: Mesh, what: str) -> None:
    """Checks that a mesh does not split experts. what: the command, for the message.

    Raises:
      UserError: it does.
    """
    if EXPERT in mesh.axis_names:
        size = mesh.shape[EXPERT]
        raise UserError(
            f"mesh.expert is {size}, which splits whole experts of the target in decoding and in "
            f"prepare, but {what} splits each expert; set mesh.expert=1, and mesh.tensor or "
            f"mesh.fsdp to {size}"
        )


def check_positions(row_tokens: int, mesh: Mesh) -> None:
    """Checks that the mesh can split the positions of a row evenly.

    Raises:
      UserError: it cannot.
    """
    parts = sequence_parts(mesh)
    if row_tokens % parts:
        raise UserError(
            f"train.row_tokens is {row_tokens}, but mesh.sequence splits each row into {parts} "
            f"parts; set it to a multiple of {parts}"
        )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each array in a tree.

    Parameters and their optimizer state are sharded by name; other arrays are replicated.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, array: NamedSharding(mesh, _spec(path, array.shape, mesh)), tree
    )


def place(tree: T, mesh: Mesh | None) -> T:
    """Places arrays as `shardings` says; returns them unchanged without a mesh."""
    return tree if mesh is None else jax.device_put(tree, shardings(tree, mesh))


def place_abstract(tree: Any, where: Any) -> Any:
    """Returns the shapes of arrays, with the shardings of another tree."""

    def put(x: Any, sharding: Sharding) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(put, tree, where)


def born(make: Callable[..., T], mesh: Mesh, *arguments: Any) -> T:
    """Runs `make(*arguments)` and creates each array of its result already sharded.

    No device ever holds more than its part.
    """
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, *arguments), mesh))(
        *arguments
    )


def target_sharding(tensor: Tensor, mesh: Mesh | None) -> Sharding:
    """Returns the sharding of a target array; without a mesh, the first device."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return sharding_of(tensor.axes, tensor.shape, mesh)


def sharding_of(axes: Sequence[str | None], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose dimensions have these logical axes."""
    return NamedSharding(mesh, _divided(axes, shape, mesh))


def axes_used(axis: str | None, size: int, mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes of the mesh that split a dimension of this logical axis and size.

    As many of its axes as divide it, from the first on.
    """
    used: list[str] = []
    for name in _RULES[axis]:
        if name not in mesh.axis_names:
            continue
        if size % _count((*used, name), mesh):
            break
        used.append(name)
    return tuple(used)


def place_head(head_VD: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Splits rows of a head or an embedding over the devices; without a mesh, leaves them."""
    if mesh is None:
        return head_VD
    return jax.device_put(head_VD, sharding_of(("vocabulary", None), head_VD.shape, mesh))


def replicate(tree: T, mesh: Mesh | None) -> T:
    """Copies every array to every device; returns the tree unchanged without a mesh."""
    return tree if mesh is None else jax.device_put(tree, whole(mesh))


def whole(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding along the first dimension, the rows of a batch."""
    return NamedSharding(mesh, P(_ROWS))


def share_of_rows(mesh: Mesh) -> tuple[int, int]:
    """Returns which part of a batch's rows this process's devices hold, and of how many.

    Processes along `tensor` and `sequence` hold the same rows.

    Raises:
      UserError: two processes share some of their rows, but not all.
    """
    owner_RT = np.array([device.process_index for device in mesh.devices.flat]).reshape(
        -1, mesh.size // row_parts(mesh)
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
        axes = "mesh.tensor" if sequence_parts(mesh) == 1 else "mesh.sequence x mesh.tensor"
        raise UserError(
            f"{axes} is {owner_RT.shape[1]}, which splits a row over devices of several "
            "processes unevenly; set it to a divisor or a multiple of the number of devices of "
            "a process"
        )
    return int(mine[0]) // len(mine), len(owner_RT) // len(mine)


def mesh_of(array: jax.Array) -> Mesh | None:
    """Returns the mesh that an array lies on; None if it is on one device without a mesh."""
    sharding = getattr(array, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def row_parts(mesh: Mesh | None) -> int:
    """Returns over how many devices a mesh splits the rows of a batch."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in _ROWS)


def sequence_parts(mesh: Mesh) -> int:
    """Returns over how many devices a mesh splits the positions of a row."""
    return mesh.shape.get(SEQUENCE, 1)


def place_rows(batch: T, mesh: Mesh) -> T:
    """Places a batch of host arrays on the devices.

    With several processes, each passes the rows that `share_of_rows` gives it.
    """
    return jax.tree.map(partial(jax.make_array_from_process_local_data, rows(mesh)), batch)


def gathered(params: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """Gathers parameters along fsdp for their use; gradients come back sharded.

    Call it inside jit.
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


def _spec(path: tuple, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the spec for the last name in the path that the table knows.

    The optimizer's state contains trees with the parameters' structure.
    """
    keys = [getattr(key, "key", getattr(key, "name", "")) for key in path]
    if "layers" in keys and keys[-1] not in ARRAYS | JOINED:
        raise ValueError(
            f"the target's array {keys[-1]} has no axes; declare it in model/tensors.py"
        )
    names = [key for key in keys if _axes_of(key) is not None]
    return _spec_of(names[-1], shape, mesh) if names else P()


def _spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    axes = _axes_of(name) or ()
    return _divided(axes, shape, mesh) if len(axes) == len(shape) else P()


def _divided(axes: Sequence[str | None], shape: tuple[int, ...], mesh: Mesh) -> P:
    """Splits each dimension over as many of its axes, from the first on, as divide it."""
    used = (axes_used(axis, size, mesh) for axis, size in zip(axes, shape, strict=True))
    return P(*(each[0] if len(each) == 1 else each or None for each in used))


def _count(axes: tuple[str, ...], mesh: Mesh) -> int:
    """Returns the number of devices along axes; a mesh need not have them."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)

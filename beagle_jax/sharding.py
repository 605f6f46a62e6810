"""The only file that knows the mesh: axes, where each array lives, placement.

Arrays are annotated, programs are not: `jax.jit` reads the shardings of its arguments and XLA inserts the collectives
(what used to be pjit). A dimension that the axis does not divide stays whole.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from beagle_jax.errors import UserError
from beagle_jax.model.cache import KVRows

TENSOR = "tensor"  # heads, MLP width and vocabulary

# Which dimension of a target tensor is split over the tensor axis; anything else is replicated. Products that end in
# the hidden size (o, down) are split along what they sum over, so one all-reduce follows each.
_TENSOR_DIMENSION = {
    "embed_VD": 0, "head_VD": 0, "q_FD": 0, "k_FD": 0, "v_FD": 0, "o_DF": 1, "gate_FD": 0, "up_FD": 0, "down_DF": 1,
    "gate_EFD": 1, "up_EFD": 1, "down_EDF": 2,
}  # fmt: skip


def tensor_mesh(size: int) -> Mesh:
    """A mesh of the first `size` devices along the tensor axis. Raises UserError when there are fewer."""
    devices = jax.devices()
    if not 1 <= size <= len(devices):
        raise UserError(f"a mesh of {size} devices was asked for; this process sees {len(devices)}")
    return Mesh(np.array(devices[:size]), (TENSOR,))


def place_target(params: dict, mesh: Mesh | None) -> dict:
    """The target's parameters spread over the mesh; unchanged without one."""
    if mesh is None:
        return params

    def place(path, array):
        dimension = _TENSOR_DIMENSION.get(path[-1].key)
        spec = P() if dimension is None else _split(array.shape, dimension, mesh)
        return jax.device_put(array, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, params)


def replicate(tree, mesh: Mesh | None):
    """A copy of every array on every device; unchanged without a mesh."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, P()))


def shard_cache(cache: Sequence[KVRows], mesh: Mesh | None) -> list[KVRows]:
    """Inside jit: key and value rows split by head."""
    if mesh is None:
        return list(cache)
    put = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _split(x.shape, 1, mesh)))
    return [KVRows(put(rows.k_BKHS), put(rows.v_BKSH)) for rows in cache]


def _split(shape: tuple[int, ...], dimension: int, mesh: Mesh) -> P:
    if shape[dimension] % mesh.shape[TENSOR]:
        return P()
    return P(*(TENSOR if axis == dimension else None for axis in range(len(shape))))

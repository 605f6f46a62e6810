"""Top-k over a vocabulary that the devices of a mesh share."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from beagle_jax.sharding import axes_used

M = TypeVar("M", bound=Callable[..., Any])

_split: ContextVar[Mesh | None] = ContextVar("_split", default=None)


@contextmanager
def split_over(mesh: Mesh | None) -> Iterator[None]:
    """While a program is traced: `top_k` finds the vocabulary split over this mesh."""
    before = _split.set(mesh)
    try:
        yield
    finally:
        _split.reset(before)


def split(method: M) -> M:
    """Wraps a method of an object with a `mesh`, to run within `split_over` of it."""

    @wraps(method)
    def within(self: Any, *args: Any, **kwargs: Any) -> Any:
        with split_over(self.mesh):
            return method(self, *args, **kwargs)

    return cast(M, within)


def top_k(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` over the last axis, the vocabulary; equal values are in its order.

    Within `split_over`, each device sorts its own part, and `count` numbers of each are exchanged.
    XLA alone would gather all logits on every device.
    """
    mesh, V = _split.get(), logits.shape[-1]
    if mesh is None:
        return jax.lax.top_k(logits, count)
    axes = axes_used("vocabulary", V, mesh)
    width = V // math.prod(mesh.shape[axis] for axis in axes)
    if width == V or count > width:
        return jax.lax.top_k(logits, count)

    def of_parts(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, index = jax.lax.top_k(part, count)
        index = index + jax.lax.axis_index(axes) * width
        values, index = (
            jax.lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True) for x in (values, index)
        )
        best, place = jax.lax.top_k(values, count)
        return best, jnp.take_along_axis(index, place, axis=-1)

    rows: list[Any] = [None] * (logits.ndim - 1)
    if rows:
        rows[0] = axes_used("row", logits.shape[0], mesh) or None
    return jax.shard_map(
        of_parts,
        mesh=mesh,
        in_specs=P(*rows, axes),
        out_specs=(P(*rows, None), P(*rows, None)),
        check_vma=False,
    )(logits)

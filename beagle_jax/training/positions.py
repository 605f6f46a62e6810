"""How a device computes the positions of its rows: which of them, and how many at once.

With `mesh.sequence`, devices split the positions of a row. Each of them computes keys and values of
its part of the true states and exchanges them, and predicts its part of the queries or windows.

With `train.remat`, the part of the block that follows attention is computed for some positions at a
time. Its activations, the widest of a step, are not stored for the backward pass, but computed
again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.model.cache import KVRows
from beagle_jax.model.draft import LayerBlock


class Positions(NamedTuple):
    """The positions of a row that a device computes.

    The fields are those of a device that has whole rows and stores what it computes.
    """

    parts: int = 1  # devices that share a row
    number: jax.Array | int = 0  # this device's number among them
    # joins the parts of an array along an axis: (array, axis) -> array
    join: Callable[[jax.Array, int], jax.Array] = lambda x, _: x
    # positions of a row whose activations are in memory at once; None: all, and they are stored
    at_once: int | None = None

    def rounded(self, count: int) -> int:
        """Returns the next multiple of the number of parts."""
        return -(-count // self.parts) * self.parts

    def own(self, x_BX: Any) -> Any:
        """Returns this device's part of X, the second axis, of all arrays of a tree."""
        if self.parts == 1:
            return x_BX

        def part(x: jax.Array) -> jax.Array:
            width = x.shape[1] // self.parts
            return jax.lax.dynamic_slice_in_dim(x, self.number * width, width, axis=1)

        return jax.tree.map(part, x_BX)

    def keys(self, block: LayerBlock, h_BLI: jax.Array, place_BL: jax.Array) -> KVRows:
        """Returns keys and values of a row's true states, of which h_BLI is this device's part.

        place_BL: positions of the whole row.
        """
        rows = block.entry_rows(h_BLI, self.own(place_BL))
        return KVRows(self.join(rows.k_BKHS, 3), self.join(rows.v_BKSH, 2))

    def predict(self, block: LayerBlock, e_BTD: jax.Array, attended_BKGTH: jax.Array) -> jax.Array:
        """Returns `block.predict`, computed for `at_once` positions of a row at a time."""
        if self.at_once is None or self.at_once >= e_BTD.shape[1]:
            return block.predict(e_BTD, attended_BKGTH)
        module, variables = block.unbind()
        # `predict` casts them too; copies of half the size are split.
        attended_BKGTH = attended_BKGTH.astype(e_BTD.dtype)
        return _in_chunks(module, self.at_once, variables, e_BTD, attended_BKGTH)


WHOLE = Positions()


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(
    module: LayerBlock, at_once: int, weights: Any, e_BTD: jax.Array, attended_BKGTH: jax.Array
) -> jax.Array:
    """Returns `predict` of a block with these weights, `at_once` positions at a time."""
    chunks = _split(at_once, e_BTD, attended_BKGTH)
    state_CBXD = jax.lax.map(lambda of: module.bind(weights).predict(*of), chunks)
    return _joined(state_CBXD, 1, e_BTD)


def _forward(
    module: LayerBlock, at_once: int, weights: Any, e_BTD: jax.Array, attended_BKGTH: jax.Array
) -> tuple[jax.Array, tuple]:
    of = weights, e_BTD, attended_BKGTH
    return _in_chunks(module, at_once, *of), of


def _backward(module: LayerBlock, at_once: int, residuals: tuple, of_state: jax.Array) -> tuple:
    """Computes each chunk again; gradients of weights are summed over chunks in float32."""
    weights, e_BTD, attended_BKGTH = residuals

    def add(total: Any, chunk: tuple) -> tuple:
        e_BXD, attended_BKGXH, of_state_BXD = chunk
        _, pull = jax.vjp(
            lambda weights, *of: module.bind(weights).predict(*of), weights, e_BXD, attended_BKGXH
        )
        of_weights, of_e, of_attended = pull(of_state_BXD)
        total = jax.tree.map(lambda x, part: x + part.astype(jnp.float32), total, of_weights)
        return total, (of_e, of_attended)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), weights)
    of_e: jax.Array
    of_attended: jax.Array
    chunks = (*_split(at_once, e_BTD, attended_BKGTH), _split(at_once, of_state, None)[0])
    total, (of_e, of_attended) = jax.lax.scan(add, zeros, chunks)
    return (
        jax.tree.map(lambda sum_, x: sum_.astype(x.dtype), total, weights),
        _joined(of_e, 1, e_BTD),
        _joined(of_attended, 3, attended_BKGTH),
    )


_in_chunks.defvjp(_forward, _backward)


def _split(at_once: int, x_BTD: jax.Array, x_BKGTH: jax.Array | None) -> tuple[jax.Array, ...]:
    """Splits positions into chunks, the first axis of the results; zeros fill the last one."""

    def split(x: jax.Array, axis: int) -> jax.Array:
        width = -x.shape[axis] % at_once
        padded = jnp.pad(x, [(0, width if at == axis else 0) for at in range(x.ndim)])
        shape = (*x.shape[:axis], -1, at_once, *x.shape[axis + 1 :])
        return jnp.moveaxis(padded.reshape(shape), axis, 0)

    return (split(x_BTD, 1), *(() if x_BKGTH is None else (split(x_BKGTH, 3),)))


def _joined(chunks: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """Joins chunks of positions along an axis, without what filled up the last one."""
    x = jnp.moveaxis(chunks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, like.shape[axis], axis=axis)

"""Weight-only quantisation: a matrix as small integers, groups of its inputs sharing a scale.

Knows nothing of models. A product first turns the matrix back into the dtype of the activations, so
decoding with a draft and without one use the very same numbers. Embedding, head, norms, biases and
routers are left as they are. Own code, since the library for it (qwix) imports flax.nnx, which does
not import on every jax that is supported here, and keeps an int4 in a whole byte on a CPU. What
becomes smaller is the weights at rest. XLA's CPU compiler gives each matrix that it turns back a
buffer of its own for the whole of a compiled loop, so that there the memory of a running loop is no
smaller (measured).
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.model.tensors import ARRAYS

Kind = Literal["int8", "int4"]

_LARGEST = {"int8": 127, "int4": 7}


class Quantised(NamedTuple):
    """A matrix [.., O, I]. Symmetric: an integer times its group's scale is the weight."""

    values: (
        jax.Array
    )  # int8 [.., O, I], or two int4 in a byte: uint8 [.., O, I / 2], inputs 2i and 2i + 1
    scale: jax.Array  # float32 [.., O, I / group]


def quantise(weight: jax.Array, kind: Kind, group: int) -> Quantised:
    """Rounds to nearest. group: inputs that share a scale; it must divide their number, which must
    be even for int4.
    """
    *rest, count = weight.shape
    grouped = weight.astype(jnp.float32).reshape(*rest, count // group, group)
    scale = jnp.abs(grouped).max(axis=-1) / _LARGEST[kind]
    whole = (
        jnp.round(grouped / jnp.where(scale == 0, 1.0, scale)[..., None])
        .astype(jnp.int8)
        .reshape(weight.shape)
    )
    if kind == "int4":
        pair = (whole + 8).astype(jnp.uint8).reshape(*rest, count // 2, 2)
        whole = pair[..., 0] | (pair[..., 1] << 4)
    return Quantised(whole, scale)


def dense(weight: jax.Array | Quantised, x: jax.Array) -> jax.Array:
    """The matrix that multiplies x, in the dtype of x; what is not quantised stays as it is."""
    if not isinstance(weight, Quantised):
        return weight
    values, scale = weight
    if values.dtype == jnp.uint8:
        pair = jnp.stack([values & 15, values >> 4], axis=-1)
        values = pair.reshape(*values.shape[:-1], -1).astype(jnp.int8) - 8
    grouped = values.reshape(*scale.shape, -1).astype(jnp.float32) * scale[..., None]
    return grouped.reshape(values.shape).astype(x.dtype)


def pick(weight: jax.Array | Quantised, index: jax.Array) -> jax.Array | Quantised:
    """One matrix of a stack."""
    return jax.tree.map(lambda part: part[index], weight)


def quantise_layer(layer: dict[str, Any], kind: Kind, group: int) -> dict[str, Any]:
    """A layer with its projections quantised."""
    return {
        key: quantise(array, kind, group) if ARRAYS[key].quantisable else array
        for key, array in layer.items()
    }

"""Weight-only quantisation: matrices of small integers with a scale per group of inputs.

A product first converts the matrix back to the dtype of the activations, so decoding with and
without a draft uses the same numbers. Embedding, head, norms, biases and routers are not quantised.

This is own code, because the library for it (qwix) imports flax.nnx, which does not import on every
supported jax, and stores an int4 in a whole byte on a CPU. Quantisation reduces the stored weights.
It does not reduce the memory of a running decode loop on a CPU (measured): XLA's CPU compiler
allocates a buffer for each converted matrix for the whole loop.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.model.tensors import ARRAYS

Kind = Literal["int8", "int4"]

_LARGEST = {"int8": 127, "int4": 7}


class Quantised(NamedTuple):
    """A matrix [.., O, I]: integers that are multiplied by the scale of their group.

    The quantisation is symmetric.
    """

    values: (
        jax.Array
    )  # int8 [.., O, I], or two int4 per byte: uint8 [.., O, I / 2] with inputs 2i and 2i + 1
    scale: jax.Array  # float32 [.., O, I / group]


def quantise(weight: jax.Array, kind: Kind, group: int) -> Quantised:
    """Quantises with rounding to nearest.

    group: inputs that share a scale. It must divide the number of inputs, which must be even for
    int4.
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
    """Returns the matrix that multiplies x, in the dtype of x.

    A matrix that is not quantised is returned as it is.
    """
    if not isinstance(weight, Quantised):
        return weight
    values, scale = weight
    if values.dtype == jnp.uint8:
        pair = jnp.stack([values & 15, values >> 4], axis=-1)
        values = pair.reshape(*values.shape[:-1], -1).astype(jnp.int8) - 8
    grouped = values.reshape(*scale.shape, -1).astype(jnp.float32) * scale[..., None]
    return grouped.reshape(values.shape).astype(x.dtype)


def pick(weight: jax.Array | Quantised, index: jax.Array) -> jax.Array | Quantised:
    """Returns one matrix of a stack."""
    return jax.tree.map(lambda part: part[index], weight)


def quantise_layer(layer: dict[str, Any], kind: Kind, group: int) -> dict[str, Any]:
    """Quantises the projections of a layer."""
    return {
        key: quantise(array, kind, group) if ARRAYS[key].quantisable else array
        for key, array in layer.items()
    }

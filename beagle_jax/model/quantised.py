"""Weight-only quantisation: matrices of small integers with a scale per group of inputs.

Every program of a platform computes with the same numbers, so decoding with and without a draft
does too, up to the rounding of a product. Embedding, head, norms, biases and routers are not
quantised.

`FORMS` chooses how each platform stores a matrix and multiplies by it. On TPUs, and on GPUs for a
few columns, a product reads the integers from memory and applies the scales to sums over groups;
XLA, left alone, first writes the whole matrix in the dtype of the activations
(`benchmarks/quantised_step.py`). On CPUs it does that, and allocates such a buffer for each matrix
for the whole decode loop (measured).

This is own code, because the library for it (qwix) imports flax.nnx, which does not import on every
supported jax, and stores an int4 in a whole byte on a CPU.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from beagle_jax.model.tensors import ARRAYS

Kind = Literal["int8", "int4"]
Form = Literal["whole", "rows", "blocks"]

_LARGEST = {"int8": 127, "int4": 7}

# How a platform stores and multiplies; `arranged` describes the forms. CPUs and others: "whole".
FORMS: dict[str, Form] = {"gpu": "rows", "cuda": "rows", "rocm": "rows", "tpu": "blocks"}

# Columns up to which a GPU multiplies a matrix of "rows" without its units for matrices. Eight take
# an H100's other units 12 microseconds for the 45 million weights of a projection of Llama-2-7B, by
# their published rate, and reading them in int8 takes 13. With more columns XLA dequantises first.
_COLUMNS = 8
_LANES = 128  # of a TPU's register: the last dimension of a block
_SUBLANES = 8  # columns that a TPU's matrix unit takes at once; of one, XLA makes no product


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """A matrix [.., O, I]: integers that are multiplied by the scale of their group.

    The quantisation is symmetric. The shapes below are those of the form "whole".
    """

    # int8 [.., O, I], or two int4 per byte: uint8 [.., O, I / 2] with inputs 2i and 2i + 1
    values: jax.Array
    scale: jax.Array  # float32 [.., O, I / group]
    form: Form = field(default="whole", metadata={"static": True})
    # "blocks" has one dimension O for those of a joined matrix (`model/joined.py`), listed here
    outputs: tuple[int, ...] = field(default=(), metadata={"static": True})


def quantise(weight: jax.Array, kind: Kind, group: int) -> Quantised:
    """Quantises with rounding to nearest, to the form "whole".

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


def arranged(weight: Quantised, form: Form, *, stacked: bool = False) -> Quantised:
    """Returns a matrix of the form "whole" in another form.

    rows: values [.., O, I] in int8 or int4, scale [.., O, I / group].
    blocks: values [I / b, O, b], scale [I / b, b / group, O], where O are all outputs. A block has
    as many inputs as a TPU's register has lanes, if the group allows it, so that no product needs
    another layout. stacked: the first dimension counts matrices, and stays in front.
    """
    if form == "whole":
        return weight
    assert weight.form == "whole"
    values, scale = weight.values, weight.scale
    if values.dtype == jnp.uint8:
        values = _unpacked(values).astype(jnp.int4)
    if form == "rows":
        return Quantised(values, scale, form)
    stack, outputs, I = values.shape[:stacked], values.shape[stacked:-1], values.shape[-1]
    group = I // scale.shape[-1]
    block = _LANES if _LANES % group == 0 and I % _LANES == 0 else group
    values = values.reshape(*stack, -1, I // block, block).swapaxes(-3, -2)
    scale = scale.reshape(*stack, -1, I // block, block // group)
    return Quantised(values, jnp.moveaxis(scale, -3, -1), form, outputs)


def arranged_layer(layer: dict[str, Any], platform: str) -> dict[str, Any]:
    """Returns a layer with its quantised matrices in the form for a platform's products.

    Joining (`model/joined.py`) comes before it.
    """
    form = FORMS.get(platform, "whole")
    return {
        key: arranged(x, form, stacked=_is_stack(key)) if isinstance(x, Quantised) else x
        for key, x in layer.items()
    }


def _is_stack(key: str) -> bool:
    return key in ARRAYS and ARRAYS[key].sizes[0] == "experts"


def by_rows(weight: jax.Array | Quantised) -> jax.Array | Quantised:
    """Returns a matrix of the form "blocks" in the form "rows"; others as they are."""
    if not isinstance(weight, Quantised) or weight.form != "blocks":
        return weight
    *stack, blocks, _, width = weight.values.shape
    values = weight.values.swapaxes(-3, -2).reshape(*stack, *weight.outputs, blocks * width)
    scale = jnp.moveaxis(weight.scale, -1, -3).reshape(*stack, *weight.outputs, -1)
    return Quantised(values, scale, "rows")


def times(weight: jax.Array | Quantised, x_IM: jax.Array) -> jax.Array:
    """Returns the product [.., O, M] of a matrix [.., O, I] and columns, in their dtype."""
    if isinstance(weight, Quantised) and weight.form == "blocks":
        return _by_block(weight, x_IM)
    if isinstance(weight, Quantised) and weight.form == "rows" and x_IM.shape[1] <= _COLUMNS:
        return _by_columns(weight, x_IM)
    return jnp.einsum("...OI,IM->...OM", dense(weight, x_IM), x_IM)


def _by_columns(weight: Quantised, x_IM: jax.Array) -> jax.Array:
    """Multiplies column by column: sums over all inputs, not products of matrices.

    XLA computes the sums of all columns in one kernel, which reads the integers once. The matrix is
    rounded as in `dense`, so that more columns are multiplied by the same numbers.
    """
    held = jnp.finfo(x_IM.dtype)
    grouped_OGg = jax.lax.reduce_precision(_grouped(weight), held.nexp, held.nmant)
    ones = (1,) * (grouped_OGg.ndim - 2)
    x_MGg = x_IM.T.astype(jnp.float32).reshape(-1, *ones, *grouped_OGg.shape[-2:])
    out_OM = jnp.stack([(grouped_OGg * x_Gg).sum(axis=(-2, -1)) for x_Gg in x_MGg], axis=-1)
    return out_OM.astype(x_IM.dtype)


def _by_block(weight: Quantised, x_IM: jax.Array) -> jax.Array:
    """Multiplies by the integers of each block, and then the sums of its groups by their scales.

    If a block has several groups, there is a copy of the columns for each, zero outside it. One
    column is padded to as many as a matrix unit takes.
    """
    (blocks, parts, _), width = weight.scale.shape[-3:], weight.values.shape[-1]
    M = x_IM.shape[1]
    columns = max(M, _SUBLANES)
    x_IM = jnp.pad(x_IM, ((0, 0), (0, columns - M)))
    x_bpgM = x_IM.reshape(blocks, parts, width // parts, columns)
    own_pp = jnp.eye(parts, dtype=x_IM.dtype)
    x_bwpM = jnp.einsum("bpgM,pq->bpgqM", x_bpgM, own_pp).reshape(blocks, width, parts, columns)
    sum_bpOM = jnp.einsum(
        "...bOw,bwpM->...bpOM",
        weight.values.astype(x_IM.dtype),
        x_bwpM,
        preferred_element_type=jnp.float32,
    )
    out_OM = (sum_bpOM * weight.scale[..., None]).sum(axis=(-4, -3))[..., :M].astype(x_IM.dtype)
    return out_OM.reshape(*out_OM.shape[:-2], *weight.outputs, M)


def dense(weight: jax.Array | Quantised, x: jax.Array) -> jax.Array:
    """Returns the matrix [.., O, I] in the dtype of x.

    A matrix that is not quantised is returned as it is.
    """
    weight = by_rows(weight)
    if not isinstance(weight, Quantised):
        return weight
    grouped = _grouped(weight)
    return grouped.reshape(*grouped.shape[:-2], -1).astype(x.dtype)


def _grouped(weight: Quantised) -> jax.Array:
    """Returns a matrix [.., O, I] as float32 [.., O, I / group, group]."""
    values, scale = weight.values, weight.scale
    if values.dtype == jnp.uint8:
        values = _unpacked(values)
    return values.reshape(*scale.shape, -1).astype(jnp.float32) * scale[..., None]


def _unpacked(values: jax.Array) -> jax.Array:
    """Returns int8 of two int4 per byte."""
    pair = jnp.stack([values & 15, values >> 4], axis=-1)
    return pair.reshape(*values.shape[:-1], -1).astype(jnp.int8) - 8


def pick(weight: jax.Array | Quantised, index: jax.Array) -> jax.Array | Quantised:
    """Returns one matrix of a stack."""
    return jax.tree.map(lambda part: part[index], weight)


def quantise_layer(layer: dict[str, Any], kind: Kind, group: int) -> dict[str, Any]:
    """Quantises the projections of a layer."""
    return {
        key: quantise(array, kind, group) if ARRAYS[key].quantisable else array
        for key, array in layer.items()
    }


def stored_bytes(array: Any) -> int:
    """Returns the bytes of an array, or of a shape with a dtype. An int4 has half a byte.

    (On CPUs it has a whole one, but no form for CPUs holds int4.)
    """
    count = math.prod(array.shape)
    return count // 2 if array.dtype == jnp.int4 else count * array.dtype.itemsize

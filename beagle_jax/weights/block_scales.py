"""Reads fp8 matrices with a scale for each block of rows and columns, as DeepSeek's and Qwen's."""

from typing import NamedTuple

import numpy as np

from beagle_jax.errors import BadFile
from beagle_jax.weights.safetensors_file import FP8, WEIGHT_DTYPES, Place

_SCALE = "_scale_inv"  # appended to a matrix' name; the matrix is multiplied by it


class ScaledPlace(NamedTuple):
    """The place of an fp8 matrix and of its scales; it reads as a float32 tensor does."""

    matrix: Place
    scale: Place  # [blocks of rows, blocks of columns]
    block: tuple[int, int]  # rows and columns of a block

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.matrix.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of its values, which fp8 numbers times float32 scales need."""
        return np.dtype(np.float32)

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """Reads the part `index` (a slice per dimension, step 1) and converts it to `dtype`."""
        values = self.matrix.read(index, np.dtype(np.float32))
        scale_RC = self.scale.read((slice(None), slice(None)), np.dtype(np.float32))
        rows, columns = (
            np.arange(*part.indices(size))
            for part, size in zip(index, self.matrix.shape, strict=True)
        )
        column_blocks = columns // self.block[1]
        for number in np.unique(rows // self.block[0]):  # one block of rows in memory at a time
            values[rows // self.block[0] == number] *= scale_RC[number][column_blocks]
        return values.astype(dtype, copy=False)


def with_scales(
    places: list[tuple[str, Place]], block: tuple[int, int] | None
) -> list[tuple[str, Place | ScaledPlace]]:
    """Joins fp8 matrices with their scales; other tensors stay as they are.

    block: `weight_block_size` of the config; None without.

    Raises:
      BadFile: an fp8 tensor has no scales, or scales of another shape.
    """
    by_name = dict(places)
    joined: list[tuple[str, Place | ScaledPlace]] = []
    for name, place in places:
        if place.dtype != FP8:
            if not name.endswith(_SCALE):
                joined.append((name, place))
            continue
        scale = by_name.get(name + _SCALE)
        expected = None
        if block is not None and len(place.shape) == 2:
            expected = tuple(-(-size // of) for size, of in zip(place.shape, block, strict=True))
        if block is None or scale is None or expected is None or scale.shape != expected:
            there = "" if scale is None else f" with scales of shape {list(scale.shape)}"
            size = "weight_block_size in config.json" if expected is None else list(expected)
            raise BadFile(
                place.path,
                f"tensor {name} is stored as F8_E4M3{there}; expected {' or '.join(WEIGHT_DTYPES)}"
                f", or fp8 with {name}{_SCALE} and {size}",
            )
        joined.append((name, ScaledPlace(place, scale, block)))
    return joined

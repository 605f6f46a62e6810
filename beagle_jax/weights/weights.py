"""The interface of what tensors of a target are read from."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Weights(Protocol):
    """A source of tensors under Hugging Face names; matrices are [out, in]."""

    def shapes(self) -> Sequence[tuple[str, tuple[int, ...]]]:
        """Lists names and shapes of all tensors; a name in two files appears twice."""

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """Reads a part of a tensor (a slice per dimension, step 1)."""

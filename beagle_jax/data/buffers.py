"""Memory of batches that is used again: new pages cost as much time as the copy into them."""

import weakref
from collections import deque

import numpy as np
from numpy.typing import DTypeLike

_ALIGNMENT = 64  # bytes; jax copies host arrays with less into memory of its own on a CPU


class Buffers:
    """Arrays whose memory returns when the last array that views it is gone.

    jax keeps a reference to a host array until its copy to the device is complete and, on a CPU,
    for as long as the device's array uses the same memory. So memory is never written while it is
    read. Threads may share a pool.
    """

    def __init__(self, spare: int) -> None:
        """Makes an empty pool. spare: unused buffers of each size that are kept."""
        self._spare = spare
        self._free: dict[int, deque[np.ndarray]] = {}  # by size in bytes

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Returns an array whose values are arbitrary."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        free = self._free.setdefault(size, deque(maxlen=self._spare))
        try:
            memory_X = free.pop()
        except IndexError:
            memory_X = _aligned(size)
        # numpy sets the base of every view of `lent_X` to `lent_X`, as a memoryview is no array.
        lent_X = np.frombuffer(memory_X.data, np.uint8)
        weakref.finalize(lent_X, free.append, memory_X).atexit = False
        return lent_X.view(dtype).reshape(shape)


def _aligned(size: int) -> np.ndarray:
    whole_X = np.empty(size + _ALIGNMENT, np.uint8)
    start = -whole_X.ctypes.data % _ALIGNMENT
    return whole_X[start : start + size]

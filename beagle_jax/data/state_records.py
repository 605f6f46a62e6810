"""Records of states: one per token, as bytes in a file and as arrays; and their checksum.

A record is D numbers in float32 or bfloat16, or D int8 numbers and their float32 scale.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from beagle_jax.arrays import AnyArray
from beagle_jax.model.target import FINAL

INT8_MAX = 127


class Records(NamedTuple):
    """States of L tokens as they are stored. Arrays may be views of a mapped file."""

    states_LI: np.ndarray
    scale_L: np.ndarray | None = None  # float32; multiplies int8 states; None for other dtypes

    @property
    def nbytes(self) -> int:
        """Size of the states in bytes, without their scales."""
        return self.states_LI.nbytes

    def floats(self) -> np.ndarray:
        """Returns the states [L, I] in float32, or in bfloat16 if they are stored so."""
        if self.scale_L is None:
            return self.states_LI
        return self.states_LI.astype(np.float32) * self.scale_L[:, None]


def apart(states_BLI: AnyArray, taps: tuple[int, ...]) -> tuple[AnyArray, AnyArray | None]:
    """Splits records into what a draft reads, and the states that it predicts.

    states_BLI: the result of `states_at` for these taps. The second is None where the draft reads
    these states alone.
    """
    if not taps:
        return states_BLI, None
    final = states_BLI.shape[-1] * len(streams_of(taps)) // (len(streams_of(taps)) + 1)
    reads_BLI = states_BLI if FINAL in taps else states_BLI[..., :final]
    return reads_BLI, states_BLI[..., final:]


def streams_of(taps: tuple[int, ...]) -> tuple[int, ...]:
    """Leaves out FINAL, which every record ends with."""
    return tuple(tap for tap in taps if tap != FINAL)


def record_bytes(width: int, dtype: str) -> int:
    """Returns the size on disk of one token's record, in bytes."""
    return width + 4 if dtype == "int8" else width * np.dtype(dtype).itemsize


def encode(states_LI: np.ndarray | Records, dtype: str) -> bytes:
    """Encodes the records of the tokens. `Records` are of this dtype already.

    int8: the state divided by its scale, which is the largest magnitude / 127.
    """
    if isinstance(states_LI, Records):
        states_LI, scale_L = states_LI
        return states_LI.tobytes() if scale_L is None else joined(states_LI, scale_L)
    if dtype != "int8":
        return np.ascontiguousarray(states_LI, np.dtype(dtype)).tobytes()
    states_LI = np.asarray(states_LI, np.float32)
    scale_L = np.abs(states_LI).max(axis=1) / INT8_MAX
    return joined(np.rint(states_LI / np.where(scale_L == 0, 1, scale_L)[:, None]), scale_L)


def joined(states_LI: np.ndarray, scale_L: np.ndarray) -> bytes:
    """Returns the int8 records of states that are divided by their scales."""
    records_L = np.empty(len(states_LI), int8_record(states_LI.shape[1]))
    records_L["state"], records_L["scale"] = states_LI, scale_L
    return records_L.tobytes()


def decode(data: np.ndarray, width: int, dtype: str) -> Records:
    """Returns the records in bytes, without a copy."""
    if dtype != "int8":
        number = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        return Records(data.view(number).reshape(-1, width))
    records_L = data.view(int8_record(width))
    return Records(records_L["state"], records_L["scale"])


def int8_record(width: int) -> np.dtype:
    """Returns the dtype of one int8 record."""
    return np.dtype([("state", np.int8, (width,)), ("scale", np.float32)])


def checksum(data: np.ndarray) -> int:
    """Returns the sum of the 64-bit words of bytes, modulo 2**64; the last word ends in zeros.

    Every read of a row computes it. It finds lost pages and flipped bits at the speed of memory,
    where a CRC-32 takes twice as long as the read itself.
    """
    cut = len(data) // 8 * 8
    last = int.from_bytes(data[cut:].tobytes(), "little")
    return (int(data[:cut].view("<u8").sum(dtype=np.uint64)) + last) % 2**64

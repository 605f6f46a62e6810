"""Measures how fast the disk gives the stored states of `data.folder`."""

import os
import time
from pathlib import Path

from beagle_jax.remote import local

_PIECE = 16 << 20  # bytes of one read: a row of 2,048 tokens of a 4,096-wide target in bfloat16
_MOST, _SECONDS = 1 << 30, 2.0  # bytes and seconds of a measurement at most


def read_rate(folder: str | Path) -> float | None:
    """Reads stored states and returns bytes per second; None if the folder has none.

    Of a URL only states that are already copied to this machine are read: training copies them
    too. The operating system's copies in memory are dropped first where it offers that (Linux);
    elsewhere states that were just written read faster than the disk.
    """
    files = [path for path in sorted(local(folder).glob("*.states")) if path.stat().st_size]
    count, clock = 0, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while piece := file.read(_PIECE):
                count += len(piece)
                if count >= _MOST or time.perf_counter() - clock >= _SECONDS:
                    return count / (time.perf_counter() - clock)
    return count / (time.perf_counter() - clock) if count else None

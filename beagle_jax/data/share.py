"""Splits data work between processes."""

from dataclasses import dataclass

import jax
from jax.experimental import multihost_utils


@dataclass(frozen=True)
class Share:
    """One of `count` processes that fill the same folder, or read the same batches."""

    index: int = 0
    count: int = 1

    @property
    def together(self) -> bool:
        """Whether the processes run at the same time, so that they can wait for each other.

        False for the shares of `prepare --part`.
        """
        return self.count > 1 and jax.process_count() == self.count


ALONE = Share()


def this_process() -> Share:
    """Returns the share of this process among those of jax.distributed; ALONE without it."""
    return Share(jax.process_index(), jax.process_count())


def part_of(count: int, share: Share) -> tuple[int, int]:
    """Returns first and end of a share of `count` items; shares differ by one item at most."""
    return share.index * count // share.count, (share.index + 1) * count // share.count


def wait_for_all(what: str) -> None:
    """Waits until all processes of jax.distributed have called this; without it, returns."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)

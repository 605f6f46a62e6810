"""Which part of the work on data is this process's."""

from typing import NamedTuple

import jax
from jax.experimental import multihost_utils


class Share(NamedTuple):
    """One of `count` processes that work on the same folder, or draw from the same batches."""

    index: int = 0
    count: int = 1


ALONE = Share()


def this_process() -> Share:
    """Its number among the processes of jax.distributed; the only one without it."""
    return Share(jax.process_index(), jax.process_count())


def wait_for_all(what: str) -> None:
    """Returns once every process of jax.distributed has come here; at once without it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)

"""Whether the loader keeps up with a step: the states that it reads against the disk's rate."""

from jax.sharding import Mesh

from beagle_jax.config import Config
from beagle_jax.data.disk_rate import read_rate
from beagle_jax.sharding import row_parts
from beagle_jax.terminal import size
from beagle_jax.training.rates import peak_rate


def least_seconds(config: Config, mesh: Mesh, flops: float) -> float | None:
    """Returns a step's time at the published peak of all chips; None if it is not published."""
    peak = peak_rate(config, mesh)
    return flops / peak if peak else None


def readers(mesh: Mesh) -> int:
    """Returns how many processes read different rows of a batch."""
    processes = {device.process_index for device in mesh.devices.flat}
    return min(len(processes), row_parts(mesh))


def loader(config: Config, mesh: Mesh, state_of_a_token: int) -> dict:
    """Returns what the stages' loader rates are compared with.

    state_of_a_token: bytes on disk; 0 if the step computes the states.
    """
    return {
        "folder": str(config.data.folder),
        "readers": readers(mesh),
        "batch_bytes": state_of_a_token * config.train.batch * config.train.row_tokens,
        "disk_rate": read_rate(config.data.folder) if state_of_a_token else None,
    }


def loader_rate(seconds: float | None, loading: dict) -> float | None:
    """Returns bytes per second of states that each process has to read; None: unknown."""
    return seconds and loading["batch_bytes"] / loading["readers"] / seconds


def verdict(loading: dict, rates: list[float | None]) -> str:
    """Says whether the disk is fast enough. rates: `loader_rate` of the stages."""
    if not loading["batch_bytes"]:
        return "loader: the step computes the states (data.states: online); only tokens are read"
    known = [rate for rate in rates if rate is not None]
    if not known:
        return "loader: the rate that it needs is unknown, as the devices' peak is not published"
    needed = f"loader: at the chips' peak, each process reads {size(max(known))}/s of states"
    if loading["disk_rate"] is None:
        return (
            f"{needed}; {loading['folder']} has no states yet whose reading could be timed "
            "(prepare writes them)"
        )
    there = f"{needed}, and the disk of {loading['folder']} gives {size(loading['disk_rate'])}/s"
    if loading["disk_rate"] >= max(known):
        return there
    return (
        f"{there}: steps may wait; store int8 (data.states_dtype), use a faster disk, or compute "
        "the states (data.states: online)"
    )

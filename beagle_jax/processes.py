"""One run over several processes, one per host or per accelerator: how they find each other, and
who speaks.

Every process runs the same command. Each holds its own devices, all compute every step together,
all take part in writing checkpoints; only the first prints and logs.
"""

import os
from argparse import ArgumentParser, Namespace
from typing import Any

from beagle_jax import terminal
from beagle_jax.errors import UsageError, UserError

_VARIABLES = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}


def add_distributed(made: ArgumentParser) -> None:
    """The flag for clusters that do not show in the environment."""
    made.add_argument(
        "--distributed",
        action="store_true",
        help="wait for the run's other processes (Cloud TPU, Open MPI, Kubernetes); "
        "the default under srun and where JAX_COORDINATOR_ADDRESS is set",
    )


def join(arguments: Namespace) -> None:
    """Joins the other processes, if there are any; to be called before jax touches a device. All
    but the first go quiet.

    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    say it outright; what they leave out is jax.distributed's to detect. Raises UserError when the
    processes do not find each other.
    """
    if not (
        arguments.distributed or "JAX_COORDINATOR_ADDRESS" in os.environ or _one_of_many_tasks()
    ):
        return
    import jax

    try:
        jax.distributed.initialize(**_said_outright())
    except (ValueError, RuntimeError) as error:  # nothing detected; nobody answered
        raise UserError(
            f"the processes of this run did not find each other ({error}); start each with "
            "JAX_COORDINATOR_ADDRESS=host:port of the first, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID=0, 1, .."
        ) from error
    if jax.process_index():
        arguments.quiet = True
        terminal.prepare(arguments)


def is_first() -> bool:
    """Whether this process is the one that prints and logs."""
    import jax

    return jax.process_index() == 0


def from_first(number: float) -> float:
    """The first process's number, in every process."""
    import jax

    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(number))


def host_copy(tree: Any) -> Any:
    """Arrays that may be spread over all processes' devices, whole and in this process's memory."""
    import jax

    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def _one_of_many_tasks() -> bool:
    """Under srun; a batch script's own shell has no step."""
    return "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _said_outright() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, name in _VARIABLES.items():
        if name in os.environ:
            try:
                found[key] = int(os.environ[name])
            except ValueError:
                raise UsageError(f"{name} is {os.environ[name]!r}; expected a number") from None
    return found

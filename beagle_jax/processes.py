"""Runs over several processes, one per host or per accelerator.

Every process runs the same command and holds its own devices. All compute every step together and
take part in writing checkpoints; only the first prints and logs.
"""

import os
from argparse import ArgumentParser, Namespace
from typing import Any

from beagle_jax import terminal
from beagle_jax.errors import UsageError, UserError

_VARIABLES = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}


def add_distributed(made: ArgumentParser) -> None:
    """Adds the flag for clusters that cannot be detected from the environment."""
    made.add_argument(
        "--distributed",
        action="store_true",
        help="wait for the run's other processes (Cloud TPU, Open MPI, Kubernetes); "
        "the default under srun and where JAX_COORDINATOR_ADDRESS is set",
    )


def join(arguments: Namespace) -> None:
    """Joins the run's other processes, if there are any; all but the first become quiet.

    Call it before jax touches a device. JAX_COORDINATOR_ADDRESS (host:port of the first process),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID describe the run; jax.distributed detects what they leave
    out.

    Raises:
      UserError: the processes do not find each other.
      UsageError: a variable does not hold a number.
    """
    if not (
        arguments.distributed or "JAX_COORDINATOR_ADDRESS" in os.environ or _one_of_many_tasks()
    ):
        return
    import jax

    try:
        jax.distributed.initialize(**_said_outright())
    except (ValueError, RuntimeError) as error:  # no cluster detected; no process answered
        raise UserError(
            f"the processes of this run did not find each other ({error}); start each with "
            "JAX_COORDINATOR_ADDRESS=host:port of the first, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID=0, 1, .."
        ) from error
    if jax.process_index():
        arguments.quiet = True
        terminal.prepare(arguments)


def is_first() -> bool:
    """Returns whether this process prints and logs."""
    import jax

    return jax.process_index() == 0


def from_first(number: float) -> float:
    """Broadcasts the first process's number to every process."""
    import jax

    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(number))


def summed(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Adds up each of the counts over all processes."""
    import jax

    if jax.process_count() == 1:
        return counts
    import numpy as np
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.asarray(counts, np.int32))
    return tuple(int(count) for count in gathered.sum(axis=0))


def host_copy(tree: Any) -> Any:
    """Copies arrays, which may be sharded over all processes, whole to host memory."""
    import jax

    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def _one_of_many_tasks() -> bool:
    """Returns whether srun started this process as one of several tasks.

    The shell of a batch script has no job step.
    """
    return "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _said_outright() -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for key, name in _VARIABLES.items():
        if name in os.environ:
            try:
                variables[key] = int(os.environ[name])
            except ValueError:
                raise UsageError(f"{name} is {os.environ[name]!r}; expected a number") from None
    return variables

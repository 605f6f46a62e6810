"""Estimates memory, time and disk of a run before it starts.

python -m beagle_jax.plan --config FILE [--topology v5e:4x4]
"""

import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.errors import UsageError, run_main
from beagle_jax.terminal import show, working


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser(
        "plan",
        "Show parameters, operations, memory and disk of a training run, and whether its\nsteps "
        "compile and fit into memory. Needs no weights.",
        "python -m beagle_jax.plan --config llama2_7b_chat --topology v5e:4x4 mesh.fsdp=16",
    )
    made.add_argument(
        "--topology",
        metavar="NAME",
        help="compile for this TPU topology, for example v5e:4x4; needs libtpu, but no TPU",
    )
    made.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="plan for N virtual CPU devices instead of the devices of this machine",
    )
    add_overrides(made)
    arguments = made.parse_args(argv)
    if arguments.devices is not None and arguments.devices < 1:
        raise UsageError(f"--devices is {arguments.devices}; expected at least 1")
    config = read_config(arguments)
    with working(arguments):
        from beagle_jax.commands.plan import plan

        text, figures = plan(config, arguments)
    show(arguments, text, figures)


if __name__ == "__main__":
    sys.exit(run_main(main))

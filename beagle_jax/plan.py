"""Estimates memory, time and disk of a run before it starts.

python -m beagle_jax.plan --config FILE [--decode] [--topology v5e:4x4]
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
        help="compile for a TPU topology or for GPUs that are not there, for example v5e:4x4, "
        "h100:8, l4, b200:2x8; needs libtpu or JAX's CUDA plugin",
    )
    made.add_argument(
        "--decode",
        action="store_true",
        help="plan decoding instead of training: memory, kernels and the least time of a round",
    )
    made.add_argument("--batch", type=int, metavar="N", help="with --decode: rows (1)")
    made.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="with --decode: tokens of a row, at most the target's (4096)",
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
    for name in ("batch", "context"):
        value = getattr(arguments, name)
        if value is not None and not arguments.decode:
            raise UsageError(f"--{name} is for decoding; add --decode, or leave it out")
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; expected at least 1")
    config = read_config(arguments)
    with working(arguments):
        from beagle_jax.commands.plan import plan

        text, figures = plan(config, arguments)
    show(arguments, text, figures)


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Estimates memory, time and disk of a run before it starts.

python -m beagle_jax.plan --config FILE [--decode] [--topology v5e:4x4]
"""

import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.errors import UsageError, run_main
from beagle_jax.interrupts import leaves
from beagle_jax.terminal import show, working


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser(
        "plan",
        "Show operations, memory and disk of a run, and whether it compiles and fits.",
        "python -m beagle_jax.plan --config qwen3_8b --topology v5e:4x4 mesh.fsdp=16",
    )
    made.add_argument(
        "--topology",
        metavar="NAME",
        help="compile for chips that are not there: v5e:4x4, h100:8, l4, b200:2x8; needs libtpu "
        "or JAX's CUDA plugin",
    )
    made.add_argument(
        "--decode",
        action="store_true",
        help="plan a step and a round of decoding instead of training",
    )
    made.add_argument("--batch", type=int, metavar="N", help="with --decode: rows (1)")
    made.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="with --decode: tokens of a row (the target's, at most 4096)",
    )
    made.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="plan for N virtual CPU devices, not for this machine's devices",
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
    leaves("there is no plan, and plan leaves no files; run it again")
    with working(arguments):
        from beagle_jax.commands.plan import plan

        text, figures = plan(config, arguments)
    show(arguments, text, figures)


if __name__ == "__main__":
    sys.exit(run_main(main))

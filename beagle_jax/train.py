"""Trains a draft: python -m beagle_jax.train --config quickstart"""

import shlex
import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, parser, read_resolved
from beagle_jax.config import Config
from beagle_jax.config.printing import describe
from beagle_jax.errors import run_main
from beagle_jax.interrupts import leaves
from beagle_jax.processes import add_distributed, is_first, join
from beagle_jax.terminal import show, working


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser(
        "train",
        "Train a Beagle draft for a frozen target.",
        "python -m beagle_jax.train --config quickstart train.early.steps=200",
    )
    add_distributed(made)
    made.add_argument(
        "--profile",
        type=int,
        metavar="STEPS",
        help="write a trace of so many steps of each stage; the same as log.profile=STEPS",
    )
    add_overrides(made)
    arguments = made.parse_args(argv)
    if arguments.profile is not None:
        arguments.overrides.append(f"log.profile={arguments.profile}")
    resolved = read_resolved(arguments)
    config = resolved.config
    leaves(
        f"what is complete stays in {config.data.folder} and {config.train.folder}; the same "
        "command goes on from there"
    )
    join(arguments)
    with working(arguments):
        from beagle_jax.commands.train import train_draft

        figures = train_draft(config, described=describe(resolved))
    if is_first():
        named = f"--config {arguments.config}" if arguments.config else _source(config)
        try_it = (
            f'python -m beagle_jax.generate {named} "your prompt" draft.path={figures["draft"]}'
        )
        show(arguments, f"draft written to {figures['draft']}; try:\n  {try_it}", figures)


def _source(config: Config) -> str:
    """Returns the overrides that name the target, for a run without a config file."""
    return shlex.join([f"target.source={config.target.source}"])


if __name__ == "__main__":
    sys.exit(run_main(main))

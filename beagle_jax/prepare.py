"""Writes the training text and the target's states.

python -m beagle_jax.prepare --config quickstart
"""

import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.config.paths import home
from beagle_jax.errors import UsageError, run_main
from beagle_jax.interrupts import leaves
from beagle_jax.processes import add_distributed, is_first, join
from beagle_jax.terminal import show, working


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser(
        "prepare",
        "Write the training text and the target's states: the first step of train.",
        "python -m beagle_jax.prepare --config quickstart --preview",
    )
    made.add_argument(
        "--preview",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="only print N rows (3), supervised tokens in colour",
    )
    made.add_argument(
        "--export",
        type=home,
        metavar="FILE.rows",
        help="then write the text to one file, for data.source",
    )
    made.add_argument("--part", metavar="I/N", help="write only share I (0 to N-1) of N")
    add_distributed(made)
    add_overrides(made)
    arguments = made.parse_args(argv)
    share = _share(arguments.part)
    if arguments.preview is not None and arguments.preview < 1:
        raise UsageError(f"--preview is {arguments.preview}; expected at least 1")
    if arguments.export and not arguments.export.endswith(".rows"):
        raise UsageError(f"--export is {arguments.export!r}; expected a name that ends in .rows")
    config = read_config(arguments)
    if arguments.preview is None:
        leaves(f"whole parts stay in {config.data.folder}; the same command goes on from there")
    join(arguments)
    with working(arguments):
        from beagle_jax.commands.prepare import prepare_share, preview_rows

        done = (
            preview_rows(config, arguments.preview)
            if arguments.preview
            else prepare_share(config, share, arguments.export)
        )
    if share or is_first():
        show(arguments, *done)


def _share(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(
            f"--part is {text!r}; expected I/N, for example 0/4 to 3/4 for four processes"
        )
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(run_main(main))

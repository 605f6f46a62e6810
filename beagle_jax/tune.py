"""Finds the fastest draft tree for this machine and draft.

python -m beagle_jax.tune --config FILE
"""

import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, check_writable, parser, read_config
from beagle_jax.config.paths import home
from beagle_jax.errors import UsageError, run_main
from beagle_jax.interrupts import leaves
from beagle_jax.terminal import show, working


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser(
        "tune",
        "Measure this machine and this draft, and choose levels, topk and nodes of the draft tree.",
        "python -m beagle_jax.tune --config smollm2_135m --write tuned.yaml",
    )
    made.add_argument(
        "--quick",
        action="store_true",
        help="few trees, and acceptance as training measured it: under a minute on two cores",
    )
    made.add_argument(
        "--serve",
        action="store_true",
        help="for the server: serve.rows answers at once, of up to serve.context tokens",
    )
    made.add_argument(
        "--prompts",
        type=int,
        default=8,
        metavar="N",
        help="number of sample prompts, from the first of eval.suites",
    )
    made.add_argument(
        "--write",
        type=home,
        metavar="FILE",
        help="also write the config, with the chosen tree in it",
    )
    made.add_argument(
        "--plot",
        type=home,
        metavar="FILE",
        help="also plot measured costs and expected speeds (.png, .svg)",
    )
    add_overrides(made)
    arguments = made.parse_args(argv)
    for option, name in (("--write", arguments.write), ("--plot", arguments.plot)):
        check_writable(option, name)
    if arguments.prompts < 1:
        raise UsageError(f"--prompts is {arguments.prompts}; expected at least 1")
    config = read_config(arguments)
    leaves("no tree was chosen, and nothing is saved; run tune again")
    with working(arguments):
        from beagle_jax.commands.tune import choose_tree

        text, figures = choose_tree(config, arguments)
    show(arguments, text, figures)


if __name__ == "__main__":
    sys.exit(run_main(main))

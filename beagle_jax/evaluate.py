"""Measures a draft: python -m beagle_jax.evaluate --config quickstart"""

import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.config.paths import home
from beagle_jax.errors import UserError, run_main
from beagle_jax.interrupts import leaves
from beagle_jax.terminal import show, working


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser(
        "evaluate",
        "Compare speculative with plain decoding on the same prompts.",
        "python -m beagle_jax.evaluate --config quickstart eval.limit=10",
    )
    made.add_argument(
        "--out",
        type=home,
        metavar="FOLDER",
        help="folder for all answers and the report (report.json, report.md, report.html); answers "
        "that are there are used again",
    )
    made.add_argument(
        "--audit",
        action="store_true",
        help="compute every answer and every round in a second way and compare; "
        "exit status 1 if one differs",
    )
    add_overrides(made)
    arguments = made.parse_args(argv)
    config = read_config(arguments)
    there = f"in {arguments.out}; the same command goes on from there"
    leaves(f"whole answers are {there if arguments.out else 'stored with --out FOLDER only'}")
    with working(arguments):
        from beagle_jax.commands.evaluate import evaluate
        from beagle_jax.evaluation.audit import lines
        from beagle_jax.evaluation.report import table

        report = evaluate(config, arguments.out, audited=arguments.audit)
    show(
        arguments,
        "\n".join([table(report), *(lines(report.audit) if report.audit else [])]),
        report.as_json(),
    )
    if report.interrupted:
        raise KeyboardInterrupt
    if report.audit and not report.audit.passed:
        raise UserError("the audit failed; see the lines above that begin with FAILED")


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Measures a draft: python -m beagle_jax.evaluate --config configs/quickstart.yaml"""

import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.errors import run_main
from beagle_jax.terminal import show, working


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser("evaluate", "Compare speculative with plain decoding on the same prompts.",
                  "python -m beagle_jax.evaluate --config configs/quickstart.yaml eval.limit=10")
    made.add_argument("--out", metavar="FOLDER", help="keep every answer there, go on from those that are, and write the whole report: "
                      "report.json, report.md, report.html")
    add_overrides(made)
    arguments = made.parse_args(argv)
    config = read_config(arguments)
    with working(arguments):
        from beagle_jax.commands.evaluate import evaluate
        from beagle_jax.evaluation.report import table

        report = evaluate(config, arguments.out)
    show(arguments, table(report), report)


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Answers clients of OpenAI's API over HTTP. It needs the `serve` extra.

python -m beagle_jax.serve --config FILE
"""

import sys
from collections.abc import Sequence

from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.errors import UsageError, run_main
from beagle_jax.terminal import working


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = parser(
        "serve",
        "Serve the target and its draft to any client of OpenAI's API, on this host.",
        "python -m beagle_jax.serve --config smollm2_135m serve.port=8000",
    )
    add_overrides(made)
    arguments = made.parse_args(argv)
    if arguments.json:
        raise UsageError("serve has no figures to write; leave --json out, and read /metrics")
    config = read_config(arguments)
    with working(arguments):
        from beagle_jax.commands import serve
    serve.serve(config, arguments)


if __name__ == "__main__":
    sys.exit(run_main(main))

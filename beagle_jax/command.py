"""The command line that all commands share: --config FILE, then section.key=value.

This module does not load jax, so that --help and a mistyped setting are answered at once; see
beagle_jax/commands.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from beagle_jax import terminal
from beagle_jax.compile_cache import keep_programs
from beagle_jax.config import Config, resolve_config
from beagle_jax.config.paths import home
from beagle_jax.config.printing import describe
from beagle_jax.config.reading import Resolved
from beagle_jax.errors import UsageError


class _Parser(argparse.ArgumentParser):
    """argparse with UsageError for its errors, and options anywhere between the overrides."""

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.color = (
            False  # Python 3.14 colours the usage if stdout is a terminal, but this goes to stderr
        )
        raise UsageError(f"{message}\n{self.format_usage().strip()}\n(--help shows an example)")


def parser(name: str, purpose: str, example: str, takes: str = "") -> argparse.ArgumentParser:
    """Returns a parser for `python -m beagle_jax.<name>` with the common arguments.

    takes: the positional arguments before the overrides, for the usage line.
    """
    made = _Parser(
        prog=f"python -m beagle_jax.{name}",
        usage=f"python -m beagle_jax.{name} --config FILE [option ..]{takes and ' ' + takes} "
        "[key=value ..]",
        description=purpose,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    # It works, but who reads the help has found it, and the rest must fit a screen.
    made.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    made.add_argument(
        "--config",
        type=home,
        metavar="FILE",
        help="YAML file, or a shipped config's name: quickstart ..",
    )
    made.add_argument(
        "--print-config",
        action="store_true",
        help="show all settings and where each comes from",
    )
    made.add_argument(
        "--json",
        type=home,
        metavar="FILE",
        help="also write the result as JSON; -: to stdout, without text",
    )
    made.add_argument("--quiet", action="store_true", help="print only the result, no progress")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def add_overrides(made: argparse.ArgumentParser) -> None:
    """Adds the overrides, which follow a command's own arguments."""
    made.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="change a setting of the file",
    )


def read_config(arguments: argparse.Namespace) -> Config:
    """Returns the config of the parsed arguments; see `read_resolved`."""
    return read_resolved(arguments).config


def read_resolved(arguments: argparse.Namespace) -> Resolved:
    """Returns the config with the origin of each value; sets the style of progress bars.

    Also lets jax keep compiled programs in `target.cache_dir`.

    Raises SystemExit with status 0 if only the config is to be printed.
    """
    check_writable("--json", arguments.json)
    terminal.prepare(arguments)
    resolved = resolve_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(describe(resolved))
        raise SystemExit(0)
    keep_programs(resolved.config.target.cache_dir)
    return resolved


def check_writable(option: str, name: str | None) -> None:
    """Checks, before any work, that the folder of an output file exists.

    Raises:
      UsageError: it does not.
    """
    if name and not Path(name).parent.is_dir():
        raise UsageError(f"{option} {name}: there is no folder {Path(name).parent}; create it")

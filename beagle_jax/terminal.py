"""Terminal output: progress bars and colour on stderr, results on stdout.

Import it before tqdm, which reads its defaults from the environment once. All bars then have the
same style, those of libraries too.
"""

import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from beagle_jax.files import write_text

_BAR = (
    "{desc:<24} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} {unit} "
    "[{elapsed}<{remaining}, {rate_fmt}]{postfix}"
)
_SECONDS_BETWEEN_LINES = "30"  # without a terminal, every update of a bar is a new line of a log


def prepare(arguments: Namespace) -> None:
    """Configures progress bars and messages of libraries, also for child processes.

    Environment variables that the user has set are not changed.
    """
    os.environ.setdefault("TQDM_BAR_FORMAT", _BAR)
    os.environ.setdefault(
        "TQDM_MININTERVAL", "0.2" if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    )
    # transformers warns at every start that torch is absent, but only its tokenizers are used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if arguments.quiet:
        os.environ["TQDM_DISABLE"] = "1"
    listen()


def listen() -> None:
    """Prints what the package logs, unless its logger has a handler already."""
    logger = logging.getLogger("beagle_jax")
    if not logger.handlers:
        logger.addHandler(_Messages())
        logger.setLevel(logging.INFO)
        # orbax gives the root logger a handler, which would print every line again, with --quiet
        # too.
        logger.propagate = False


class _Messages(logging.Handler):
    """Prints progress beside the bars, and warnings on the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # after `prepare`

        if record.levelno >= logging.WARNING:
            print(f"{record.levelname.lower()}: {self.format(record)}", file=sys.stderr)
        else:
            tqdm.write(self.format(record))


@contextmanager
def working(arguments: Namespace) -> Iterator[None]:
    """Sends the block's prints, which are progress, to stderr; --quiet drops them.

    stdout then holds only the result.
    """
    if not arguments.quiet:
        with redirect_stdout(sys.stderr):
            yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def show(arguments: Namespace, text: str, figures: Any) -> None:
    """Prints a command's result, and writes its figures as JSON on request.

    `--json FILE` writes them to a file; `--json -` prints them on stdout instead of the text.
    """
    if arguments.json == "-":
        print(json.dumps(figures, indent=1))
        return
    print(text)
    if arguments.json:
        write_text(Path(arguments.json), json.dumps(figures, indent=1) + "\n")


def size(count: float) -> str:
    """Formats a number of bytes for readers."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def coloured(text: str, code: str, stream: TextIO) -> str:
    """Returns `text` in an ANSI colour (31 red, 1 bold) if the stream is a terminal.

    Otherwise, or if NO_COLOR is set, returns it unchanged.
    """
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{code}m{text}\033[0m"

"""What a command looks like on a terminal: one style of progress bar, colour where there is a
terminal, results apart from progress.

Imported before tqdm: tqdm reads its defaults from the environment once, so one style holds for
every bar, those of libraries included.
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
_SECONDS_BETWEEN_LINES = (
    "30"  # where there is no terminal, every drawing of a bar is a line of its own in some log
)


def prepare(arguments: Namespace) -> None:
    """Settings of all progress bars, and of what libraries print, for this process and those it
    starts; what the user has set stands.
    """
    os.environ.setdefault("TQDM_BAR_FORMAT", _BAR)
    os.environ.setdefault(
        "TQDM_MININTERVAL", "0.2" if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    )
    # transformers notes at every start that torch is absent; here it is only a tokenizer.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if arguments.quiet:
        os.environ["TQDM_DISABLE"] = "1"
    logger = logging.getLogger("beagle_jax")
    if not logger.handlers:
        logger.addHandler(_Warnings())


class _Warnings(logging.Handler):
    """Prints the package's warnings on stderr, wherever that is by then."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {self.format(record)}", file=sys.stderr)


@contextmanager
def working(arguments: Namespace) -> Iterator[None]:
    """What the block prints is progress: it goes to stderr, so that stdout holds the result alone;
    --quiet drops it.
    """
    if not arguments.quiet:
        with redirect_stdout(sys.stderr):
            yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def show(arguments: Namespace, text: str, figures: Any) -> None:
    """Prints a command's result; with --json FILE the figures go there too, with `--json -` to
    stdout in place of the text.
    """
    if arguments.json == "-":
        print(json.dumps(figures, indent=1))
        return
    print(text)
    if arguments.json:
        write_text(Path(arguments.json), json.dumps(figures, indent=1) + "\n")


def size(count: float) -> str:
    """Bytes for a reader."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def coloured(text: str, code: str, stream: TextIO) -> str:
    """`text` in an ANSI colour (31 red, 1 bold) on a terminal; as it is elsewhere, and where
    NO_COLOR is set.
    """
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{code}m{text}\033[0m"

"""The exceptions that users read, and the wrapper that prints them.

A `UserError` says what is wrong, where, what was expected and what to do. Entry points call
`run_main`, which prints it without a traceback: exit status 2 for usage, 1 for the rest. Errors of
the file system are printed in the same way.
"""

import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from beagle_jax import interrupts
from beagle_jax.terminal import coloured

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # failed writes with these errors name no file


class UserError(Exception):
    """Bad input: a file, key, shape, template or device that cannot be used as given."""

    exit_status = 1


class PromptError(UserError):
    """A prompt that cannot be answered."""


class ContextFull(PromptError):
    """A prompt that leaves no room for an answer."""

    def __init__(self, length: int, limit: int) -> None:
        """length: tokens of the prompt. limit: tokens of the context."""
        super().__init__(
            f"the prompt has {length} tokens and the context ends at {limit}, which leaves no "
            "room for an answer; shorten the prompt"
        )
        self.length, self.limit = length, limit


class BadFile(UserError):
    """A file that does not hold what it should."""

    def __init__(self, path: Path, problem: str, where: str = ""):
        """problem: what is wrong, and what to do.

        where: the place in the file, as messages write it after the path, for example ":12".
        """
        super().__init__(f"{path}{where}: {problem}")
        self.path, self.where = path, where


class UsageError(UserError):
    """A command line or config that names something that does not exist."""

    exit_status = 2


def run_main(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs `main(argv)` and returns the exit status; prints a UserError as one message.

    The message goes to stderr. `--debug` keeps the traceback. argv: None for the process's own
    command line; Ctrl-C then ends the process (`interrupts`).
    """
    if argv is None:
        with interrupts.Watch():
            try:
                return _run(main, sys.argv[1:])
            except KeyboardInterrupt:
                interrupts.leave()
    try:
        return _run(main, argv)
    except KeyboardInterrupt:
        print(f"\n{interrupts.message()}", file=sys.stderr)
        return interrupts.STATUS


def _run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    interrupts.leaves("")
    debug = "--debug" in argv
    try:
        main([argument for argument in argv if argument != "--debug"])
    except UserError as error:
        if debug:
            raise
        return _told(str(error), error.exit_status)
    except OSError as error:
        if debug or (error.filename is None and error.errno not in _FULL):
            raise
        return _told(
            f"{error.filename or 'a file that was being written'}: {error.strerror}; files that "
            "were complete before are unchanged. Free some space, or choose a path that can be "
            "read and written; --debug shows the operation that failed"
        )
    return 0


def _told(message: str, status: int = UserError.exit_status) -> int:
    print(f"{coloured('error:', '31', sys.stderr)} {message}", file=sys.stderr)
    return status

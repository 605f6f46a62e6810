"""Ends a command soon after Ctrl-C, with one line on what is left and how to go on.

Python raises KeyboardInterrupt between two of its own instructions. A program that compiles or runs
on a device is one instruction, and can take minutes. A thread notices the signal meanwhile and ends
the process.
"""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

STATUS = 130  # exit status after Ctrl-C
GRACE = 2.0  # seconds for Python to raise KeyboardInterrupt

_left = ""


def leaves(line: str) -> None:
    """Sets what is printed after Ctrl-C: what is there, and how to go on."""
    global _left
    _left = line


def message() -> str:
    """Returns the line that is printed after Ctrl-C."""
    return f"interrupted: {_left}" if _left else "interrupted"


def leave() -> NoReturn:
    """Prints the line and ends the process without waiting for devices.

    A normal exit would wait for the program that runs there.
    """
    with contextlib.suppress(OSError):  # its reader may have ended by the same Ctrl-C
        sys.stdout.flush()
    os.write(2, f"\n{message()}\n".encode())
    os._exit(STATUS)


class Watch:
    """Context manager in which Ctrl-C ends the process even during a long call into C++.

    It does nothing outside the main thread, and if another handler of the signal was set before or
    is set inside it: for example by training, which saves a checkpoint, or by the server.
    """

    def __enter__(self) -> "Watch":
        handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._active = handled and threading.current_thread() is threading.main_thread()
        if not self._active:
            return self
        self._raised = threading.Event()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.signal(signal.SIGINT, self._raise)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="Ctrl-C", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._active:
            signal.set_wakeup_fd(self._before)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.close(self._write)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._raised.set()
        raise KeyboardInterrupt

    def _watch(self) -> None:
        """Reads the numbers of signals, which C code writes when they arrive."""
        while numbers := os.read(self._read, 1):
            ours = signal.getsignal(signal.SIGINT) == self._raise
            if numbers[0] == signal.SIGINT and ours and not self._raised.wait(GRACE):
                leave()
        os.close(self._read)

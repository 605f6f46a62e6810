"""Writes files that are replaced as a whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file there replaces `path` if the block succeeds.

    After an error the temporary file is deleted, so that an incomplete file does not fill the disk.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file, replaced as a whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")

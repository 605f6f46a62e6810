"""Writes files that are replaced as a whole or not at all, under URLs too (remote.py)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path, tag: str = "") -> Iterator[Path]:
    """Yields a temporary path; the file there replaces `path` if the block succeeds.

    After an error the temporary file is deleted, so that an incomplete file does not fill the disk.
    tag: part of the temporary name, for processes that write the same file at once.
    """
    from beagle_jax.remote import upload  # whose errors are printed by terminal.py, which needs us

    partial = path.with_name(f"{path.name}{tag}.partial")
    try:
        yield partial
        upload(partial, path)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, tag: str = "") -> None:
    """Writes a text file, replaced as a whole or not at all. tag: as of `whole`."""
    with whole(path, tag) as partial:
        partial.write_text(text, encoding="utf-8")

"""Files and folders that appear whole or not at all, and JSON files that are read whole or refused."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beagle_jax.errors import UserError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name to write under; the file takes the place of `path` when the block has ended without an error."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The object that a JSON file holds. missing: what to say, and to do, when there is no such file.

    Raises UserError naming the file, and the line and byte where it stops being JSON.
    """
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {missing}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON (line {error.lineno}, character {error.pos}: {error.msg}); is the file whole?") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 (byte {error.start}: {error.reason}); is the file whole?") from error
    except (OSError, ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a JSON {type(found).__name__}, expected an object")
    return found


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `out` at the end of the block; after an error nothing of it is left."""
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".partial-", dir=out.parent)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error}); choose another folder") from error
    with temporary as beside:
        # The same name as `out`: transformers names the module that it loads after the folder.
        folder = Path(beside, out.name)
        folder.mkdir()
        yield folder
        replaced = Path(beside, "replaced")
        if out.exists():
            os.replace(out, replaced)
        try:
            os.replace(folder, out)
        except OSError:
            if replaced.exists():
                os.replace(replaced, out)
            raise

"""Records of JSON files, each with its place (file and line)."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beagle_jax.errors import BadFile

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def file_records(path: Path) -> Iterator[tuple[Any, str]]:
    """Yields (record, place) of a file: entries of a list in .json, else one record per line.

    A .json file that has one record per line is read as lines.

    Raises:
        BadFile: naming file and line, if the text is not JSON or the file cannot be read.
    """
    return _entries(path) if path.suffix == ".json" else json_lines(path)


def json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    """Yields (record, place) of every line of a .jsonl[.gz] file that is not blank.

    Raises:
        BadFile: naming file and line, if a line is not JSON or the file cannot be read.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.strip():
                    text = line.decode("utf-8").rstrip()
                    yield _json(text, path, f":{number}"), f"{path}:{number}"
    except UnicodeDecodeError as error:
        raise BadFile(path, f"not UTF-8 ({error})", where=f":{number}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadFile(
            path, f"cannot be read ({error}); is the file whole?", where=f":{number + 1}"
        ) from error


def _entries(path: Path) -> Iterator[tuple[Any, str]]:
    """Yields (record, place) of every entry of a file that is one JSON list."""
    try:
        text = path.read_bytes().removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(path, f"not UTF-8 ({error})") from error
    except OSError as error:
        raise BadFile(path, f"cannot be read ({error})") from error
    if _holds_lines(text):
        yield from json_lines(path)
        return
    records = _json(text, path)
    if not isinstance(records, list):
        raise BadFile(
            path,
            f"a .json file must be one list of chats, found a {type(records).__name__}; "
            "name a file of one chat a line .jsonl",
        )
    yield from ((record, f"{path}, entry {number}") for number, record in enumerate(records, 1))


def _holds_lines(text: str) -> bool:
    """Returns whether the first non-blank line is a JSON object and more text follows."""
    first, _, rest = text.strip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _json(text: str, path: Path, where: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        problem = f"not JSON ({error.msg} at {line}column {error.colno})"
        raise BadFile(path, problem, where) from error
    # For example a number with thousands of digits, or thousands of nested brackets.
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"cannot be read ({error})", where) from error

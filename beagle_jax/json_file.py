"""Reads one JSON file; what is wrong with it is said with the line where it shows."""

import json
from pathlib import Path
from typing import Any

from beagle_jax.errors import UserError


def read_json(path: Path, missing: str, damaged: str = "is the file whole?") -> dict[str, Any]:
    """The object that a JSON file holds. missing, damaged: what to say, and to do, when there is no
    such file, or no JSON in it.

    Raises UserError naming the file, and the line and byte where it stops being JSON.
    """
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {missing}") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not JSON (line {error.lineno}, character {error.pos}: {error.msg}); {damaged}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not text in UTF-8 (byte {error.start}: {error.reason}); {damaged}"
        ) from error
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits; thousands of brackets
        raise UserError(f"{path}: cannot be read ({error}); {damaged}") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: holds a JSON {type(found).__name__}, expected an object; {damaged}"
        )
    return found

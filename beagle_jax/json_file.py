"""Reads a JSON file; errors name the line."""

import json
from pathlib import Path
from typing import Any

from beagle_jax.errors import BadFile


def read_json(path: Path, missing: str, damaged: str = "is the file whole?") -> dict[str, Any]:
    """Returns the object in a JSON file.

    missing, damaged: advice to the user if there is no file, or if it is not JSON.

    Raises:
      BadFile: the file cannot be read as a JSON object. The message names the file, and the
        line and character, or the byte, where it stops being JSON.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise BadFile(path, f"no such file; {missing}") from None
    except json.JSONDecodeError as error:
        raise BadFile(
            path, f"not JSON (line {error.lineno}, character {error.pos}: {error.msg}); {damaged}"
        ) from error
    except UnicodeDecodeError as error:
        raise BadFile(
            path, f"not text in UTF-8 (byte {error.start}: {error.reason}); {damaged}"
        ) from error
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # raised for thousands of digits, and for thousands of brackets
        raise BadFile(path, f"cannot be read ({error}); {damaged}") from error
    if not isinstance(value, dict):
        raise BadFile(path, f"holds a JSON {type(value).__name__}, expected an object; {damaged}")
    return value

"""Resolves the files and folders that a config names, relative to the working directory."""

import os
from pathlib import Path
from typing import Any, Literal

from beagle_jax.errors import UsageError

# input: a file or folder that is read; output: one that is written.
PathKind = Literal["input", "output"]

# Values of path settings that name no path.
_WORDS = ("self", "normal", "ridge", "held_out", "lookup", "plain", "none")


def resolve(value: Any, kind: PathKind, folder: Path | None, bare: bool) -> tuple[Any, list[str]]:
    """Resolves the value of a path setting.

    Also returns those of its paths that exist in the working directory but not beside the file.

    Args:
        value: a path, a list of paths, or any other value, which is returned unchanged.
        kind: an output is relative to the working directory. An input is relative to the file, or
            to the working directory if it does not exist beside the file.
        folder: of the file that contains the setting; None for the command line.
        bare: whether a name without / and suffix may be a path.
    """
    if isinstance(value, (list, tuple)):
        pairs = [resolve(item, kind, folder, bare) for item in value]
        return [item for item, _ in pairs], [path for _, paths in pairs for path in paths]
    if not isinstance(value, str) or value in _WORDS or value.startswith(("pypi:", "openai:")):
        return value, []
    if value.startswith("hf:"):
        named = Path(value.removeprefix("hf:")).expanduser()
        is_beside = folder is not None and not named.is_absolute() and (folder / named).is_dir()
        return (f"hf:{_short(folder / named)}" if folder and is_beside else value), []
    if value.startswith("~"):
        return home(value), []
    if kind == "output" or folder is None or not value or os.path.isabs(value):
        return value, []
    if not bare and not os.path.dirname(value) and not os.path.splitext(value)[1]:
        return value, []
    if (folder / value).exists():
        return _short(folder / value), []
    return value, [value] if Path(value).exists() else []


def home(path: str) -> str:
    """Returns the path with the home folder in place of a leading ~.

    Raises:
        UsageError: ~ names a user who has no home folder here.
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise UsageError(
            f"{path}: there is no home folder {path.partition('/')[0]}; write ~/ for your own, or "
            f"./{path} for a folder of this name"
        )
    return whole


def same(there: Any, now: Any) -> bool:
    """Returns whether two values of a path setting name the same file or folder."""
    return _whole(there) == _whole(now)


def _whole(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_whole(item) for item in value]
    if not isinstance(value, str) or ":" in value or value in _WORDS:
        return value
    return os.path.abspath(os.path.expanduser(value))


def _short(path: Path) -> str:
    """Returns the path relative to the working directory if it is inside it, else absolute."""
    whole = Path(os.path.normpath(path.absolute()))
    if not (whole.exists() and whole.samefile(path)):  # .. after a symbolic link
        whole = path.absolute()
    return str(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole)

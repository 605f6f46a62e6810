"""The Hugging Face hub's cache on this machine: its folders `models--org--name`, each with
snapshots of a repository.
"""

import os
from pathlib import Path

from beagle_jax.errors import UserError

_PREFIXES = ("models--", "datasets--")


def snapshot_folder(path: Path, setting: str) -> Path:
    """The snapshot that a repository's folder of the hub cache stands for; other paths unchanged.

    That is the commit which `refs/main` names, or the only one there. setting: the name of the
    setting that gave the path, for messages. Raises UserError when no snapshot, or no single one,
    is there.
    """
    repository = Path(os.path.abspath(path))
    if repository.name == "snapshots":
        repository = repository.parent
    snapshots = repository / "snapshots"
    if not repository.name.startswith(_PREFIXES) or not snapshots.is_dir():
        return path
    commits = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    main = repository / "refs" / "main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    if commit not in commits:
        if len(commits) != 1:
            listed = ", ".join(commits) or "none"
            raise UserError(
                f"{setting}: {path} is the hub cache's folder of a repository, and its refs/main "
                f"names no snapshot that is there (snapshots: {listed}); give the folder of one "
                f"snapshot, {snapshots / 'COMMIT'}"
            )
        commit = commits[0]
    return snapshots / commit

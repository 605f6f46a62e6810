"""The local cache of the Hugging Face hub.

It has a folder `models--org--name` per repository, with snapshots of it.
"""

import os
from pathlib import Path

from beagle_jax.errors import UserError

_PREFIXES = ("models--", "datasets--")


def snapshot_folder(path: Path, setting: str) -> Path:
    """Returns the snapshot in a repository's folder of the hub cache; other paths unchanged.

    This is the commit that `refs/main` names, or the only snapshot.

    setting: name of the setting that gave the path, for error messages.

    Raises:
      UserError: there is no snapshot, or it is not clear which of several to use.
    """
    repository = Path(os.path.abspath(path))
    if repository.name == "snapshots":
        repository = repository.parent
    snapshots = repository / "snapshots"
    if not repository.name.startswith(_PREFIXES):
        return path
    if not snapshots.is_dir():
        if (repository / "blobs").is_dir() or (repository / "refs").is_dir():
            raise UserError(
                f"{setting}: {path} is a repository folder of the hub cache without snapshots; its "
                "download did not end: download it again"
            )
        return path
    commits = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    main = repository / "refs" / "main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    if commit not in commits:
        if len(commits) != 1:
            listed = ", ".join(commits) or "none"
            raise UserError(
                f"{setting}: {path} is a repository folder of the hub cache, and its refs/main "
                f"names no snapshot that is there (snapshots: {listed}); give the folder of one "
                f"snapshot, {snapshots / 'COMMIT'}"
            )
        commit = commits[0]
    return snapshots / commit

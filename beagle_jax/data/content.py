"""Content of `data.source`: its name, a hash of what it holds and, of a dataset, its commit.

A folder of text records this, so that a source that was edited, reordered or replaced under the
same name is noticed.
"""

import hashlib
import logging
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from beagle_jax.config import DataConfig
from beagle_jax.data.rows_file import SUFFIX
from beagle_jax.remote import fetch

_log = logging.getLogger(__name__)

Content = dict[str, str | None]  # name, sha256, revision

TEXT_FILES = ("*.jsonl", "*.jsonl.gz", f"*{SUFFIX}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def content_of(config: DataConfig) -> list[Content]:
    """Describes the source of a config: a list of one entry, or of none if it is not there.

    `sha256` is None if only `revision`, the commit of a dataset on the hub, identifies the content.
    """
    if config.source.startswith("openai:"):  # what the server is asked
        prompts = config.changed(source=config.prompts or "self", prompts=None)
        return [entry | {"name": config.source} for entry in content_of(prompts)]
    if config.source.startswith("hf:"):
        name = config.source.removeprefix("hf:")
        folder = Path(name).expanduser()
        if not folder.exists():
            return [_entry(config.source, None, hub_revision(name))]
        files = (path for path in folder.rglob("*") if not path.name.startswith((".", "cache-")))
        return [_entry(config.source, _digest(folder, files))]
    if config.source == "self":
        with resources.as_file(resources.files("beagle_jax.data") / "prompts.jsonl") as path:
            return [_entry("self", _digest(path.parent, [path]))]
    path = fetch(config.source)
    if path.is_dir():
        files = (file for pattern in TEXT_FILES for file in path.glob(pattern))
        return [_entry(config.source, _digest(path, files))]
    return [_entry(config.source, _digest(path.parent, [path]))] if path.is_file() else []


def hub_revision(name: str) -> str | None:
    """Returns the commit of a dataset `org/name[@revision]`; None if the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    repository, _, revision = name.partition("@")
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        return HfApi().dataset_info(repository, revision=revision or None).sha
    except (HTTPError, HFValidationError, OSError, RuntimeError) as error:
        _log.info(
            f"data.source: hf:{name}: the hub does not say which commit this is "
            f"({type(error).__name__}), so a later change of it cannot be noticed"
        )
        return None


def _entry(name: str, sha256: str | None, revision: str | None = None) -> Content:
    return {"name": name, "sha256": sha256, "revision": revision}


def _digest(folder: Path, files: Iterable[Path]) -> str:
    """Returns a hash of files: their names below `folder` and their bytes."""
    total = hashlib.sha256()
    for path in sorted(files):
        if not path.is_file() or path.name.startswith("._"):  # metadata files of macOS
            continue
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        # The name of a single file may change: it is the same text.
        total.update(f"{path.relative_to(folder).suffix} {content}\n".encode())
    return total.hexdigest()

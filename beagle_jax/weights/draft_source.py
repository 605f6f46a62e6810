"""Finds the folder of a draft by any of its names, and tells which format it has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from beagle_jax.config.paths import home
from beagle_jax.config.shipped import is_name, shipped_drafts
from beagle_jax.errors import UserError
from beagle_jax.hub_cache import snapshot_folder
from beagle_jax.model.families import is_family
from beagle_jax.model.kinds import KINDS
from beagle_jax.remote import fetch
from beagle_jax.weights.draft import CACHE_DIR, DIGEST
from beagle_jax.weights.eagle3_config import SPECULATORS
from beagle_jax.weights.hf import MODEL_FILES, download
from beagle_jax.weights.kinds import kind_in_torch

_PICKLES = ("*.bin", "*.pt", "*.pth")


def draft_folder(
    source: str | Path,
    cache_dir: str | Path = CACHE_DIR,
    *,
    allow_pickle: bool = False,
    setting: str = "draft.path",
) -> Path:
    """Returns the local folder of a draft; one of the hub is downloaded.

    source: `hf:org/name[@revision]`, a folder or its URL, or the name of a draft of the package. A
    folder of that name in the working directory comes first. cache_dir: folder for downloads.
    allow_pickle: downloads pickled weights too. setting: what named the draft, for errors.

    Raises:
      UserError: the download failed, or a name is neither a folder nor a draft of the package.
    """
    text = str(source)
    if text.startswith("hf:"):
        files: Sequence[str] = (*MODEL_FILES, *_PICKLES) if allow_pickle else MODEL_FILES
        return download(
            text.removeprefix("hf:"), Path(home(str(cache_dir))), files, setting=setting
        )
    path = fetch(home(text))
    if path.exists() or not is_name(text):
        return snapshot_folder(path, setting)
    shipped = shipped_drafts()
    if text not in shipped:
        raise UserError(
            f"{setting}: {text}: there is no folder of this name, and no draft of this name comes "
            f"with the package; expected hf:org/name, a folder, or one of {', '.join(shipped)}"
        )
    return shipped[text]


def published_format(config: dict[str, Any]) -> Literal["beagle", "eagle"] | None:
    """Returns the format of a published draft by its config.json; None for a native folder.

    "beagle": an exported folder of this library, or a published Beagle draft (`torch_import`).
    "eagle": EAGLE-1/2/3 (`eagle_import`). Their configs have the model_type of a family of targets;
    those of speculators have a key of their own.
    """
    model_type = config.get("model_type")
    if model_type in [kind.spec.model_type for kind in KINDS.values()]:
        return None
    if kind_in_torch(model_type) or any(key.startswith("beagle_") for key in config):
        return "beagle"
    if DIGEST in config:  # written by `save_draft`, whatever the model_type says now
        return None
    if config.get("speculators_model_type") == SPECULATORS:
        return "eagle"
    return "eagle" if is_family(model_type) and "hidden_size" in config else None

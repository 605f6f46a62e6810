"""Configs and drafts that come with the package, by name.

In a checkout they are in `configs/` and `drafts/` beside the package. A wheel has both inside it
(`package-dir` in pyproject.toml).
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent


def shipped_configs() -> dict[str, Path]:
    """Returns the configs of the package: name -> file."""
    return {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}


def shipped_drafts() -> dict[str, Path]:
    """Returns the drafts of the package: name -> folder."""
    configs = sorted((ROOT / "drafts").glob("*/config.json"))
    return {path.parent.name: path.parent for path in configs}


def is_name(value: str | Path) -> bool:
    """Returns whether a value can be a name: it has no folder, no suffix and no colon."""
    text = str(value)
    return bool(text) and not any(sign in text for sign in "/\\.:~")

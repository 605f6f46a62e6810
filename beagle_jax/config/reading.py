"""Reads a config from a file, the files that it extends, and the command line."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from beagle_jax.config import keys, older, paths
from beagle_jax.config.messages import explain
from beagle_jax.config.section import extra_of
from beagle_jax.config.shipped import is_name, shipped_configs
from beagle_jax.config.whole import Config
from beagle_jax.config.yaml_text import parse_override, parse_yaml
from beagle_jax.errors import UsageError, UserError
from beagle_jax.remote import check_url, is_url

_log = logging.getLogger(__name__)

EXTENDS = "extends"
_WITH_URLS = (
    "target.source",
    "data.source",
    "data.folder",
    "train.folder",
    "draft.path",
    "draft.init",
    "eval.compare",
)
_COMMAND_LINE = "command line"  # in messages, in place of a file


class Value(NamedTuple):
    """A setting as it was written, and where."""

    value: Any
    file: str  # for messages: the file, or for an override the file that it changes
    folder: Path | None  # its paths are relative to this folder first; None for the command line
    origin: str  # for --print-config
    written: str = ""  # the key that was written, which may be an alias
    note: str = ""  # for the user, if the value counts differently under that alias


Settings = dict[str, Value]  # by dotted key


class Resolved(NamedTuple):
    """A config and the origin of each of its settings."""

    config: Config
    origins: dict[str, str]  # by dotted key; a missing setting has its default


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, relative_to: str | Path | None = None
) -> Config:
    """Reads a YAML file and the files it extends, and applies `section.key=value` overrides.

    Args:
        path: the file, or the name of a config that comes with the package, such as quickstart;
            None: the overrides say everything.
        overrides: their values are YAML.
        relative_to: folder that the file's paths are relative to; by default the file's folder,
            then the working directory.

    Raises:
        UsageError: naming file and key for anything unknown, missing, of the wrong type or out of
            range.
    """
    return resolve_config(path, overrides, relative_to=relative_to).config


def resolve_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, relative_to: str | Path | None = None
) -> Resolved:
    """Like `load_config`, but also returns the origin of each setting."""
    file = config_file(path if path is None else paths.home(str(path)))
    settings = _read(file, overrides, relative_to)
    files = {key: value.file for key, value in settings.items()}
    path = file or _COMMAND_LINE
    if file is None and "target.source" not in settings:
        raise UsageError(
            "target.source is missing; give --config FILE, or target.source=SOURCE on the command "
            f"line; configs that come with the package: {', '.join(shipped_configs())}"
        )
    try:
        tree = keys.nest({key: value.value for key, value in settings.items()})
        keys.check_names(tree, [Config])
        config = Config.model_validate(_with_objective(tree))
    except UsageError as error:
        raise UsageError(f"{_file_of(str(error), files, path)}: {error}") from None
    except ValidationError as error:
        key, explanation = explain(error, Config)
        written = settings[key].written if key in settings else ""
        also = f" ({written} is written there)" if written not in ("", key) else ""
        raise UsageError(f"{_file_of(key, files, path)}: {explanation}{also}") from None
    return Resolved(config, {key: value.origin for key, value in settings.items()})


def config_file(path: str | Path | None) -> Path | None:
    """Returns the file of a config; a name that is no file may be that of a shipped config.

    Raises:
        UsageError: there is neither. The message lists the shipped configs.
    """
    if path is None or not is_name(path) or Path(path).exists():
        return None if path is None else Path(path)
    shipped = shipped_configs()
    if str(path) not in shipped:
        raise UsageError(
            f"{path}: no such config file, and no config of this name comes with the package; "
            f"expected a YAML file, or one of {', '.join(shipped)}"
        )
    return shipped[str(path)]


def read_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the settings of a file, the files it extends and overrides, without defaults.

    They are nested by section. Paths are relative to the working directory.

    Raises:
        UsageError: a file is missing, or is not a config file.
    """
    settings = _read(config_file(path), overrides, None)
    return keys.nest({key: value.value for key, value in settings.items()})


def _file_of(text: str, files: dict[str, str], path: str | Path) -> str:
    """Returns the file with the setting that a message names; `path` if it names none."""
    named = [key for key in files if key and key in text]
    return files[max(named, key=len)] if named else str(path)


def _read(path: Path | None, overrides: Sequence[str], relative_to: str | Path | None) -> Settings:
    settings: Settings = {}
    notes: list[str] = []
    folder = None if relative_to is None else Path(relative_to)
    chain = () if path is None else _chain(path, [])
    path = path or Path(_COMMAND_LINE)
    for file, tree in chain:
        origin = str(file) if file == path else f"{file}, which {path.name} extends"
        _add(settings, tree, Value(None, str(file), folder or file.parent, origin))
    for override in overrides:
        key, value = parse_override(override)
        tree = keys.nest({key: value})
        _add(settings, tree, Value(None, str(path), None, "command line"))
    _older_stages(settings, str(path), notes)
    _resolve_paths(settings, notes, quiet=relative_to is not None)
    notes += [f"{value.file}: {value.note}" for value in settings.values() if value.note]
    notes += older.other_top_k({value.written: value.file for value in settings.values()})
    for note in dict.fromkeys(notes):
        _log.warning(note)
    return settings


def _chain(path: Path, above: list[Path]) -> Iterator[tuple[Path, dict[Any, Any]]]:
    """Yields the files that `path` extends, the base of all first, and `path` itself last."""
    tree = _tree(path, above)
    base = tree.pop(EXTENDS, None)
    if base is not None:
        if not isinstance(base, str):
            raise UsageError(f"{path}: {EXTENDS} is {base!r}; expected the path of a config file")
        chain = [*above, path]
        below = path.parent / paths.home(base)
        if below.resolve() in [file.resolve() for file in chain]:
            files = " -> ".join(str(file) for file in (*chain, below))
            raise UsageError(f"{path}: {EXTENDS} forms a circle: {files}; remove one of them")
        yield from _chain(below, chain)
    yield path, tree


def _tree(path: Path, above: Sequence[Path]) -> dict[Any, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if above:
            raise UsageError(
                f"{above[-1]}: {EXTENDS} names {path}, which does not exist; the path is relative "
                "to the file that names it"
            ) from None
        raise UsageError(
            f"{path}: no such config file; start for example from configs/quickstart.yaml"
            f"{_by_name(path)}"
        ) from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({error}); expected a YAML file in UTF-8"
        ) from error
    if not isinstance(tree, dict):
        raise UsageError(
            f"{path}: expected a mapping with the sections {', '.join(Config.model_fields)}"
        )
    return tree


def _by_name(path: Path) -> str:
    """Names the shipped config that a missing file may stand for, as the end of a message."""
    if path.stem not in shipped_configs():
        return ""
    return f"; the one that comes with the package is --config {path.stem}"


def _add(settings: Settings, tree: dict[Any, Any], source: Value) -> None:
    """Adds the settings of a file or an override, which replace earlier values."""
    names: dict[str, str] = {}
    for written, given in keys.flatten(tree, [Config]):
        try:
            key, value, note = older.translate(written, given)
        except UsageError as error:
            raise UsageError(f"{source.file}: {error}") from None
        if names.setdefault(key, written) != written:
            raise UsageError(
                f"{source.file}: {names[key]} and {written} are names of one setting, {key}; "
                "leave one out"
            )
        if key == "train.late" and isinstance(value, str):
            try:
                is_none = older.late_word(settings, value)
            except UsageError as error:
                raise UsageError(f"{source.file}: {error}") from None
            if not is_none:
                continue
            key, value = "train.late.steps", 0
        settings[key] = source._replace(value=value, written=written, note=note)


def _older_stages(settings: Settings, path: str, notes: list[str]) -> None:
    """Translates stages from the format of version 0.1.0."""
    for name in ("early", "late"):
        prefix = f"train.{name}."
        given = {
            key.removeprefix(prefix): settings.pop(key)
            for key in list(settings)
            if key.startswith(prefix)
        }
        values = {key: value.value for key, value in given.items()}
        try:
            if name == "early":
                values, note = older.early_stage(values)
                notes += [f"{path}: {note}"] if note else []
            elif values:
                values = older.late_stage(values)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        implied = given.get("dense")
        for key, value in values.items():
            source = given.get(key, implied) or Value(None, path, None, "default")
            if key != "objective" or key in given or implied:  # `_with_objective` sets the default
                settings[prefix + key] = source._replace(value=value)


def _with_objective(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings with the default objective of `train.late`, if it has none."""
    train = tree.get("train", {})
    if "late" not in train:
        return tree
    return tree | {"train": train | {"late": {"objective": "late"} | train["late"]}}


def _resolve_paths(settings: Settings, notes: list[str], *, quiet: bool) -> None:
    for key, setting in settings.items():
        section, _, name = key.partition(".")
        kind = _path_kind(section, name)
        if kind is None:
            continue
        bare = key != "eval.suites"
        _check_urls(key, setting)
        try:
            value, elsewhere = paths.resolve(setting.value, kind, setting.folder, bare)
        except UsageError as error:
            raise UsageError(f"{setting.file}: {key}: {error}") from None
        settings[key] = setting._replace(value=value)
        if key == "draft.path" or quiet:  # usually the folder that training writes
            continue
        notes += [
            f"{setting.file}: {key}: {path} is not beside this file; the one in the working "
            "directory is used"
            for path in elsewhere
        ]


def _check_urls(key: str, setting: Value) -> None:
    """Checks the URLs in the value of a path setting, before anything is written."""
    values = setting.value if isinstance(setting.value, (list, tuple)) else [setting.value]
    for url in [value for value in values if isinstance(value, str) and is_url(value)]:
        if key not in _WITH_URLS:
            raise UsageError(
                f"{setting.file}: {key} is {url!r}, but it is a local file or folder; copy it, or "
                f"see {', '.join(_WITH_URLS)}, which may be URLs"
            )
        try:
            check_url(url)
        except UserError as error:
            raise UsageError(f"{setting.file}: {key}: {error}") from None


def _path_kind(section: str, name: str) -> Any:
    models = keys.section_at([Config], section)
    if not models or name not in models[0].model_fields:
        return None
    return extra_of(models[0], name).get("path")

"""The reference page of settings and the schema of a config file, made from the models.

`python -m beagle_jax.config.schema` writes docs/reference/settings.md and configs/schema.json of
the repository that it runs in; with --check it says whether they are current.
"""

import argparse
import json
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from beagle_jax.config.keys import sections_of
from beagle_jax.config.older import ALIASES
from beagle_jax.config.reading import EXTENDS
from beagle_jax.config.section import Section, extra_of
from beagle_jax.config.stage import STAGES
from beagle_jax.config.whole import Config


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of a config file.

    No setting is required, because an extended file or the command line may set it.
    """
    made = Config.model_json_schema()
    definitions = made["$defs"]
    for definition in (made, *definitions.values()):
        definition.pop("required", None)
        for setting in definition["properties"].values():
            for note in ("affects", "path", "title"):
                setting.pop(note, None)
    for definition in definitions.values():  # YAML 1.1 reads 1e-3 as a string
        for setting in definition["properties"].values():
            if setting.get("type") == "number":
                setting["type"] = ["number", "string"]
    train = definitions["TrainConfig"]["properties"]
    train["late"] = _short_late(definitions, train["late"])
    train["early"] = _short_early(definitions, train["early"])
    for alias, meant in ALIASES.items():
        _add_alias(made, definitions, alias, meant.key)
    made["properties"][EXTENDS] = {
        "type": "string",
        "description": "a config file that this one changes; relative to this file",
    }
    made["patternProperties"] = {rf"^({'|'.join(Config.model_fields)})\.": {}}  # dotted keys
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made,
        "title": "A config file of beagle_jax",
    }


def _short_late(definitions: dict[str, Any], late: dict[str, Any]) -> dict[str, Any]:
    """Schema of `train.late` in files: a word, or the keys of both kinds of stage and `dense`."""
    both = {
        **definitions["TestTimeStage"]["properties"],
        **definitions["LateStage"]["properties"],
        "objective": {"enum": ["late", "test_time"], "description": "training objective"},
        "dense": {"type": "boolean", "description": "version 0.1.0; true: objective test_time"},
    }
    definitions["ShortLateStage"] = {
        "type": "object",
        "properties": both,
        "additionalProperties": False,
        "description": "`train.late`",
    }
    return {
        "anyOf": [{"enum": ["none", "simulate"]}, {"$ref": "#/$defs/ShortLateStage"}],
        "description": late["description"],
    }


def _short_early(definitions: dict[str, Any], early: dict[str, Any]) -> dict[str, Any]:
    """Schema of `train.early` in files; some keys of version 0.1.0 are accepted too.

    These keys have a single valid value or no effect.
    """
    definitions["ShortEarlyStage"] = {
        **definitions["EarlyStage"],
        "properties": {
            **definitions["EarlyStage"]["properties"],
            "simulation_steps": {"const": 1, "description": "version 0.1.0; always 1"},
            "detach": {"type": "boolean", "description": "version 0.1.0; has no effect"},
            "dense": {"const": False, "description": "version 0.1.0; always false"},
            "multi_token": {"const": False, "description": "version 0.1.0; always false"},
            "step_weights": {"description": "version 0.1.0; has no effect"},
        },
        "description": "`train.early`",
    }
    return {"$ref": "#/$defs/ShortEarlyStage", "description": early["description"]}


def _add_alias(made: dict[str, Any], definitions: dict[str, Any], alias: str, key: str) -> None:
    *sections, name = alias.split(".")
    places = {
        (): made,
        ("decode",): definitions["DecodeConfig"],
        ("train", "late"): definitions["ShortLateStage"],
    }
    kind = "string" if key == "target.source" else "integer"
    places[tuple(sections)]["properties"][name] = {
        "type": kind,
        "description": _meaning(alias),
        "deprecated": True,
    }


def _meaning(alias: str) -> str:
    meant = ALIASES[alias]
    return f"stands for {meant.key}" + (
        f", whose value is larger than {meant.of} by {meant.more}" if meant.more else ""
    )


def schema_text() -> str:
    """Returns the text of configs/schema.json."""
    return json.dumps(schema(), indent=1) + "\n"


def page() -> str:
    """Returns the text of docs/reference/settings.md."""
    lines = [
        "# Settings",
        "",
        "<!-- Made by `python -m beagle_jax.config.schema`: change the fields, not this page. -->",
        "",
        "Every setting of every command, by section. A config is a YAML file with these sections;",
        "`section.key=value` on the command line changes a setting of the file, and",
        "`--print-config` shows all settings and where each comes from. A file may begin with",
        "`extends: other.yaml`, and then contains only what differs. The last column names the",
        "results on disk that depend on the setting, and cannot be used after a change of its",
        "value: the training *text* with its states, the checkpoints of a *stage*, the *answers*",
        "of an evaluation, and the values of *tau* that training compares.",
        "",
        "Paths of input files and folders are relative to the config file; if they do not exist",
        "there, to the working directory. Paths of output, and all paths on the command line, are",
        "relative to the working directory. `~` is the home folder.",
    ]
    for name, field in Config.model_fields.items():
        model = sections_of(field.annotation)[0]
        lines += ["", f"## {name}", "", _first_line(model), "", *_table(f"{name}.", model)]
    for objective, stage in STAGES.items():
        lines += [
            "",
            f"## Stage: {objective}",
            "",
            _first_line(stage),
            "",
            *_table("", stage),
        ]
    lines += [
        "",
        "## Names of other projects",
        "",
        "| name | meaning |",
        "|---|---|",
        *(f"| `{alias}` | {_meaning(alias)} |" for alias in ALIASES),
        "",
        "## In Python",
        "",
        "::: beagle_jax.config.reading",
        "",
        "::: beagle_jax.config.train",
        "",
        "::: beagle_jax.config.stage",
        "",
        "::: beagle_jax.config.identity",
        "",
        "::: beagle_jax.config.section",
        "",
        "The exception for a wrong setting:",
        "",
        "::: beagle_jax.errors",
    ]
    return "\n".join(lines) + "\n"


def _first_line(model: type[Section]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _table(prefix: str, model: type[Section]) -> Iterator[str]:
    yield "| setting | values | default | meaning | decides |"
    yield "|---|---|---|---|---|"
    for name, field in model.model_fields.items():
        sections = sections_of(field.annotation)
        if sections:
            values = "section: " + " or ".join(
                str(section.model_fields["objective"].default) for section in sections
            )
            default = "its own"
        else:
            values = _values(field.annotation, field.metadata)
            default = (
                "required" if field.default is PydanticUndefined else f"`{_yaml(field.default)}`"
            )
        cells = [
            f"`{prefix}{name}`",
            values,
            default,
            field.description or "",
            ", ".join(extra_of(model, name).get("affects", ())),
        ]
        yield (
            "| "
            + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
            + " |"
        )


def _values(annotation: Any, metadata: Sequence[Any]) -> str:
    """Returns a field's type and range in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _values(arguments[0], metadata)
    if origin in (typing.Union, types.UnionType):
        parts = [_values(part, metadata) for part in arguments if part is not type(None)]
        return " or ".join([*dict.fromkeys(parts), *(["null"] if type(None) in arguments else [])])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        if arguments[0] == tuple[str, Any]:
            return "mapping"
        return f"list of {_values(arguments[0], ())}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "stages"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    ]
    kind = {int: "integer", float: "number", str: "text", bool: "true, false"}[annotation]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return json.dumps(list(value)) if isinstance(value, tuple) else str(value)


# Functions that make the generated files, by path in the repository.
FILES = {"configs/schema.json": schema_text, "docs/reference/settings.md": page}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes both files; with --check, only reports those that are not current."""
    parser = argparse.ArgumentParser(prog="python -m beagle_jax.config.schema", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--root", default=".", help="of the repository")
    arguments = parser.parse_args(argv)
    old = []
    for name, made in FILES.items():
        path, text = Path(arguments.root) / name, made()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            old.append(name)
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
    for name in old:
        print(f"{'not current' if arguments.check else 'written'}: {name}")
    return 1 if old and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())

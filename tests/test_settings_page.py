"""The reference page and the schema come from the models, and the schema detects wrong files."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from beagle_jax.config import ALIASES
from beagle_jax.config import schema as made

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "configs").glob("*.yaml"), ROOT / "experiments" / "smollm2_135m.yaml"])
VALIDATOR = jsonschema.Draft202012Validator(
    json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))
)


def test_both_files_are_current(tmp_path, capsys):
    assert made.main(["--check", "--root", str(ROOT)]) == 0
    for name in made.FILES:
        (tmp_path / name).parent.mkdir(parents=True)
    assert made.main(["--root", str(tmp_path)]) == 0
    assert made.main(["--check", "--root", str(tmp_path)]) == 0
    page = tmp_path / "docs" / "reference" / "settings.md"
    page.write_text(page.read_text().replace("integer >= 1", "integer"))  # planted
    capsys.readouterr()
    assert made.main(["--check", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "not current: docs/reference/settings.md\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_files_fit_and_name_the_schema(path):
    text = path.read_text(encoding="utf-8")
    VALIDATOR.validate(yaml.safe_load(text))
    opening, _, schema = text.splitlines()[0].partition("=")
    assert opening == "# yaml-language-server: $schema"
    assert (path.parent / schema).samefile(ROOT / "configs" / "schema.json")


@pytest.mark.parametrize(
    "text",
    [
        "extends: paper.yaml",
        "train: {late: none}",
        "train: {late: {dense: true, window: 6}}",
        "train: {early: {simulation_steps: 1, learning_rate: 1e-3}}",
        "train: {stages: [{objective: early, window: 3}, {objective: test_time}]}",
        "train.early.steps: 3",
        "decode: {paths: [[0], [0, 1]]}",
    ],
)
def test_what_a_file_may_say_fits(text):
    VALIDATOR.validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "trian: {batch: 3}",
        "train: {bach: 3}",
        "train: {batch: 0}",
        "train: {beta1: 1.5}",
        "train: {late: never}",
        "train: {early: {dense: true}}",
        "train: {stages: [{objective: early, detach: true}]}",
        "decode: {tree: bush}",
        "mesh: {data: 0}",
        "extends: 3",
    ],
)
def test_a_wrong_file_does_not_fit(text):
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(yaml.safe_load(text))


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_fit(alias):
    value = "x" if ALIASES[alias].key == "target.source" else 3
    tree = value
    for part in reversed(alias.split(".")):
        tree = {part: tree}
    VALIDATOR.validate(tree)

"""Reports follow their schema and show what was measured, in JSON, Markdown and HTML."""

import copy
import json
import re
from importlib import resources
from types import SimpleNamespace

import jsonschema
import pytest
from pydantic import ValidationError

from beagle_jax.config import Config, TargetConfig
from beagle_jax.decoding.tree import ROOT_ONLY, chain
from beagle_jax.errors import UserError
from beagle_jax.evaluation.answers import Asked, Case, TimedAnswer
from beagle_jax.evaluation.figures import report
from beagle_jax.evaluation.measure import Bench, Measured, System
from beagle_jax.evaluation.pages import markdown, page
from beagle_jax.evaluation.plots import plot_acceptance, plot_phases
from beagle_jax.evaluation.report import Report, schema, table

COST = {
    "milliseconds": {"draft": 1.0, "verify": 2.0},
    "bytes": dict.fromkeys(
        [
            "target_weights",
            "draft_weights",
            "target_cache",
            "draft_cache",
            "decode_temporaries",
            "prefill_temporaries",
            "device_peak",
        ],
        2**20,
    ),
}


def check_schema(made: dict, part: str | None = None) -> None:
    """part: the field of a report that `made` is; the whole report by default."""
    schema = json.loads(
        (resources.files("beagle_jax.evaluation") / "report.schema.json").read_text(
            encoding="utf-8"
        )
    )
    if part is not None:
        schema = {**schema["properties"][part], "$defs": schema["$defs"]}
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json.dumps(made)), schema, jsonschema.Draft202012Validator)


def case(suite: str, number: int, category: str, lengths: list[int]) -> Case:
    """Makes a prompt whose turns have so many tokens.

    Nine tokens are answered plainly and in four rounds of a chain of 2.
    """
    plain = TimedAnswer(list(range(9)), "text", "length", 8, [8], 0.25, 4.0)
    fast = TimedAnswer(list(range(9)), "text", "length", 4, [1, 2, 1], 0.25, 2.0)
    return Case(
        suite,
        number,
        category,
        tuple({"plain": Asked([1] * n, plain), "a|<b>": Asked([1] * n, fast)} for n in lengths),
    )


@pytest.fixture
def made() -> dict:
    cases = [case("s", 0, "math", [10, 200]), case("s", 1, "code", [30]), case("t", 0, "t", [65])]
    plain = System("plain", SimpleNamespace(tree=ROOT_ONLY))
    draft = System("a|<b>", SimpleNamespace(tree=chain(2)), trained_tokens=100)
    bench = Bench(plain, (draft,), None, 512, 9)
    measured = Measured(cases, {"plain": 0, "a|<b>": 1}, {"s": 2, "t": 0, "long": 5})
    return report(
        bench,
        measured,
        Config(target=TargetConfig(source="x")).model_dump(),
        {"plain": COST, "a|<b>": COST},
    ).as_json()


def test_groups_and_figures(made):
    first, second = made["suites"]
    assert [(group["by"], group["of"], group["prompts"]) for group in first["groups"]] == [
        ("all", "", 2),
        ("category", "math", 1),
        ("category", "code", 1),
        ("context", "64", 2),
        ("context", "256", 1),
    ]
    assert [(group["by"], group["prompts"]) for group in second["groups"]] == [("all", 1)]
    system = first["groups"][0]["systems"]["a|<b>"]
    assert (
        system["tau"],
        system["tau_interval"],
        system["rounds"],
        system["tokens"],
        system["answers"],
    ) == (
        2.0,
        [2.0, 2.0],
        12,
        27,
        3,
    )
    assert system["speedup"] == pytest.approx(4.25 / 2.25, abs=1e-4) and system["step_alpha"] == [
        0.75,
        round(1 / 3, 4),
    ]
    assert made["systems"][1]["milliseconds"] == {
        "prefill": 250.0,
        "round": 500.0,
        "draft": 1.0,
        "verify": 2.0,
        "rest": 497.0,
    }
    assert made["notes"] == [
        "long is not there: none of its 5 turns fits the context.",
        "1 of 4 texts are longer than the 100 tokens that a|<b> was trained on.",
    ]


def test_the_schema_holds_and_describes_everything(made):
    check_schema(made)
    check_schema({**made, "systems": [{**system, "bytes": None} for system in made["systems"]]})
    check_schema(
        {
            **made,
            "audit": {
                "passed": True,
                "noise": 0.1,
                "reach": 0.2,
                "divergences": [],
                "checks": [{"name": "x", "passed": True, "found": "y"}],
            },
        }
    )
    text = (resources.files("beagle_jax.evaluation") / "report.schema.json").read_text(
        encoding="utf-8"
    )
    undescribed = []

    def walk(node, where):
        for name, field in node.get("properties", {}).items():
            if not any(key in field for key in ("description", "$ref")):
                undescribed.append(f"{where}.{name}")
            walk(field, f"{where}.{name}")
        for inner in (
            node.get("items"),
            node.get("additionalProperties"),
            *node.get("anyOf", []),
            *node.get("$defs", {}).values(),
        ):
            if isinstance(inner, dict):
                walk(inner, where)

    walk(json.loads(text), "")
    assert undescribed == []


def test_the_schema_is_current():
    committed = resources.files("beagle_jax.evaluation") / "report.schema.json"
    assert json.loads(committed.read_text(encoding="utf-8")) == schema(), (
        "run python -m beagle_jax.evaluation.report"
    )


def test_a_report_cannot_be_changed(made):
    with pytest.raises(ValidationError, match="frozen"):
        Report.model_validate(made).notes = []


def test_a_file_gives_the_same_report(made, tmp_path):
    path = tmp_path / "report.json"
    for costs in (True, False):
        for system in made["systems"]:
            if not costs:
                system["bytes"] = None
                for phase in ("draft", "verify", "rest"):
                    del system["milliseconds"][phase]
        path.write_text(json.dumps(made))
        assert Report.read(path).as_json() == made
    path.write_text(json.dumps(made | {"of_a_later_version": 1}))
    assert Report.read(path).as_json() == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"not a report of this version \(format 2\)"),
        ({"systems": []}, r"not a report \(systems: List should have at least 1 item"),
        ({"suites": [{"name": "s"}]}, r"not a report \(suites.0.turns_left_out: Field required"),
    ],
)
def test_another_file_is_refused(made, tmp_path, change, message):
    (tmp_path / "report.json").write_text(json.dumps(made | change))
    with pytest.raises(UserError, match=f"report.json: {message}"):
        Report.read(tmp_path / "report.json")


def _without(made: dict) -> None:
    del made["suites"][0]["groups"][0]["systems"]["plain"]["tau"]


def _renamed(made: dict) -> None:
    made["systems"][0]["speed"] = 1.0


def _of_another_kind(made: dict) -> None:
    made["suites"][0]["groups"][0]["systems"]["plain"]["rounds"] = "many"


def _impossible(made: dict) -> None:
    made["suites"][0]["groups"][0]["systems"]["plain"]["tau"] = 0.5


@pytest.mark.parametrize("spoil", [_without, _renamed, _of_another_kind, _impossible])
def test_planted_bugs_break_the_schema(made, spoil):
    spoiled = copy.deepcopy(made)
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError):
        check_schema(spoiled)
    if spoil is not _renamed:  # fields of later versions are read over
        with pytest.raises(ValidationError):
            Report.model_validate(spoiled)


def test_the_table_has_a_block_for_each_suite(made):
    lines = table(Report.model_validate(made)).splitlines()
    assert lines[0] == "s" and lines.count("t") == 1
    assert lines[3] == "plain   1.00      2.1      2.0    1.00x      24      27         0  3/3"
    assert (
        sum(line.startswith("a|<b>  ") for line in lines) == 2
        and "2 turns did not fit the context and were left out" in lines
    )
    assert lines[-3].startswith("tok/s: ") and lines[-2:] == made["notes"]


def test_prompts_without_a_category_have_a_heading(made):
    made["suites"][0]["groups"][1]["of"] = ""
    assert "\n## s: no category\n" in markdown(Report.model_validate(made))


def test_pages_hold_every_figure(made, tmp_path):
    parted = {
        "system": "a|<b>",
        "suite": "s",
        "number": 3,
        "turn": 1,
        "place": 7,
        "plain": 11,
        "system_token": 12,
        "gap": 0.25,
        "top_2_gap": 0.125,
        "within_noise": False,
    }
    ended = parted | {"system_token": None, "gap": 3.4e38, "within_noise": None}
    made["audit"] = {
        "passed": False,
        "noise": 0.01,
        "reach": 0.0321,
        "divergences": [parted, ended],
        "checks": [{"name": "tau", "passed": False, "found": "1.5, not 2.5"}],
    }
    check_schema(made)
    pictures = {"Acceptance": tmp_path / "a.png", "Phases": tmp_path / "p.png"}
    whole = Report.model_validate(made)
    plot_acceptance(whole, pictures["Acceptance"])
    plot_phases(whole, pictures["Phases"])
    text, shown = markdown(whole), page(whole, pictures)
    for cell in (
        "2.00 [2.00, 2.00]",
        "1.89x [1.89, 1.89]",
        "0.75 0.33",
        "s: prompts up to 256 tokens",
        "s: math",
        "497.00",
        "1.5, not 2.5",
        *made["notes"],
        "up to 0.0321",
        "s prompt 3, turn 1, token 7",
        "11 became 12",
        "11 became the end",
        "0.25",
        "0.125",
        "NO",
    ):
        assert (
            cell in text.replace("a\\|<b>", "a|<b>")
            and cell.replace("<", "&lt;").replace(">", "&gt;") in shown
        ), cell
    assert "a\\|<b>" in text and "a|&lt;b&gt;" in shown and "<b>" not in shown
    # One file that needs nothing else: every source is in it.
    assert re.findall(r'(?:src|href)="(.{10})', shown) == ["data:image"] * 2 and "http" not in shown
    assert (
        "One prompt: no intervals." in text
        and "2 prompts; in brackets" in text
        and "None" not in text
    )
    columns = {
        len(re.findall(r"(?<!\\)\|", line))
        for line in text.splitlines()
        if line.startswith("|") and "speedup" in line
    }
    assert columns == {10}

"""Throughput by batch size, the best speedup, and a measurement that is ended by hand."""

import json
from types import SimpleNamespace

import jax
import pytest
from command_cases import make_target, write_lines
from test_report import check_schema
from test_report import made as a_report  # noqa: F401 (the fixture)

from beagle_jax import evaluate, load_target
from beagle_jax.config import load_config
from beagle_jax.errors import UsageError, run_main
from beagle_jax.evaluation import measure
from beagle_jax.evaluation.pages import markdown, page
from beagle_jax.evaluation.report import Report, table
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.weights.draft import Draft, save_draft

SPEEDS = {1: (100.0, 130.0), 2: (180.0, 189.0), 4: (300.0, 270.0), 8: (500.0, 350.0)}


def with_batches(made: dict, speeds=SPEEDS) -> Report:
    """The report of test_report.py with throughput by batch size."""
    plain, draft = (system["name"] for system in made["systems"])
    batches = [
        {
            "batch": batch,
            "answers": 16,
            "systems": {
                plain: {"tokens_per_second": slow, "speedup": 1.0},
                draft: {"tokens_per_second": fast, "speedup": fast / slow},
            },
        }
        for batch, (slow, fast) in speeds.items()
    ]
    return Report.model_validate({**made, "throughput": batches})


def test_where_speculation_stops_paying_is_visible_everywhere(a_report):
    report = with_batches(a_report)
    check_schema(report.as_json())
    [draft] = report.speculative
    assert report.pays_below(draft.name) == 4
    lines = table(report).splitlines()
    [four] = [line.split() for line in lines if line.startswith("batch 4")]
    assert four == ["batch", "4", "300.0", "270.0", "(0.90x)"]
    said = f"{draft.name} is no faster than plain decoding at batch 4."
    assert said in lines
    assert "## Throughput by batch size, tok/s" in markdown(report) and said in markdown(report)
    assert "<td>270.0 (0.90x)</td>" in page(report, {})


def test_a_draft_that_always_pays_says_so(a_report):
    report = with_batches(a_report, {1: (1.0, 2.0), 8: (1.0, 1.1)})
    [draft] = report.speculative
    assert report.pays_below(draft.name) is None
    assert f"{draft.name} is faster than plain decoding at all these batch sizes." in table(report)


def test_the_best_speedup_is_tau_times_the_costs(a_report):
    """By hand: nine tokens in four rounds; a round costs 1 + 2 ms, a plain pass 2 ms."""
    plain, draft = a_report["systems"]
    assert plain["best_speedup"] is None
    assert draft["best_speedup"] == pytest.approx(2.0 * 2.0 / 3.0, abs=1e-4)
    text = table(Report.model_validate(a_report))
    assert (
        "at best 1.33x with this acceptance and this machine's costs of a round; measured " in text
    )


def test_reports_without_the_new_fields_are_read(a_report, tmp_path):
    old = {key: a_report[key] for key in a_report if key not in ("throughput", "interrupted")}
    old["systems"] = [
        {key: value for key, value in system.items() if key != "best_speedup"}
        for system in old["systems"]
    ]
    (tmp_path / "report.json").write_text(json.dumps(old))
    report = Report.read(tmp_path / "report.json")
    assert report.throughput == [] and "batch" not in table(report)


@pytest.mark.parametrize("batch", ["[0]", "[2, 2]"])
def test_batch_sizes_that_mean_nothing_are_refused(batch, capsys):
    with pytest.raises(UsageError, match=r"eval\.batch is \[.*numbers of rows of at least 1"):
        load_config(None, ["target.source=x", f"eval.batch={batch}"])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("throughput")
    make_target(folder / "target")
    spec = BeagleSpec.from_target(load_target(folder / "target").spec, init_std=0.3)
    save_draft(folder / "draft", Draft(spec, init_draft(spec, jax.random.key(1)), None, {}))
    prompts = write_lines(folder / "eval.jsonl", ["Why?", "Who are you?", "And?"])
    settings = [f"target.source={folder / 'target'}", f"draft.path={folder / 'draft'}"]
    limits = [f"eval.suites=[{prompts}]", "eval.max_new_tokens=6", "decode.levels=2"]
    return SimpleNamespace(folder=folder, settings=[*settings, *limits])


def test_evaluate_measures_every_batch_size(place, capsys):
    file = place.folder / "figures.json"
    more = ["eval.batch=[1, 2]", "--json", str(file), "--quiet"]
    assert run_main(evaluate.main, [*place.settings, *more]) == 0
    printed = capsys.readouterr().out
    made = json.loads(file.read_text())
    check_schema(made)
    assert [(entry["batch"], entry["answers"]) for entry in made["throughput"]] == [(1, 4), (2, 4)]
    for entry in made["throughput"]:
        slow, fast = entry["systems"].values()
        ratio = fast["tokens_per_second"] / slow["tokens_per_second"]
        assert slow["speedup"] == 1 and fast["speedup"] == pytest.approx(ratio, rel=1e-2)
    assert "batch 1" in printed and "batch 2" in printed and ": at best " in printed


def test_an_interrupt_leaves_a_report_of_what_there_is(place, capsys, monkeypatch):
    right, calls = measure._turns, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(measure, "_turns", interrupted)
    file = place.folder / "part.json"
    assert run_main(evaluate.main, [*place.settings, "--json", str(file), "--quiet"]) == 130
    printed = capsys.readouterr()
    made = json.loads(file.read_text())
    check_schema(made)
    assert made["interrupted"] and made["suites"][0]["groups"][0]["prompts"] == 2
    assert "Interrupted: 1 prompts were not answered." in printed.out
    calls[:] = [1, 1]  # before the first answer there is nothing to report
    assert run_main(evaluate.main, [*place.settings, "--quiet"]) == 130
    assert capsys.readouterr().out == ""

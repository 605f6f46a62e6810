"""The figures' runner: hand-made results, the committed file, and everything at toy size."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from experiment_cases import PAPER, ROOT

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import claims
import plan as plans
import results
import run as runner

from beagle_jax.config import load_config
from beagle_jax.errors import UsageError, UserError, run_main

pytestmark = pytest.mark.usefixtures("at_the_root")


def test_every_run_of_the_paper_is_a_config(tmp_path):
    plan = plans.load_plan(Path(PAPER), {}, short=False)
    assert set(plan.figures) >= {
        "fig3",
        "fig4",
        "fig5",
        "fig6",
        "fig10",
        "fig11",
        "detach",
        "table1",
    }
    for training in plan.trainings():
        settings = plan.settings_of(training, 100) | {"draft.init": "normal"}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        config = load_config(tmp_path / "config.yaml")
        assert (
            config.train.folder == f"runs/paper/{training.name}-{training.seed}"
            and config.decode.levels == 5
        )
        run = plan.runs[training.name]
        assert {"early": config.train.early.steps, "late": config.train.late.steps} == {
            "early": 0,
            "late": 0,
            run.stage: 100,
        }
        if run.after:  # what was seen before comes in another order
            above = plan.folder_of(plan.above(training))
            assert config.train.seed > plan.settings_of(plan.above(training), 100)["train.seed"]
            assert plan.settings_of(training, 100)[
                "draft.init"
            ] == f"{above}/draft" and above.name in ("base-0", f"{run.after}-{training.seed}")


def test_one_figure_needs_its_runs_and_those_before_them():
    plan = plans.load_plan(Path(PAPER), {}, short=False)
    assert (
        list(plan.only(["detach"]).runs) == ["base", "late", "through"]
        and not plan.only(["detach"]).evaluations
    )
    table = plan.only(["table1"])
    assert set(table.runs) == {
        "beagle",
        "beagle-longer",
        "beagle-late",
        "eagle",
        "eagle-longer",
        "eagle-late",
    } and set(table.evaluations) == {"systems"}
    with pytest.raises(UsageError, match="--only fig99: no such figure; expected fig3"):
        plan.only(["fig99"])


def test_first_seeds_come_first():
    order = [
        tuple(training) for training in plans.load_plan(Path(PAPER), {}, short=False).trainings()
    ]
    assert order[0] == ("beagle", 0) and order.index(("beagle", 1)) > order.index(("window-4", 0))
    assert len(order) == len(set(order))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"claims": [{"figure": "fig3", "says": "x", "more": "beegle", "less": "eagle"}]},
            r"claims\[0\] names 'beegle', which is not there",
        ),
        (
            {
                "runs": {"beagle": {"stage": "early", "steps": 3, "step": 4}},
                "figures": {},
                "claims": [],
            },
            "runs.beagle: .*'step'",
        ),
        ({"base": "experiments/none.yaml"}, "not a file of experiments"),
        (
            {
                "runs": {
                    "late": {"stage": "late", "steps": 3, "after": "base"},
                    "base": {"stage": "early", "steps": 3},
                },
                "figures": {},
            },
            "runs.late goes on from base, which stands below it",
        ),
        (
            {
                "claims": [
                    {
                        "figure": "fig4",
                        "says": "x",
                        "measure": "taus",
                        "more": "beagle",
                        "less": "eagle",
                    }
                ]
            },
            r"claims\[0\].measure is 'taus'; expected",
        ),
        (
            {
                "claims": [
                    {
                        "figure": "fig4",
                        "says": "x",
                        "measure": "alpha_0",
                        "more": "beagle",
                        "less": "eagle",
                    }
                ]
            },
            "measure is 'alpha_0'",
        ),
        (
            {
                "claims": [
                    {
                        "figure": "fig4",
                        "says": "x",
                        "measure": "memory",
                        "more": "beagle",
                        "less": "eagle",
                    }
                ]
            },
            "beagle has no memory",
        ),
        (
            {"figures": {"fig4": {"title": "x", "kind": "phases", "of": ["beagle"]}}},
            "fig4 is of kind phases, which needs times: of evaluations",
        ),
        (
            {"figures": {"fig4": {"title": "x", "kind": "curves", "of": ["beagle"]}}},
            "fig4: kind is 'curves'; expected one of curve, depth",
        ),
        (
            {"evaluations": {"e": {"drafts": ["beagle", "beagle"]}}},
            "evaluations.e.drafts is beagle, beagle; expected each once",
        ),
        (
            {"evaluations": {"e": {"drafts": "beagle"}, "e-2": {"drafts": "eagle"}}},
            "evaluations.e-2 would share its folder with seeds of another",
        ),
    ],
)
def test_a_wrong_file_is_refused(change, message, tmp_path):
    tree = yaml.safe_load(Path(PAPER).read_text()) | {"evaluations": {}}
    tree["figures"] = {
        name: figure
        for name, figure in tree["figures"].items()
        if not any("." in run for run in figure["of"])
    }
    tree["claims"] = []
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(tree | change, sort_keys=False))
    with pytest.raises(UsageError, match=message):
        plans.load_plan(path, {}, short=False)


def test_a_folder_made_with_other_settings_is_refused(tmp_path):
    plan = plans.load_plan(Path(PAPER), {}, short=False)
    settings = plan.settings_of(plans.Training("beagle", 0), 100)
    path = tmp_path / "config.yaml"
    runner._written(path, settings, "train.early.steps")
    assert (
        runner._written(
            path, settings | {"train.early.steps": 200}, "train.early.steps"
        ).train.early.steps
        == 200
    )
    with pytest.raises(UserError, match=r"made with other settings of train.early.window"):
        runner._written(path, settings | {"train.early.window": 5}, "train.early.steps")


def test_two_runs_of_one_name_are_refused(tmp_path):
    text = Path(PAPER).read_text()
    (tmp_path / "x.yaml").write_text(text.replace("  window-5:", "  window-1:", 1))
    with pytest.raises(
        UsageError, match=r"(?s)x.yaml: not valid YAML.* the key 'window-1' appears twice"
    ):
        plans.load_plan(tmp_path / "x.yaml", {}, short=False)


def test_a_part_of_the_table_does_not_replace_it(tmp_path):
    plan = replace(
        plans.load_plan(Path(PAPER), {}, short=False), folder=tmp_path / "runs", results=tmp_path
    )
    whole = results.write_results(plan, {})
    part = results.write_results(plan.only(["detach"]), {}, whole=False)
    assert (
        part.count("| detach |") == 1 < whole.count("\n| fig")
        and (tmp_path / "claims.md").read_text() == whole
    )


def test_speed_is_without_the_lines_that_hold_a_compilation(tmp_path):
    """Trained to 20; stopped before 40 and resumed from a checkpoint at 20; then further."""
    (tmp_path / "c.yaml").write_text(f"target: {{source: x}}\ntrain: {{folder: {tmp_path}}}")
    data, timed = (
        {"stage": "data", "step": 0},
        lambda step, speed: {"stage": "early", "step": step, "tokens_per_second": speed},
    )
    lines = [
        data,
        timed(10, 1.0),
        timed(20, 50.0),
        {"stage": "early", "step": 20, "split": "held_out"},
        data,
        timed(30, 1.0),
        data,
        timed(30, 1.0),
        timed(40, 60.0),
        timed(50, 70.0),
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runner.training_speed(load_config(tmp_path / "c.yaml")) == [50.0, 60.0, 70.0]


@pytest.fixture
def evaluated(tmp_path):
    """A plan with a hand-made evaluation of the first seeds."""
    plan = replace(plans.load_plan(Path(PAPER), {}, short=False), folder=tmp_path)
    draft, folder = tmp_path / "late-0" / "draft", tmp_path / "evaluations" / "dynamic-append"
    for directory in (draft, folder):
        directory.mkdir(parents=True)
    (draft / "config.json").write_text('{"sha256": "a"}')
    ask_first(plan, folder)
    (folder / "answers.jsonl").write_text('{"drafts": {"late": "a"}}\n')
    (folder / "report.json").write_text("{}")
    return plan, folder


def ask_first(plan, folder: Path) -> None:
    """Runs the evaluation of that name, of the first seeds."""
    runner.evaluate_drafts(plan, folder.name, folder, plan.evaluated(folder.name)[folder])


@pytest.fixture
def evaluations(monkeypatch):
    """Records the calls of `evaluate`."""
    calls = []
    monkeypatch.setattr(runner, "evaluate", lambda *arguments: calls.append(arguments))
    return calls


def test_an_evaluation_is_not_made_again(evaluations, evaluated):
    plan, folder = evaluated
    ask_first(plan, folder)
    assert len(evaluations) == 1
    # What only trainings are told of is no reason.
    ask_first(replace(plan, base={**plan.base, "train": {}}), folder)
    assert len(evaluations) == 1


@pytest.mark.slow
def test_every_seed_is_evaluated_and_a_later_one_leaves_the_first_alone(
    evaluations, evaluated, monkeypatch
):
    """An evaluation times all its runs side by side, seed by seed.

    Existing answers are not repeated.
    """
    plan, folder = evaluated
    contents = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(runner, "train_and_measure", lambda *_, **__: None)
    assert runner.run_all(plan, shared=True) == {} and len(evaluations) == 1
    assert runner.run_all(plan, shared=False) == {}
    asks = {
        Path(out).name: (config.draft.path, *config.eval.compare) for config, out in evaluations[1:]
    }

    def at(name, seed):
        return f"{plan.folder}/{name}-{seed}/draft"

    systems = plan.evaluations["systems"].drafts
    of = {name: [f"{name}{place}" for place in ("", "-1", "-2")] for name in plan.evaluations}
    assert set(asks) == {each for names in of.values() for each in names} - {folder.name}
    for seed in range(3):
        assert asks[of["systems"][seed]] == tuple(at(name, seed) for name in systems)
        assert asks[of["static-append"][seed]] == (at("late", seed),)
    assert asks["dynamic-append-1"] == (at("late", 1),)
    assert {path: path.read_bytes() for path in folder.iterdir()} == contents


def test_a_run_with_fewer_seeds_stands_beside_the_first_ones_only():
    plan = plans.load_plan(Path(PAPER), {}, short=False)
    plan = replace(
        plan, runs={**plan.runs, "eagle-late": replace(plan.runs["eagle-late"], seeds=(7,))}
    )
    first, second, third = plan.evaluated("systems").values()
    assert ("eagle-late", 7) in first and {training.name for training in third} == {
        training.name for training in second
    } == {training.name for training in first} - {"eagle-late"}
    short = plans.load_plan(Path(PAPER), {}, short=True)
    assert [folder.name for name in short.evaluations for folder in short.evaluated(name)] == list(
        short.evaluations
    )


def test_an_evaluation_of_other_drafts_or_settings_is_refused(evaluations, evaluated):
    plan, folder = evaluated
    evaluation = plan.evaluations[folder.name]
    with pytest.raises(
        UserError,
        match=r"dynamic-append/config.yaml: made with other settings of decode.nodes; delete",
    ):
        ask_first(
            replace(
                plan,
                evaluations={
                    folder.name: replace(evaluation, set={**evaluation.set, "decode.nodes": 5})
                },
            ),
            folder,
        )
    (plan.folder / "late-0" / "draft" / "config.json").write_text('{"sha256": "b"}')
    with pytest.raises(
        UserError,
        match="dynamic-append: its drafts were trained again since they were measured; delete it",
    ):
        ask_first(plan, folder)
    assert len(evaluations) == 1


def test_a_training_loads_the_target_once(tmp_path, monkeypatch):
    """One load serves all trainings and measurements."""
    plan = replace(plans.load_plan(Path(PAPER), {}, short=False), folder=tmp_path)
    seen = []
    monkeypatch.setattr(runner, "training_target", lambda config: seen.append("load") or "target")
    monkeypatch.setattr(
        runner,
        "train_draft",
        lambda config, target: seen.append((config.train.early.steps, target)),
    )
    monkeypatch.setattr(
        runner, "accepted", lambda config, target: seen.append(target) or {"tokens": [1]}
    )
    for _ in range(2):
        runner.train_and_measure(plan, plans.Training("beagle", 0), shared=True)
    assert seen == ["load", (120, "target"), "target", (240, "target"), "target"]
    assert json.loads((tmp_path / "beagle-0" / "step-240.json").read_text()) == {
        "step": 240,
        "seed": 0,
        "tokens": [1],
        "training_tokens_per_second": [],
    }


@pytest.mark.slow
@pytest.mark.timeout(
    900
)  # twenty-one trainings and all that is measured: minutes alone, and more beside other work
def test_everything_at_toy_size(tmp_path, capsys, monkeypatch):
    """All runs and figures. A second call trains nothing.

    A run that cannot be made is named and delays nothing else.
    """
    from command_cases import make_target, write_lines

    make_target(tmp_path / "target")
    questions = write_lines(
        tmp_path / "prompts.jsonl", [f"What is {number}?" for number in range(60)]
    )
    tree = yaml.safe_load(Path(PAPER).read_text()) | {"folder": str(tmp_path / "runs" / "paper")}
    tree["runs"]["window-5"]["set"] = {"train.early.window": 0}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    ask = [
        str(tmp_path / "paper.yaml"),
        "--short",
        f"target.source={tmp_path / 'target'}",
        "draft.hot_tokens=200",
        f"data.folder={tmp_path / 'data'}",
        f"data.source={questions}",
        "data.max_answer_tokens=12",
        "data.batch=64",
        f"eval.suites=[{questions}]",
        "train.row_tokens=64",
    ]
    assert run_main(runner.main, ask) == 1
    assert "error: 1 could not be made" in capsys.readouterr().err
    folder = tmp_path / "runs" / "paper-short"
    made = {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}
    assert set(made) == set(tree["figures"])
    for name, figure in made.items():
        assert set(figure["runs"]) | set(figure["not_run"]) == set(tree["figures"][name]["of"])
        assert figure["environment"]["jax"] and figure["base"]
        assert (folder / "results" / f"{name}.png").exists() == (
            tree["figures"][name]["kind"] != "table"
        )
    assert "train.early.window is 0" in made["fig4"]["not_run"]["window-5"]
    assert [point["step"] for point in made["fig6"]["runs"]["beagle"]["curve"]] == [1, 2]
    assert [point["step"] for point in made["fig3"]["runs"]["beagle-longer"]["curve"]] == [
        2,
        4,
        6,
        8,
    ]
    assert [point["step"] for point in made["fig5"]["runs"]["late"]["curve"]] == [5, 7]
    table = (folder / "results" / "claims.md").read_text()
    assert table.count("\n| fig") + table.count("\n| detach") + table.count("\n| table1") == len(
        tree["claims"]
    )
    assert "not run: window-5" in table and "| none | | 1.00 |" in table

    monkeypatch.setattr(runner, "train_draft", lambda *_: pytest.fail("it was there"))
    monkeypatch.setattr(runner, "evaluate", lambda *_: pytest.fail("it was there"))
    assert run_main(runner.main, ask) == 1 and run_main(runner.main, [*ask, "--draw"]) == 0
    assert (folder / "results" / "claims.md").read_text() == table


def test_results_name_no_figure_that_is_not_there():
    assert (
        results._reason("eagle", {"eagle-0": "no kind"}) == "no kind"
        and results._reason("systems.late", {"systems": "x"}) == "x"
    )
    assert (
        results._reason("late", {"eagle-0": "no kind"}) == "not run"
        and claims.HOLDS != claims.FAILS
    )


def test_the_guide_shows_the_table_as_it_was_written():
    written = (ROOT / "benchmarks" / "results" / "paper" / "claims.md").read_text()
    assert written in (ROOT / "docs" / "guide" / "reproduce.md").read_text()
    claimed = [line["says"] for line in yaml.safe_load(Path(PAPER).read_text())["claims"]]
    assert all(f"| {says} |" in written for says in claimed)

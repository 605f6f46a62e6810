"""Plans with several seeds: files that extend others, the pilot, and claims held to its file."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from experiment_cases import PAPER, ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import plan as plans
import power
import results
import run as runner
from claims import HOLDS, OPEN, SMALLER, judged

from beagle_jax.config import load_config
from beagle_jax.errors import UsageError, UserError, run_main

pytestmark = pytest.mark.usefixtures("at_the_root")
TINY = "experiments/tiny.yaml"


def load(path=TINY, **more) -> plans.Plan:
    return plans.load_plan(Path(path), more.pop("overrides", {}), **{"short": False, **more})


def test_the_tiny_plan_has_the_paper_s_claims_and_five_seeds():
    tiny, paper = load(), load(PAPER)
    assert [claim.says for claim in tiny.claims][:24] == [claim.says for claim in paper.claims]
    rules = [replace(claim, unless=None) for claim in paper.claims]
    assert list(tiny.claims)[:24] == rules and all(
        "not in the paper" in claim.says for claim in tiny.claims[24:]
    )
    assert all(run.seeds == (0, 1, 2, 3, 4) for run in tiny.runs.values())
    for name, run in paper.runs.items():
        assert (tiny.runs[name].steps, tiny.runs[name].set) == (3 * run.steps, run.set)
    assert not {seed for training in load(pilot=True).trainings() for seed in training[1:]} & {
        seed for training in tiny.trainings() for seed in training[1:]
    }


def test_every_run_of_the_tiny_plan_is_a_config(tmp_path):
    plan = load()
    for training in plan.trainings():
        if training.seed:
            continue
        steps = plan.runs[training.name].steps
        settings = plan.settings_of(training, steps) | {"draft.init": "normal"}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        config = load_config(tmp_path / "config.yaml")
        place = len(plan.before(training.name))
        assert (Path(config.data.folder).name, config.data.seed) == (f"data-{place}", place)
        test_time = training.name.startswith("eagle3") or training.name == "eagle-late"
        assert config.train.late.objective == ("test_time" if test_time else "late")


def fresh_text_is_never_read_twice() -> None:
    """No two runs of one draft read the same folder of text."""
    plan = load()
    for training in plan.trainings():
        chain = [training]
        while plan.runs[chain[-1].name].after:
            chain.append(plan.above(chain[-1]))
        folders = [plan.settings_of(each, 1).get("data.folder") for each in chain]
        assert len(set(folders)) == len(folders) and None not in folders


def test_a_run_that_goes_on_reads_another_text():
    fresh_text_is_never_read_twice()
    with pytest.raises(UsageError, match=r"runs.beagle reads 720 batches .* no second pass"):
        load(overrides={"data.answer_tokens": 100_000})


def test_planted_bug_one_text_for_all_runs(monkeypatch):
    settings_of = plans.Plan.settings_of

    def same_text(plan, training, steps):
        return settings_of(plan, training, steps) | {"data.folder": "runs/tiny/data"}

    monkeypatch.setattr(plans.Plan, "settings_of", same_text)
    with pytest.raises(AssertionError):
        fresh_text_is_never_read_twice()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extends": "x.yaml"}, "x.yaml: extends itself"),
        ({"extends": "none.yaml"}, "none.yaml: not a file of experiments"),
        ({"seed": [1]}, "x.yaml: unknown key 'seed'; expected one of extends"),
        ({"pilot": [1, 2]}, r"pilot is \[1, 2\]; expected two seeds or more that are not among"),
        ({"pilot": [7]}, r"pilot is \[7\]; expected two seeds or more"),
        ({"interval": "z"}, "interval is 'z'; expected bootstrap or t"),
        ({"beside": {"name": "x"}}, "beside: .*name"),
        (
            {
                "claims": [
                    {
                        "figure": "fig4",
                        "says": "x",
                        "measure": "alpha_3",
                        "more": "base",
                        "less": "late",
                    }
                ]
            },
            r"claims\[27\].effect: effects names 'alpha_3', which is not there",
        ),
    ],
)
def test_a_wrong_extension_is_refused(change, message, tmp_path, monkeypatch):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"extends": TINY, "seeds": [0, 1]} | change))
    if change.get("extends") == "x.yaml":
        path = Path("x.yaml")
        monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        load(path)


def test_a_pilot_needs_its_seeds():
    with pytest.raises(UsageError, match="--pilot needs the keys pilot"):
        load(PAPER, pilot=True)


def small(tmp_path: Path) -> plans.Plan:
    """A plan of two runs and three claims, with measurements by hand."""
    claim = {"figure": "f", "more": "a", "less": ("b",)}
    return plans.Plan(
        base={},
        folder=tmp_path / "runs",
        results=tmp_path / "results",
        runs={name: plans.Run(stage="early", steps=9, seeds=(0, 1, 2, 3, 4)) for name in "ab"},
        evaluations={},
        figures={"f": plans.Figure(title="F", kind="depth", of=("a", "b"))},
        claims=[
            plans.Claim(says="a is better", **claim),
            plans.Claim(says="they are alike", alike=0.2, **claim),
            plans.Claim(says="a trains faster", measure="training_speed", **claim),
        ],
        title="tiny",
        pilot=(10, 11, 12),
        interval="t",
        registered=tmp_path / "power.json",
        effects={"tau": 0.1, "training_speed": 0.05},
    )


def measurements(seeds, gap: float) -> dict:
    """Two runs, the first better by `gap`; no speeds."""
    rng, made = np.random.default_rng(4), {"a": {}, "b": {}}
    for seed in seeds:
        for name, more in (("a", gap), ("b", 0.0)):
            tau_N = 1.5 + more + rng.normal(0, 0.02) + rng.normal(0, 0.05, 12)
            made[name][seed] = [
                {
                    "step": 9,
                    "tokens": (30 * tau_N).tolist(),
                    "rounds": [30] * 12,
                    "accepted": [[10, 20]] * 12,
                    "training_tokens_per_second": [],
                }
            ]
    return made


def test_what_the_seeds_can_show_is_written_before_the_runs(tmp_path):
    plan = small(tmp_path)
    lines = power.register(plan, measurements(plan.pilot, 0.5), plan.registered)
    better, alike, untimed = lines
    assert 0 < better["shows"] < alike["shows"] and better["seeds"] == 5
    assert 1 < better["seeds_needed"] <= 5 and alike["effect"] == 0.2
    assert untimed["shows"] is None and "difference" not in better
    shows = power.registered(plan)
    assert shows == {**{line["says"]: line["shows"] for line in lines[:2]}, "a trains faster": 0.0}
    assert "| a trains faster | training_speed | 0.050 | 5 | not measured | none |" in (
        power.power_table(lines)
    )
    (plan.folder / "a-0").mkdir(parents=True)
    (plan.folder / "a-0" / "step-9.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-9.json: a run of the plan has been made"):
        power.register(plan, measurements(plan.pilot, 0.5), plan.registered)


def test_claims_are_held_to_what_was_registered(tmp_path):
    plan = small(tmp_path)
    with pytest.raises(UserError, match=r"power.json: not there; make it with --pilot"):
        power.registered(plan)
    power.register(plan, measurements(plan.pilot, 0.1), plan.registered)
    lower = [replace(plan.claims[0], at_least=-0.1), *plan.claims[1:]]
    with pytest.raises(UserError, match="'a is better' was registered with another at_least"):
        power.registered(replace(plan, claims=lower))
    more = {name: replace(run, seeds=tuple(range(9))) for name, run in plan.runs.items()}
    with pytest.raises(UserError, match="registered with another seeds"):
        power.registered(replace(plan, runs=more))
    assert power.registered(replace(plan, registered=None)) == {}


def open_claims_say_how_small(tmp_path) -> None:
    """A difference that cannot be decided is smaller than was registered, or than the runs'."""
    claim, runs = small(tmp_path).claims[0], measurements(range(5), 0.0)
    line = judged(claim, runs, "t")
    assert line["verdict"] == OPEN and abs(line["difference"][0]) < line["seen"]
    assert judged(claim, runs, "t", registered=0.5)["seen"] == 0.5
    assert judged(claim, runs, "t", registered=1e-6)["seen"] == line["seen"]
    assert results.said(line) == f"{SMALLER} ({line['seen']:.3f})"
    sure = judged(claim, measurements(range(5), 0.5), "t")
    assert sure["verdict"] == HOLDS == results.said(sure)
    late = judged(replace(claim, unless="too short"), runs, "t")
    assert results.said(late) == OPEN and "seen" not in late


def test_one_speed_of_training_a_side_decides_nothing(tmp_path):
    """Log records are no prompts: each seed counts once, and of a single one nothing is known."""
    claim, made = small(tmp_path).claims[2], measurements(range(3), 0.0)
    for name, speeds in (("a", [9.0, 9.1, 9.2]), ("b", [5.0, 5.1])):
        for seed, [point] in made[name].items():
            point["training_tokens_per_second"] = [speed + seed / 10 for speed in speeds]
    assert judged(claim, made, "t")["verdict"] == HOLDS
    first = {name: {0: run[0]} for name, run in made.items()}
    line = judged(claim, first, "t")
    assert (line["verdict"], line["here"]) == (OPEN, "one number a side, whose spread is unknown")


def test_an_open_claim_says_how_small(tmp_path):
    open_claims_say_how_small(tmp_path)


def test_planted_bug_the_size_of_the_pilot_alone(tmp_path, monkeypatch):
    """Runs that spread more than the pilot would then seem to have shown more than they did."""
    right = judged
    monkeypatch.setitem(
        globals(),
        "judged",
        lambda *arguments, registered=0.0: (
            right(*arguments) | ({"seen": registered} if registered else {})
        ),
    )
    with pytest.raises(AssertionError):
        open_claims_say_how_small(tmp_path)


def test_the_table_has_a_column_for_each_target(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    line = {"figure": "f", "measure": "tau", "here": "tau 1.2 against 1.1", "verdict": OPEN}
    made = [
        line | {"says": "a is better", "difference": [0.1, -0.1, 0.3]},
        line | {"says": "they are alike", "verdict": HOLDS, "difference": [0.1, 0.0, 0.2]},
    ]
    (other / "f.json").write_text(json.dumps({"claims": made}))
    plan = replace(small(tmp_path), beside=plans.Beside(title="large", results=str(other)))
    for training in plan.trainings():
        folder = plan.folder_of(training)
        folder.mkdir(parents=True)
        points = measurements(range(5), 0.3)[training.name][training.seed]
        (folder / "step-9.json").write_text(json.dumps(points[0]))
    text = results.write_results(plan, {}, shows={"a is better": 0.05})
    rows = text.splitlines()
    assert rows[0] == "| figure | the paper | tiny | verdict | large | verdict |"
    assert rows[2].startswith("| f | a is better | tau 1.")
    assert rows[2].endswith(f"| holds | tau 1.2 against 1.1 | {SMALLER} (0.286) |")
    assert rows[3].endswith("| does not hold | tau 1.2 against 1.1 | holds |")
    assert rows[4].endswith(
        "| nothing that both have | not decidable here | not run | not decidable here |"
    )
    assert f"Of 3 claims: 1 holds, 1 does not hold, 0 {SMALLER}, 1 {OPEN}." in text


def test_the_runner_pilots_and_then_holds_to_it(tmp_path, monkeypatch, capsys):
    """--pilot trains its own seeds and writes the file; the plan is refused without it."""
    path = tmp_path / "x.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "extends": TINY,
                "folder": str(tmp_path / "runs"),
                "results": str(tmp_path / "results"),
                "registered": str(tmp_path / "power.json"),
            }
        )
    )
    trained = []
    monkeypatch.setattr(
        runner, "run_all", lambda plan, shared: trained.extend(plan.trainings()) or {}
    )
    monkeypatch.setattr(
        runner, "measured", lambda plan: dict.fromkeys(plan.runs, measurements([10, 11], 0)["a"])
    )
    assert run_main(runner.main, [str(path)]) == 1 and not trained
    assert "power.json: not there; make it with --pilot" in capsys.readouterr().err
    assert run_main(runner.main, [str(path), "--pilot", "--only", "fig4"]) == 2
    assert run_main(runner.main, [str(path), "--pilot"]) == 0
    assert {training.seed for training in trained} == {10, 11, 12}
    assert "| a window of 3 is best | tau |" in capsys.readouterr().out
    assert run_main(runner.main, [str(path)]) == 0
    assert {training.seed for training in trained} == {10, 11, 12, 0, 1, 2, 3, 4}

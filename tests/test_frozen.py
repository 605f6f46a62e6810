"""What version 0.1.0 left on disk (tests/frozen/0.1.0) still loads.

tests/frozen/make.py wrote it. Numbers are compared with those that version 0.1.0 computed from the
same files.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command_cases import COMMANDS, ended
from safetensors.numpy import load_file, save_file
from test_report import check_schema

from beagle_jax.commands import train as train_command
from beagle_jax.config import load_config
from beagle_jax.data.folder import read_parts
from beagle_jax.decoding import tuning
from beagle_jax.errors import UserError, run_main
from beagle_jax.evaluation.answers import AnswerLog
from beagle_jax.evaluation.pages import markdown
from beagle_jax.evaluation.report import Report
from beagle_jax.training import step
from beagle_jax.weights.draft import load_draft, save_draft
from beagle_jax.weights.target import load_target

ROOT = Path(__file__).resolve().parent.parent
FROZEN = ROOT / "tests" / "frozen" / "0.1.0"
EXPECTED = json.loads((FROZEN / "expected.json").read_text())
VALUES = json.loads((FROZEN / "configs" / "values.json").read_text())
PROMPT = "What is 3?"
MACHINE = "cpu of no name, jax 0.10"  # what the tree was tuned on
HOT = "draft.path=drafts/beagle_hot"

# Settings of 0.1.0 that have another name now; None: there is nothing to set any more.
MOVED: dict[str, str | None] = {
    # one value or no use in the early stage
    "train.early.simulation_steps": None,
    "train.early.step_weights": None,
    "train.early.detach": None,
    "train.early.dense": None,
    "train.early.multi_token": None,
}
# Values then and now, where the same config means something else on purpose: EAGLE's depth, and a
# default that named a folder which users do not have.
ON_PURPOSE = {
    "decode.levels": (4, 5),
    "eval.folder": ("../shared/data/eval", None),
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A copy to work in; paths in the files are relative to it."""
    shutil.copytree(FROZEN, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def unpacked(place: Path, name: str) -> Path:
    shutil.unpack_archive(place / f"{name}.zip", place / name)
    return place / name


def run(command: str, *argv: str) -> int:
    return run_main(COMMANDS[command], ["--config", "run.yaml", "--quiet", *argv])


def figures(command: str, *argv: str) -> dict[str, Any]:
    """Returns what a command writes with --json."""
    assert run(command, "--json", "figures.json", *argv) == 0
    return json.loads(Path("figures.json").read_text())


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Returns content and modification time of each file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Configs


def dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns values by dotted key, as in JSON."""
    flat = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        flat |= dotted(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return json.loads(json.dumps(flat))


def resolved(path: Path, *overrides: str) -> dict[str, Any]:
    """Returns every setting of a config by its dotted key, whichever section has it."""
    config = load_config(path, overrides)
    now = dotted(config.model_dump())
    now["train.late.dense"] = now.pop("train.late.objective") == "test_time"
    return now


def changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns old settings that now have another value, or none."""
    names = {key: MOVED.get(key, key) for key in then}
    return [
        key
        for key, name in names.items()
        if name is not None and (name not in now or now[name] != then[key])
    ]


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_config_loads_with_the_values_that_it_had(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # one begins with the draft in the box
    now = resolved(FROZEN / "configs" / f"{name}.yaml")
    then = dotted(VALUES[name])
    assert [key for key in changed(then, now) if ON_PURPOSE.get(key) != (then[key], now[key])] == []


def test_every_frozen_config_is_among_them():
    assert {path.stem for path in (FROZEN / "configs").glob("*.yaml")} == VALUES.keys()
    assert not MOVED.keys() - dotted(VALUES["every"]).keys()


def test_planted_bugs_in_a_config_are_seen(monkeypatch):
    monkeypatch.chdir(ROOT)
    then, path = dotted(VALUES["quickstart"]), FROZEN / "configs" / "quickstart.yaml"
    del then["eval.folder"]
    now = resolved(path, "decode.ngram=4", "train.late.detach=false")  # other defaults
    assert changed(then, now) == ["train.late.detach", "decode.ngram"]
    del now["data.seed"]
    assert "data.seed" in changed(then, now)


# Drafts


def answered(*argv: str) -> dict[str, Any]:
    """Returns text, tokens and rounds of the prompt; one character is one token."""
    made = figures("generate", PROMPT, *argv)
    assert made["equal"], "the text is not that of plain decoding"
    return {key: made[key] for key in ("text", "tokens", "rounds")}


@pytest.mark.parametrize("name", EXPECTED["drafts"])
def test_a_draft_decodes_the_same_tokens_in_as_many_rounds(place, name):
    assert answered(f"draft.path=drafts/{name}") == EXPECTED["drafts"][name]


def test_planted_bug_matrices_read_the_wrong_way_round(place):
    """Only the rounds depend on the draft: with any draft the text is the target's."""
    target = load_target("target", "float32", "cache")
    draft = load_draft("drafts/beagle_hot", target.spec)
    turned = {name: draft.params[name].T for name in ("q_proj", "o_proj")}
    save_draft("drafts/other", replace(draft, params={**draft.params, **turned}))
    answer, right = answered("draft.path=drafts/other"), EXPECTED["drafts"]["beagle_hot"]
    assert answer["text"] == right["text"] and answer["rounds"] > right["rounds"]


@pytest.mark.parametrize("name", EXPECTED["drafts"])
def test_a_changed_number_of_a_draft_is_seen(place, name):
    path = place / "drafts" / name / "model.safetensors"
    tensors = load_file(path)
    tensors["self_attn.q_proj.weight"][1, 2] += 1e-3
    save_file(tensors, path)
    target = load_target("target", "float32", "cache")
    with pytest.raises(UserError, match=r"sha256 .* a file is damaged or belongs to another draft"):
        load_draft(f"drafts/{name}", target.spec)


def test_an_exported_draft_comes_back_as_it_was(place, capsys):
    folder = unpacked(place, "exported")
    assert run("convert", "from-torch", "--source", "exported", "--out", "back") == 0
    was, back = (load_file(Path(x) / "model.safetensors") for x in ("drafts/beagle_hot", "back"))
    assert was.keys() == back.keys()
    for name, array in was.items():
        np.testing.assert_array_equal(back[name], array)
    exported = load_file(folder / "model.safetensors")
    next(array for array in exported.values() if array.ndim == 2)[0, 0] += 1e-3
    save_file(exported, folder / "model.safetensors")
    argv = ("--config", "run.yaml", "from-torch", "--source", "exported", "--out", "bad")
    status, message = ended(capsys, "convert", *argv)
    assert status == 1 and "sha256" in message


# The training text


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("data", []),
        ("data_int8", ["data.folder=data_int8", "data.states_dtype=int8"]),
    ],
)
def test_a_text_folder_is_read_and_nothing_of_it_written(place, name, more):
    before = files_of(place / name)
    assert figures("prepare", *more) == EXPECTED["rows"][name]
    assert files_of(place / name) == before
    lines = map(json.loads, (place / name / "part-0000.jsonl").read_text().splitlines())
    [rows] = read_parts(place / name).values()
    assert [(row.tokens, row.supervised) for row in rows] == [
        (line["tokens"], list(map(bool, line["supervised"]))) for line in lines
    ]


def test_planted_bug_a_changed_token_has_other_states(place):
    path = place / "data" / "part-0000.jsonl"
    head, _, rest = path.read_text().partition(", ")
    path.write_text(f"{head}, 7, {rest.partition(', ')[2]}")
    before = files_of(place / "data")
    assert run("prepare") == 0
    assert files_of(place / "data") != before


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["data.seed=1"], "text written with other settings (seed 0 there, 1 now)"),
        (["data.max_answer_tokens=20"], "(max_answer_tokens 16 there, 20 now)"),
    ],
)
def test_a_text_folder_of_other_settings_is_refused(place, capsys, more, reason):
    status, message = ended(capsys, "prepare", "--config", "run.yaml", *more)
    assert status == 1 and reason in message
    assert "delete it or set another data.folder" in message


# Runs that were interrupted

# One unit of the last digit in the log; sums in another order change float32 by up to 1e-5 of it.
DIGITS = {"loss": 1e-5, "ploss": 1e-5, "vloss": 1e-6, "grad_norm": 1e-4}


def last_lines(folder: Path) -> list[dict]:
    """Returns the last log record of each stage, step and split."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    last = {(line["stage"], line["step"], line.get("split")): line for line in lines}
    return list(last.values())


def differing(then: list[dict], now: list[dict]) -> list[tuple[str, int, str]]:
    """Returns stage, step and name of the figures that differ from the expected ones."""

    def where(line):
        return (line["stage"], line["step"], line.get("split"))

    assert list(map(where, then)) == list(map(where, now))

    def same(key, a, b):
        return a == (pytest.approx(b, rel=1e-5, abs=DIGITS[key]) if key in DIGITS else b)

    return [
        (line["stage"], line["step"], key)
        for line, after in zip(then, now, strict=True)
        for key, value in line.items()
        if not same(key, after[key], value)
    ]


@pytest.fixture
def as_0_1_0(monkeypatch) -> None:
    """Rates and batches of version 0.1.0, whose numbers are compared.

    There the first update had a rate of zero, and the late stage began at the first batch again.
    """

    def rates(stage):
        def rate(before, batches=1):
            return stage.learning_rate * jnp.minimum(1.0, before / max(stage.warmup, 1))

        assert stage.schedule == "constant"
        return rate

    monkeypatch.setattr(step, "learning_rates", rates)
    monkeypatch.setattr(train_command, "steps_done", lambda name, config: 0)


def gone_on(place: Path, name: str) -> tuple[list[dict], dict]:
    """Returns log and best taus after an interrupted run was continued to its end."""
    more = ["train.noise_shortest=1", *EXPECTED["runs"][name]["overrides"]]
    assert run("train", f"train.folder={name}", *more) == 0
    return last_lines(place / name), json.loads((place / name / "best.json").read_text())["stages"]


@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_an_interrupted_run_goes_on_to_the_same_losses(place, name, as_0_1_0):
    folder, expected = unpacked(place, name), EXPECTED["runs"][name]
    stage = name.partition("_")[2]
    saved = {path.parent.name: path.name for path in folder.glob("checkpoints/*/3")}
    assert saved == {"early": "3"} | {stage: "3"}
    log, best = gone_on(place, name)
    assert differing(expected["log"], log) == [] and best == expected["best"]


def test_planted_bugs_in_what_a_run_goes_on_from(place, as_0_1_0):
    """The optimizer's moments are lost, or the best tau of the stage before."""
    folder = unpacked(place, "adamw_late")
    checkpoint = folder / "checkpoints" / "late" / "3"
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(checkpoint / "state")
        forgotten = jax.tree.map(lambda x: x * 0 if x.ndim else x, state["opt_state"])
        checkpointer.save(checkpoint / "state", {**state, "opt_state": forgotten}, force=True)
    (checkpoint / "sizes.json").unlink()
    (folder / "best.json").unlink()
    log, best = gone_on(place, "adamw_late")
    expected = EXPECTED["runs"]["adamw_late"]
    assert ("late", 6, "loss") in differing(expected["log"], log)
    assert "early" in expected["best"] and "early" not in best


def test_a_run_whose_noise_had_no_limit_is_refused_by_name(place, capsys):
    """Its settings do not name the limit, which did not exist; today's default is another."""
    unpacked(place, "adamw_early")
    argv = ["train.folder=adamw_early", *EXPECTED["runs"]["adamw_early"]["overrides"]]
    status, message = ended(capsys, "train", "--config", "run.yaml", *argv)
    assert status == 1 and "train.noise_shortest: 1 there, 128 now" in message


def test_a_run_of_other_settings_is_refused(place, capsys):
    unpacked(place, "adamw_early")
    argv = ["train.folder=adamw_early", *EXPECTED["runs"]["adamw_early"]["overrides"]]
    status, message = ended(capsys, "train", "--config", "run.yaml", *argv, "train.beta2=0.9")
    assert status == 1 and "train.beta2: 0.95 there, 0.9 now" in message


# What evaluate, tune and convert to-jax wrote


def test_a_report_and_its_answers_are_read(place):
    report = json.loads((place / "evaluation" / "report.json").read_text())
    check_schema(report)
    loaded = Report.read(place / "evaluation" / "report.json")
    # Fields that version 0.1.0 did not have hold nothing.
    later = {"interrupted": False, "throughput": []}
    systems = [system | {"best_speedup": None} for system in report["systems"]]
    assert loaded.as_json() == report | later | {"systems": systems}
    assert markdown(loaded) == (place / "evaluation" / "report.md").read_text()
    settings = json.loads((place / "evaluation" / "answers.jsonl").read_text().splitlines()[0])
    cases = AnswerLog(place / "evaluation" / "answers.jsonl", settings).cases
    assert list(cases) == [("eval.jsonl", 0), ("eval.jsonl", 1)]
    for case in cases.values():
        plain, draft = (turn.answer for turn in case.turns[0].values())
        assert plain.tokens == draft.tokens and draft.rounds < plain.rounds
    [answer, _] = cases["eval.jsonl", 1].turns[0].values()
    assert EXPECTED["drafts"]["beagle_hot"]["text"].startswith(answer.answer.text)
    del report["suites"][0]["groups"]
    with pytest.raises(Exception, match="'groups' is a required property"):
        check_schema(report)


def test_answers_from_another_machine_are_refused_with_what_to_do(place, capsys):
    argv = ["--config", "run.yaml", "--out", "evaluation", HOT]
    status, message = ended(capsys, "evaluate", *argv)
    assert status == 1 and f"environment.machine {MACHINE!r} there" in message
    assert "give another --out, or remove the file to start again" in message


def test_a_tuned_tree_is_found_for_its_machine_alone(place, monkeypatch, capsys, caplog):
    caplog.set_level("INFO")
    argv = [HOT, "decode.tree=auto", "eval.every=0"]
    untuned = answered(*argv)
    assert "no tree was tuned for this draft on this machine" in caplog.text
    monkeypatch.setattr(tuning, "machine", lambda: MACHINE)
    answer = answered(*argv)
    assert answer == {key: EXPECTED["tuned"][key] for key in answer} != untuned
    assert answer["rounds"] < EXPECTED["drafts"]["beagle_hot"]["rounds"], "the tree was not used"
    [path] = (place / "cache" / "tuned").iterdir()
    path.write_text(path.read_text().replace("topk", "topks"))
    status, message = ended(capsys, "generate", "--config", "run.yaml", PROMPT, *argv)
    assert status == 1 and "not a tuned tree" in message and "beagle_jax.tune" in message


def test_a_target_in_orbax_s_form_is_bit_equal(place):
    folder = unpacked(place, "target_orbax")
    was, now = (load_target(name, "float32", "cache") for name in ("target", "target_orbax"))
    assert (was.spec, was.eos_ids) == (now.spec, now.eos_ids)
    assert was.tokenizer.get_vocab() == now.tokenizer.get_vocab()
    assert was.tokenizer.chat_template == now.tokenizer.chat_template
    assert jax.tree.structure(was.params) == jax.tree.structure(now.params)
    for mine, theirs in zip(jax.tree.leaves(was.params), jax.tree.leaves(now.params), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    settings = json.loads((folder / "target.json").read_text())
    name = next(iter(settings["crc32"]))
    settings["crc32"][name] = "00000000"
    (folder / "target.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"changed since they were written.*convert to-jax"):
        load_target("target_orbax", "float32", "cache")

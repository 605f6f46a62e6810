"""`launch/make_it_yours.sh`: which prompts are learnt and which are held out, and both commands."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from beagle_jax.config import load_config

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "launch/make_it_yours.sh"


@pytest.fixture
def clone(tmp_path):
    """A clone with an installed environment whose Python records its calls."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    programs = {
        folder
        / ".venv/bin/python": 'echo "${JAX_PROCESS_ID:-} of ${JAX_NUM_PROCESSES:-}: $*" >> calls',
        tmp_path / "bin/taskset": 'shift 2; exec "$@"',
        tmp_path / "bin/nproc": "echo 2",
    }
    for path, text in programs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    stamp = "cat requirements.txt pyproject.toml | cksum > .venv/installed"
    subprocess.run(stamp, shell=True, cwd=folder, check=True)
    return folder


def called(clone: Path, count: int) -> subprocess.CompletedProcess:
    """Calls the script from another folder, on so many prompts with empty lines between them."""
    lines = [json.dumps({"prompt": f"What is {number}?"}) for number in range(count)]
    (clone.parent / "mine.jsonl").write_text("\n\n".join(lines))
    arguments = ["bash", f"clone/{SCRIPT}", "mine.jsonl", "train.seed=1"]
    env = {**os.environ, "PATH": f"{clone.parent / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(arguments, capture_output=True, text=True, cwd=clone.parent, env=env)


def held_out_prompts_are_not_learnt(clone: Path) -> None:
    assert called(clone, 90).returncode == 0
    prompts, held_out = (
        (clone / "runs" / "make_it_yours" / f"{name}.jsonl").read_text().splitlines()
        for name in ("prompts", "held_out")
    )
    assert len(prompts) == 70 and len(held_out) == 20 and not {*prompts} & {*held_out}
    assert json.loads(held_out[-1]) == {"prompt": "What is 89?"}


def test_the_last_prompts_are_held_out(clone):
    held_out_prompts_are_not_learnt(clone)
    *writers, train, evaluate = (clone / "calls").read_text().splitlines()
    folder = "runs/make_it_yours"
    settings = f"data.source={folder}/prompts.jsonl train.seed=1"
    # Each of the two writes a half of the text.
    assert sorted(writers) == [
        f"{index} of 2: -m beagle_jax.prepare --config configs/make_it_yours.yaml {settings}"
        for index in range(2)
    ]
    assert train == f" of : -m beagle_jax.train --config configs/make_it_yours.yaml {settings}"
    assert evaluate == (
        " of : -m beagle_jax.evaluate --config configs/make_it_yours.yaml "
        f"eval.suites=[{folder}/held_out.jsonl] train.seed=1"
    )


def test_planted_bug_all_prompts_are_learnt(clone):
    script = clone / SCRIPT
    script.write_text(script.read_text().replace("++n <= last'", "++n'"))
    with pytest.raises(AssertionError):
        held_out_prompts_are_not_learnt(clone)


def test_a_writer_that_fails_ends_the_run(clone):
    python = clone / ".venv/bin/python"
    for index in range(2):
        python.write_text(f'#!/usr/bin/env bash\n[ "$JAX_PROCESS_ID" != {index} ] || exit 3\n')
        assert called(clone, 90).returncode == 3


def test_too_few_prompts_are_refused(clone):
    done = called(clone, 59)
    assert done.returncode == 2 and "has 59 prompts; expected 60 or more" in done.stderr
    assert not (clone / "calls").exists()


@pytest.mark.slow
def test_a_draft_goes_on_at_toy_size(tmp_path, monkeypatch, capsys):
    """The table has plain decoding, the draft that went on, and the one that it began with."""
    from command_cases import COMMANDS, QUESTIONS, make_workplace, write_lines

    from beagle_jax.errors import run_main

    place = make_workplace(tmp_path)
    assert run_main(COMMANDS["train"], ["--config", str(place.config), "train.early.steps=0"]) == 0
    box, more = tmp_path / "run" / "draft", [f"What was {number}?" for number in range(30)]
    monkeypatch.chdir(ROOT)
    ask = [
        *("--config", "configs/make_it_yours.yaml", f"target.source={tmp_path / 'target'}"),
        *(f"draft.init={box}", "draft.hot_tokens=200", f"eval.compare=[{box}]"),
        *(f"data.folder={tmp_path / 'yours'}", f"train.folder={tmp_path / 'mine'}"),
        *("data.max_answer_tokens=12", "data.batch=16", "train.row_tokens=48", "log.eval_rows=8"),
        *("train.late.steps=2", "train.late.warmup=1", "eval.max_new_tokens=8", "eval.limit=2"),
    ]
    prompts = write_lines(tmp_path / "yours.jsonl", more)
    held_out = write_lines(tmp_path / "held.jsonl", QUESTIONS)
    assert run_main(COMMANDS["train"], [*ask, f"data.source={prompts}"]) == 0
    capsys.readouterr()
    assert run_main(COMMANDS["evaluate"], [*ask, f"eval.suites=[{held_out}]"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" 2/2")]
    assert [row.split()[0] for row in rows] == ["plain", f"{tmp_path}/mine/draft", str(box)]


def test_the_box_goes_on(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/make_it_yours.yaml")
    assert config.draft.init == config.eval.compare[0] == "drafts/smollm2-135m"
    assert (config.train.early.steps, config.data.answers) == (0, "regenerate")

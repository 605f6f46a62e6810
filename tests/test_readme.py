"""Runs every command of the README on a tiny target, with few steps."""

import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from command_cases import EVAL_QUESTIONS, QUESTIONS, make_target, write_lines
from test_docs import commands
from tuning_cases import shrink

from beagle_jax.errors import run_main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = list(dict.fromkeys(commands(README)))
PYTHON_M = [
    line for line in LINES if line.startswith("python -m beagle_jax.") and "--config" in line
]
# Those that need what is not here are dry-run (tests/test_docs.py): GPUs, SLURM, gcloud, kubectl.
ELSEWHERE = (
    "bash launch/gpu.sh",
    "bash launch/one_gpu.sh",
    "bash launch/tpu_pod.sh",
    "sbatch",
    "kubectl",
)
SCRIPTS = [
    line
    for line in LINES
    if line.startswith("bash launch/") and "configs/" not in line and not line.startswith(ELSEWHERE)
]
SNIPPET = re.search(r"^```python\n(.*?)^```", README, re.S | re.M).group(1)
SMALL_PLAN = ["train.batch=8", "train.row_tokens=16", "train.loss_rows=16", "train.late.steps=0"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict[str, str]:
    """Overrides that replace the settings of a real run."""
    folder = tmp_path_factory.mktemp("readme")
    make_target(folder / "target")
    return {
        "target.source": str(folder / "target"),
        "target.cache_dir": str(folder),
        "train.folder": str(folder / "run"),
        "data.source": write_lines(folder / "prompts.jsonl", QUESTIONS),
        "data.folder": str(folder / "data"),
        "data.answer_tokens": "200",
        "data.max_answer_tokens": "12",
        "data.batch": "16",
        "draft.init": "normal",
        "draft.hot_tokens": "200",
        "draft.path": "null",
        "train.batch": "8",
        "train.row_tokens": "48",
        "train.early.steps": "2",
        "train.late.steps": "2",
        "log.eval_rows": "0",
        "eval.suites": f"[{write_lines(folder / 'eval.jsonl', EVAL_QUESTIONS)}]",
        "eval.compare": "[]",
        "eval.max_new_tokens": "8",
        "decode.max_new_tokens": "8",
    }


def overrides(toy: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in toy.items()]


def ran(line: str, toy: dict[str, str], folder: Path, monkeypatch, *more: str) -> tuple[int, str]:
    """Runs a README line in its toy form with more options; returns status and stdout."""
    _, _, module, *arguments = [*shlex.split(line), *more]
    name = module.removeprefix("beagle_jax.")
    if name == "plan":  # in a process of its own: the number of devices is decided once
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments, *SMALL_PLAN],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
        )
        return done.returncode, done.stdout
    if name == "tune":
        shrink(monkeypatch, nodes=(4,), levels=range(1, 3), topks=(2,), text=128)
        arguments += ["--prompts", "2"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\n"))
    arguments = [str(folder / "exported") if word == "exported" else word for word in arguments]
    monkeypatch.chdir(ROOT)
    with redirect_stdout(io.StringIO()) as printed:
        status = run_main(importlib.import_module(module).main, [*arguments, *overrides(toy)])
    return status, printed.getvalue()


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory) -> dict[str, str]:
    """The result of the README's own training command."""
    [train] = [line for line in PYTHON_M if line.startswith("python -m beagle_jax.train")]
    with pytest.MonkeyPatch.context() as patch:
        status, printed = ran(train, toy, tmp_path_factory.mktemp("train"), patch)
    draft = f"{toy['train.folder']}/draft"
    written, try_it = printed.splitlines()
    assert (status, written) == (0, f"draft written to {draft}; try:")
    assert (
        try_it == '  python -m beagle_jax.generate --config quickstart "your prompt" '
        f"draft.path={draft}"
    )
    with pytest.MonkeyPatch.context() as patch:
        assert ran(try_it, toy, tmp_path_factory.mktemp("try"), patch)[0] == 0
    return toy


SHOWS = {
    "generate": "token sequences equal: yes",
    "evaluate": "identical to plain decoding",
    "tune": "saved for decode.tree=auto in",
    "convert": "exported",
    "plan": "early: compiles",
    "train": "draft written to",
}


@pytest.mark.parametrize("line", PYTHON_M)
def test_a_command_runs(line, trained, tmp_path, monkeypatch):
    """Figures are where --json says; a chat has none."""
    figures = tmp_path / "figures.json"
    status, printed = ran(
        line,
        trained,
        tmp_path,
        monkeypatch,
        *([] if "--chat" in line else ["--json", str(figures)]),
    )
    shown = (
        "tok/s, tau"
        if "--chat" in line
        else SHOWS[shlex.split(line)[2].removeprefix("beagle_jax.")]
    )
    assert status == 0 and shown in printed
    assert "--chat" in line or json.loads(figures.read_text())


def test_a_command_that_does_not_work_is_seen(trained, tmp_path, monkeypatch, capsys):
    line = PYTHON_M[0].replace("--config ", "--config no_")
    assert ran(line, trained, tmp_path, monkeypatch)[0] == 2
    assert "no such config file" in capsys.readouterr().err


def test_the_snippet_runs(trained, monkeypatch, capsys):
    source = SNIPPET
    for real, small in {
        '"smollm2_135m"': '"smollm2_135m", *overrides',
        "max_new_tokens=64": "max_new_tokens=8",
        "seed=1)": "seed=1, max_new_tokens=8)",
    }.items():
        assert source.count(real) == 1
        source = source.replace(real, small)
    monkeypatch.chdir(ROOT)
    draft = {"draft.path": f"{trained['train.folder']}/draft"}
    exec(compile(source, "README.md", "exec"), {"overrides": overrides(trained | draft)})
    assert " length" in capsys.readouterr().out


def test_every_line_is_run_here_or_dry_run_elsewhere():
    left = [
        line
        for line in LINES
        if line not in (*PYTHON_M, *SCRIPTS) and not line.startswith(ELSEWHERE)
    ]
    names_in_sentences = ["python -m beagle_jax.tune"]
    assert [line for line in left if line not in names_in_sentences] == [
        "source .venv/bin/activate",
        "export JAX_COMPILATION_CACHE_DIR=~/.cache/beagle_jax/xla",
        "bash launch/local_cpu.sh train --config configs/quickstart.yaml train.folder=runs/mesh",
    ]


# The scripts, in a clone whose environments are this Python's


@pytest.fixture
def clone(tmp_path) -> Path:
    for path in ROOT.iterdir():
        if not path.name.startswith((".git", ".venv", "runs")):
            (tmp_path / path.name).symlink_to(path)
    stamp = subprocess.run(
        "cat requirements.txt pyproject.toml | cksum",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    for name in (".venv", ".venv-test"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "installed").write_text(stamp)
        python = tmp_path / name / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    return tmp_path


def script(line: str, clone: Path, *more: str) -> subprocess.CompletedProcess:
    settings = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/beagle_jax/xla_tests"),
    }
    return subprocess.run(
        [*shlex.split(line), *more],
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=280,
        env=settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in SCRIPTS if "quickstart" in line])
def test_the_quick_start_runs(line, toy, clone, tmp_path):
    settings = toy | {"train.folder": str(tmp_path / "run"), "data.folder": str(tmp_path / "data")}
    done = script(line, clone, *overrides(settings))
    assert done.returncode == 0, done.stderr
    assert (
        "draft written to" in done.stdout
        and "identical to plain decoding" in done.stdout
        and "3/3" in done.stdout
    )


@pytest.mark.slow
def test_the_mesh_of_a_laptop_runs(toy, clone, tmp_path):
    settings = toy | {"train.folder": str(tmp_path / "run"), "data.folder": str(tmp_path / "data")}
    [line] = [line for line in LINES if line.startswith("bash launch/local_cpu.sh")]
    done = script(line, clone, *overrides(settings))
    assert done.returncode == 0 and "draft written to" in done.stdout, done.stderr


def test_the_tests_run(clone):
    assert "bash launch/test.sh" in SCRIPTS
    done = script(
        "bash launch/test.sh",
        clone,
        "tests/test_house.py",
        "-k",
        "readme",
        "--numprocesses",
        "0",
        "-p",
        "no:cacheprovider",
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr

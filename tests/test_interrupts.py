"""Ctrl-C: every command ends soon, with one line on what is left and status 130."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from command_cases import COMMANDS, make_workplace

from beagle_jax import plan
from beagle_jax.decoding import session
from beagle_jax.errors import run_main

ROOT = Path(__file__).resolve().parent.parent
# A call into C that returns after half a minute, as a compilation or a program on a device does.
LONG = "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 60_000_000)"
BEGIN = """
import hashlib, signal, sys, time
from beagle_jax import errors, interrupts
interrupts.GRACE = 0.3
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
"""
MAIN = """
def main(argv):
    interrupts.leaves("a part is in PLACE; run it again")
    print("result so far")
    sys.stderr.write("ready"), sys.stderr.flush()
    {work}
sys.exit(errors.run_main(main))
"""


def interrupted(work: str, before: str = "", limit: float = 20) -> tuple[int, str, str, float]:
    """Status, stdout, stderr and seconds of a program that gets Ctrl-C while it works."""
    program = subprocess.Popen(
        [sys.executable, "-c", BEGIN + before + MAIN.format(work=work)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    try:
        assert program.stderr.read(5) == "ready"
        time.sleep(0.1)
        program.send_signal(signal.SIGINT)
        clock = time.perf_counter()
        out, err = program.communicate(timeout=limit)
        return program.returncode, out, err, time.perf_counter() - clock
    finally:
        program.kill()


@pytest.mark.parametrize("work", ["time.sleep(30)", LONG])
def test_a_program_ends_soon_with_one_line(work):
    status, out, err, seconds = interrupted(work)
    assert status == 130 and seconds < 10
    assert out == "result so far\n"
    assert err == "\ninterrupted: a part is in PLACE; run it again\n"


def test_planted_bug_without_the_watch_a_long_call_goes_on():
    away = "import contextlib\ninterrupts.Watch = contextlib.nullcontext\n"
    with pytest.raises(subprocess.TimeoutExpired):
        interrupted(LONG, away, limit=2)


def test_a_command_with_its_own_handler_keeps_it():
    """As training, which saves a checkpoint first."""
    work = """seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2_000_000)
    print(seen)"""
    status, out, err, _ = interrupted(work)
    assert (status, out, err) == (0, "result so far\n[1]\n", "")


def test_waiting_for_a_device_notices_it(monkeypatch):
    monkeypatch.setattr(jax, "block_until_ready", lambda _: time.sleep(10))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    clock = time.perf_counter()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            session._wait_for(None)
        assert time.perf_counter() - clock < 5
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("interrupted"))


def stop(*_arguments, **_options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "where", "arguments", "line"),
    [
        ("prepare", "prepare.prepare_share", [], "whole parts stay in {folder}/data; the same "),
        ("train", "train.train_draft", [], "what is complete stays in {folder}/data and {folder}/"),
        ("tune", "tune.choose_tree", ["--quick"], "no tree was chosen, and nothing is saved; run"),
        ("plan", "plan.plan", [], "there is no plan, and plan leaves no files; run it again"),
        ("convert", "convert.to_jax", ["to-jax", "--out", "none"], "none is as it was before; run"),
        ("evaluate", "evaluate.evaluate", ["--out", "out"], "whole answers are in out; the same c"),
        ("evaluate", "evaluate.evaluate", [], "whole answers are stored with --out FOLDER only"),
    ],
)
def test_each_command_says_what_is_left(
    place, tmp_path, monkeypatch, capsys, command, where, arguments, line
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"beagle_jax.commands.{where}", stop)
    main = {**COMMANDS, "plan": plan.main}[command]
    assert run_main(main, ["--config", place.config, *arguments]) == 130
    err = capsys.readouterr().err
    assert f"\ninterrupted: {line.format(folder=place.folder)}" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_real_evaluation_reports_what_there_is(place):
    """A process of its own, with long answers: Ctrl-C comes while the second one is decoded."""
    folder = place.folder / "out"
    options = ["draft.path=lookup", "eval.max_new_tokens=150", "decode.levels=2"]
    options += ["--out", str(folder)]
    program = subprocess.Popen(
        [sys.executable, "-m", "beagle_jax.evaluate", "--config", place.config, *options],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    answers = folder / "answers.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        answers.exists() and len(answers.read_text().splitlines()) > 1
    ):
        time.sleep(0.01)
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=60)
    report = json.loads((folder / "report.json").read_text())
    assert program.returncode == 130 and "Traceback" not in err
    assert report["interrupted"] and "Interrupted: " in out
    assert "interrupted: whole answers are in " in err

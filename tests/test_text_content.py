"""Text is known by its content, and is the same for any number of processes and any batch."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment
from text_cases import QuickWriter, byte_tokenizer, filled, write_chats

from beagle_jax.commands import train as train_command
from beagle_jax.commands.train import check_rows_of_run
from beagle_jax.config import DataConfig, load_config
from beagle_jax.corpus import text as corpus_text
from beagle_jax.corpus import waves
from beagle_jax.data import source as data_source
from beagle_jax.data.folder import read_parts, read_waves
from beagle_jax.data.share import ALONE, Share
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(waves, "PART_ROWS", 4)


@pytest.fixture
def written(monkeypatch):
    """Names of the parts, each time that one is written."""
    names, right = [], corpus_text.write_part

    def write(folder, part, *more):
        names.append(part)
        right(folder, part, *more)

    monkeypatch.setattr(corpus_text, "write_part", write)
    return names


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but settings.json, which names the folder."""
    files = (path for path in folder.iterdir() if path.name != "settings.json")
    return {path.name: path.read_bytes() for path in files}


def shares_in_turn(folder: Path, source: str, count: int, **settings) -> list:
    """Runs the shares of `--part I/N`, the last first, until none has anything left to write."""
    before = None
    while before != (before := files_of(folder) if folder.exists() else {}):
        for index in reversed(range(count)):
            rows = filled(folder, source, Share(index, count), **settings)
    return rows


def check_alike(tmp_path, written, source: str, **settings) -> None:
    alone = filled(tmp_path / "1", source, ALONE, **settings)
    assert len(written) > 3
    for count in (2, 3):
        written.clear()
        assert shares_in_turn(tmp_path / str(count), source, count, **settings) == alone
        assert len(set(written)) == len(written), "a part was written twice"
        assert files_of(tmp_path / str(count)) == files_of(tmp_path / "1")
    assert filled(tmp_path / "batch", source, ALONE, batch=1, **settings) == alone


def sources(tmp_path) -> list[str]:
    return [write_chats(tmp_path / "chats.jsonl", range(40)), "self"]


@pytest.mark.parametrize(("which", "budget"), [(0, 60), (0, 100_000), (1, 1000)])
def test_one_two_and_three_processes_write_and_train_the_same(tmp_path, written, which, budget):
    check_alike(tmp_path, written, sources(tmp_path)[which], answer_tokens=budget)


def test_a_budget_divided_among_processes_is_seen(tmp_path, written, monkeypatch):
    """The planted bug, and what version 0.1.0 did: each process had its own part of the budget."""
    monkeypatch.setattr(
        corpus_text,
        "plan",
        lambda items, first, missing, length, is_own, _: waves.plan(
            items, first, missing / (1 + (not is_own(first + 1))), length, is_own
        ),
    )
    with pytest.raises(AssertionError):
        check_alike(tmp_path, written, sources(tmp_path)[0])


def test_rows_in_the_order_of_their_answers_are_seen(tmp_path, written, monkeypatch):
    """The planted bug: the order then depends on the batch."""
    right = QuickWriter.__call__

    def swapped(self, prompts, **named):
        answers = list(right(self, prompts, **named))
        for place, answer in enumerate(answers):
            answer.index = place
        yield from answers

    monkeypatch.setattr(QuickWriter, "__call__", swapped)
    with pytest.raises(AssertionError):
        check_alike(tmp_path, written, sources(tmp_path)[0])


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_an_interrupted_wave_is_finished_as_it_was_planned(tmp_path, monkeypatch, stop_after):
    source = sources(tmp_path)[0]
    alone = filled(tmp_path / "whole", source, ALONE)
    right, left = corpus_text.write_part, [stop_after]

    def breaks(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_text, "write_part", breaks)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path / "broken", source, ALONE)
    assert filled(tmp_path / "broken", source, ALONE) == alone
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")


def started(tmp_path, source: str, count: int) -> list[list]:
    """The rows that each of the processes trains on, which fill a folder together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    tests = Path(__file__).parent
    variables = environment(1) | {
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
        "TQDM_DISABLE": "1",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
    }
    command = [sys.executable, str(tests / "text_cases.py"), source, str(tmp_path / "together")]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(command, env=variables | {"JAX_PROCESS_ID": str(number)}, **streams)
        for number in range(count)
    ]
    ended = [process.communicate(timeout=280) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, ended[0][1][-2000:]
    lines = [line for stdout, _ in ended for line in stdout.splitlines()]
    return [json.loads(line.removeprefix("rows ")) for line in lines if line.startswith("rows ")]


@pytest.mark.parametrize(
    ("count", "source"),
    [
        (2, "self"),
        # minutes on a busy machine
        pytest.param(3, "chats", marks=pytest.mark.slow),
    ],
)
def test_processes_that_run_together(tmp_path, count, source):
    if source == "chats":
        source = sources(tmp_path)[0]
    alone = [row.tokens for row in filled(tmp_path / "alone", source, ALONE)]
    assert started(tmp_path, source, count) == [alone] * count
    assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")


# The content of the source


def questions(rows) -> list[int]:
    tokenizer = byte_tokenizer()
    texts = (tokenizer.decode(row.tokens) for row in rows)
    return [int(text.split("Question ")[1].split("?")[0]) for text in texts]


@pytest.mark.parametrize(
    "numbers",
    [list(range(100, 112)), list(reversed(range(12))), [*range(11), 12], list(range(13))],
    ids=["replaced", "reordered", "edited", "longer"],
)
@pytest.mark.parametrize("budget", [20, 100_000])
def test_a_file_that_changed_is_refused(tmp_path, numbers, budget):
    path = tmp_path / "chats.jsonl"
    source = write_chats(path, range(12))
    filled(tmp_path / "data", source, ALONE, answer_tokens=budget)
    before = files_of(tmp_path / "data")
    write_chats(path, numbers)
    with pytest.raises(
        UserError,
        match=rf"data holds text of another content of {path} \(sha256 .* there, .* now\): the "
        "file was edited, reordered or replaced; put it back, or delete it or set another",
    ):
        filled(tmp_path / "data", source, ALONE, answer_tokens=100_000)
    assert files_of(tmp_path / "data") == before
    write_chats(path, range(12))
    rows = filled(tmp_path / "data", source, ALONE, answer_tokens=100_000)
    assert sorted(questions(rows)) == list(range(12))


def test_a_changed_file_of_a_folder_is_noticed_and_a_moved_one_is_the_same_text(tmp_path):
    (tmp_path / "chats").mkdir()
    write_chats(tmp_path / "chats" / "a.jsonl", range(4))
    write_chats(tmp_path / "chats" / "b.jsonl", range(4, 8))
    source = str(tmp_path / "chats")
    filled(tmp_path / "data", source, ALONE)
    write_chats(tmp_path / "chats" / "b.jsonl", range(4, 9))
    with pytest.raises(UserError, match="another content of"):
        filled(tmp_path / "data", source, ALONE)


def test_content_that_nobody_looks_at_is_not_noticed(tmp_path, monkeypatch):
    """The planted bug: case 30, a part of the old file and a part of the new one."""
    source = write_chats(tmp_path / "chats.jsonl", range(12))
    filled(tmp_path / "data", source, ALONE, answer_tokens=20)
    monkeypatch.setattr("beagle_jax.data.folder._check_content", lambda *_: None)
    write_chats(tmp_path / "chats.jsonl", reversed(range(12)))
    rows = filled(tmp_path / "data", source, ALONE, answer_tokens=100_000)
    assert sorted(questions(rows)) != list(range(12))


def test_a_raised_budget_is_noticed_and_continues(tmp_path, capsys):
    source = write_chats(tmp_path / "chats.jsonl", range(24))
    few = filled(tmp_path / "data", source, ALONE, answer_tokens=20)
    capsys.readouterr()
    rows = filled(tmp_path / "data", source, ALONE, answer_tokens=100_000)
    assert "was begun with data.answer_tokens = 20, it is 100,000 now" in capsys.readouterr().out
    assert rows[: len(few)] == few and questions(rows) == list(range(24))
    assert len(read_waves(tmp_path / "data")) >= 2


def test_a_complete_text_needs_its_source_no_more(tmp_path):
    source = write_chats(tmp_path / "chats.jsonl", range(12))
    rows = filled(tmp_path / "data", source, ALONE)
    Path(source).unlink()
    assert filled(tmp_path / "data", source, ALONE) == rows


def test_a_deleted_part_is_written_again(tmp_path):
    source = write_chats(tmp_path / "chats.jsonl", range(24))
    rows = filled(tmp_path / "data", source, ALONE)
    (tmp_path / "data" / "part-0001.rows").unlink()
    assert filled(tmp_path / "data", source, ALONE) == rows
    for path in (tmp_path / "data").glob("wave-*.json"):
        path.unlink()
    (tmp_path / "data" / "part-0001.rows").unlink()
    with pytest.raises(UserError, match=r"part-0001.rows is missing, and later parts are there"):
        filled(tmp_path / "data", source, ALONE)


# Datasets of the hub


def test_the_commit_of_a_dataset_is_recorded_and_read_again(tmp_path, monkeypatch):
    commits, names = iter(["a" * 40, "b" * 40]), []
    monkeypatch.setattr("beagle_jax.data.content.hub_revision", lambda name: next(commits))

    def chats(name, *more):
        names.append(name)
        return data_source.read_chats(write_chats(tmp_path / "x.jsonl", range(24)))

    monkeypatch.setattr(data_source, "hub_chats", chats)
    filled(tmp_path / "data", "hf:org/name", ALONE, answer_tokens=20)
    filled(tmp_path / "data", "hf:org/name", ALONE, answer_tokens=60)
    assert names == [f"org/name@{'a' * 40}"] * 2
    part = read_parts(tmp_path / "data")
    assert part and json.loads((tmp_path / "data" / "settings.json").read_text())["sources"] == [
        {"name": "hf:org/name", "sha256": None, "revision": "a" * 40}
    ]


def test_a_commit_that_was_named_is_read_as_it_is():
    config = DataConfig(source="hf:org/name@main", folder="nowhere")
    assert data_source.pinned(config) is config


@pytest.mark.parametrize("which", [0, 1])
def test_a_prompt_without_an_embedding_is_refused_before_it_is_answered(tmp_path, which):
    source = [write_chats(tmp_path / "chats.jsonl", range(4), lambda number: False), "self"][which]
    with pytest.raises(UserError, match=r"token 25\d \('.*'\) at position \d+ has no row in the"):
        filled(tmp_path / "data", source, ALONE, vocab_size=250)
    assert not list((tmp_path / "data").glob("part-*"))


# Checkpoints


@pytest.fixture
def run_of(tmp_path):
    """Claims a run's folder for rows, as if it had a checkpoint."""
    (tmp_path / "run.yaml").write_text("target: {source: x}\n")

    def claim(numbers, *more: str) -> None:
        config = load_config(tmp_path / "run.yaml", [f"train.folder={tmp_path}/run", *more])
        check_rows_of_run(config, [Row([number, 1], [False, True]) for number in numbers])
        (tmp_path / "run" / "checkpoints" / "early" / "1").mkdir(parents=True, exist_ok=True)

    return claim


def check_other_rows(run_of) -> None:
    run_of([1, 2])
    run_of([1, 2])
    with pytest.raises(UserError, match=r"run holds a run on other rows .*accept_changes=true"):
        run_of([2, 1])


def test_a_run_on_other_rows_is_refused(run_of, capsys):
    check_other_rows(run_of)
    run_of([2, 1], "train.accept_changes=true")
    assert "warning: " in capsys.readouterr().out
    run_of([2, 1])


def test_rows_that_nobody_compares_are_seen(run_of, monkeypatch):
    """The planted bug."""
    monkeypatch.setattr(train_command, "rows_digest", lambda rows: "0" * 64)
    with pytest.raises(pytest.fail.Exception):
        check_other_rows(run_of)


def test_a_run_without_a_checkpoint_may_change_its_rows(tmp_path, run_of):
    run_of([1, 2])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run_of([2, 1])
    run_of([2, 1])

"""`prepare` on a tiny target: text and states on disk, shares, refusals, and the preview."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import yaml
from command_cases import make_target
from transformers import AutoTokenizer

from beagle_jax import prepare, remote
from beagle_jax.commands import prepare as prepare_command
from beagle_jax.config import load_config
from beagle_jax.corpus import disk, fill, text, waves
from beagle_jax.data import states, vocabulary
from beagle_jax.data.folder import read_parts
from beagle_jax.data.preview import preview
from beagle_jax.data.rows_file import Header, open_rows, write_rows
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError, run_main
from beagle_jax.terminal import size
from beagle_jax.weights.target import load_target

QUESTIONS = [f"What is {number}?" for number in range(10)]


def chat(number: int, answered: bool) -> dict:
    turns = [
        {"role": "user", "content": QUESTIONS[number]},
        {"role": "assistant", "content": f"It is {number}."},
    ]
    return {"messages": turns if answered else turns[:1]}


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepare")
    make_target(folder / "target")
    return folder / "target"


@pytest.fixture
def place(tmp_path, target_folder, monkeypatch) -> SimpleNamespace:
    """A config with a file of ten chats, a third of which lack an answer; parts have four rows."""
    monkeypatch.setattr(waves, "PART_ROWS", 4)
    lines = [json.dumps(chat(number, answered=number % 3 != 2)) for number in range(10)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "target": {"source": str(target_folder)},
        "data": {
            "source": str(tmp_path / "chats.jsonl"),
            "folder": str(tmp_path / "data"),
            "max_answer_tokens": 6,
            "batch": 16,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return SimpleNamespace(
        folder=tmp_path, data=tmp_path / "data", config=str(tmp_path / "run.yaml")
    )


def prepared(place, *argv: str) -> dict:
    figures = place.folder / "figures.json"
    assert run_main(prepare.main, ["--config", place.config, "--json", str(figures), *argv]) == 0
    return json.loads(figures.read_text())


def all_rows(place) -> list:
    return sorted(
        (tuple(row.tokens), tuple(row.supervised))
        for rows in read_parts(place.data).values()
        for row in rows
    )


def test_text_and_states_lie_in_parts_and_their_size_was_announced(place, capsys):
    figures = prepared(place)
    parts = read_parts(place.data)
    assert [len(rows) for rows in parts.values()] == [4, 4, 2] and figures["rows"] == 10
    tokens = sum(len(row.tokens) for rows in parts.values() for row in rows)
    assert figures["tokens"] == tokens and figures["states_dtype"] == "float32"
    sizes = [(place.data / f"part-000{number}.states").stat().st_size for number in parts]
    assert sum(sizes) == tokens * 32 * 4 and min(sizes) > 0
    captured = capsys.readouterr()
    assert (
        f"target states: {tokens:,} tokens x 32 in float32, {size(sum(sizes))} in 3 parts; "
        f"{size(sum(sizes))} to write, " in captured.err
    )
    assert captured.out == f"10 rows, {tokens:,} tokens ready in {place.data}\n"
    # Nothing is done twice.
    before = {path: path.stat().st_mtime_ns for path in place.data.iterdir()}
    prepared(place)
    assert {path: path.stat().st_mtime_ns for path in place.data.iterdir()} == before


def test_an_interrupted_run_keeps_its_whole_parts(place, monkeypatch):
    right, calls = states._compute, []

    def broken(*arguments):
        calls.append(arguments[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(states, "_compute", broken)
        assert run_main(prepare.main, ["--config", place.config]) == 130
    assert [path.name for path in sorted(place.data.glob("*.states"))] == ["part-0000.states"]
    monkeypatch.setattr(
        states, "_compute", lambda *arguments: calls.append(arguments[2]) or right(*arguments)
    )
    prepared(place)
    assert calls[0] != calls[1] == calls[2] and len(calls) == 4


def check_shares(place, alone: list) -> None:
    """Checks that two processes, in either order, leave the rows and states of one."""
    for index in (1, 0):
        prepared(place, "--part", f"{index}/2")
    assert all_rows(place) == alone
    assert len(list(place.data.glob("part-*.states"))) == len(list(place.data.glob("part-*.rows")))


def test_shares_together_are_the_whole(place, monkeypatch):
    prepared(place, f"data.folder={place.folder}/alone")
    alone = all_rows(SimpleNamespace(data=place.folder / "alone"))
    check_shares(place, alone)
    # Whoever comes next finds it complete, as one process too.
    monkeypatch.setattr(text, "write_part", lambda *_: pytest.fail("written again"))
    target = load_target(load_config(place.config).target.source, "float32", "unused")
    rows, stored = fill.rows_and_states(load_config(place.config), target)
    assert sorted((tuple(row.tokens), tuple(row.supervised)) for row in rows) == alone
    assert [np.asarray(states).shape[0] for states in stored] == [len(row.tokens) for row in rows]


def check_machines(place, alone: list, monkeypatch) -> None:
    """Checks that two machines without a common disk leave the rows and states of one."""
    files = fsspec.filesystem("memory")
    for index in (1, 0, 1):
        monkeypatch.setenv("BEAGLE_JAX_REMOTE", str(place.folder / f"machine-{index}"))
        prepared(place, "data.folder=memory://bucket/data", "--part", f"{index}/2")
    monkeypatch.setenv("BEAGLE_JAX_REMOTE", str(place.folder / "third"))
    assert all_rows(SimpleNamespace(data="memory://bucket/data")) == alone
    for path in (place.folder / "alone").glob("part-*.*"):
        if path.suffix in (".rows", ".states"):
            assert files.cat(f"/bucket/data/{path.name}") == path.read_bytes()


def test_machines_without_a_common_disk_share_a_url(place, monkeypatch):
    fsspec.filesystem("memory").store.clear()
    prepared(place, f"data.folder={place.folder}/alone")
    alone = all_rows(SimpleNamespace(data=place.folder / "alone"))
    check_machines(place, alone, monkeypatch)


def test_a_machine_that_uploads_nothing_is_seen(place, monkeypatch):
    fsspec.filesystem("memory").store.clear()
    prepared(place, f"data.folder={place.folder}/alone")
    alone = all_rows(SimpleNamespace(data=place.folder / "alone"))
    monkeypatch.setattr(remote, "upload", lambda source, path: None)
    with pytest.raises(AssertionError):
        check_machines(place, alone, monkeypatch)


def test_shares_that_overlap_are_seen(place, monkeypatch):
    """The planted bug: a share takes its items from the beginning of the source."""
    prepared(place, f"data.folder={place.folder}/alone")
    alone = all_rows(SimpleNamespace(data=place.folder / "alone"))
    right = text.follow
    monkeypatch.setattr(
        text,
        "follow",
        lambda items, wave, is_own: right(items, wave._replace(items=wave.items[::-1]), is_own),
    )
    with pytest.raises(AssertionError):
        check_shares(place, alone)


def ended(place, capsys, *argv: str) -> str:
    assert run_main(prepare.main, ["--config", place.config, *argv]) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message[message.index("error: ") :]


def test_what_one_of_two_shares_began_one_process_finishes(place, capsys):
    prepared(place, f"data.folder={place.folder}/alone")
    prepared(place, "--part", "0/2")
    assert "1 parts are left to the other shares" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in place.data.glob("part-*.rows")}
    prepared(place)
    after = {path: path.stat().st_mtime_ns for path in place.data.glob("part-*.rows")}
    assert before.items() < after.items(), "a part was written twice"
    assert read_parts(place.data) == read_parts(place.folder / "alone")


@pytest.mark.parametrize("source", ["chats", "self"])
def test_what_cannot_fit_is_refused_before_it_is_written(place, capsys, monkeypatch, source):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    more = [] if source == "chats" else ["data.source=self", "data.answer_tokens=9"]
    message = ended(place, capsys, *more)
    assert (
        "has 0.00 MB free, the target's states need " in message
        and "lower data.answer_tokens, set data.states_dtype: int8" in message
    )
    assert not list(place.data.glob("*.states"))


def test_prompts_that_the_target_answers_are_announced_before_their_states_are_kept(
    place, capsys, monkeypatch
):
    (place.folder / "chats.jsonl").write_text(
        "".join(json.dumps(chat(number, answered=False)) + "\n" for number in range(5))
    )
    right, said = text.keep_states, []
    monkeypatch.setattr(
        text,
        "keep_states",
        lambda *arguments: said.append(capsys.readouterr().err) or right(*arguments),
    )
    prepared(place, "data.answer_tokens=1000")
    most = size(1000 * (1 + 2 * 128 / 6) * 32 * 4)
    sentence = (
        f"target states of up to 1,000 answer tokens to be written: {size(1000 * 32 * 4)}, "
        f"with their prompts at most about {most}; "
    )
    assert (
        len(said) == 2
        and sentence in said[0]
        and " are free in " in said[0]
        and "to be written" not in said[1]
    )


def test_another_template_is_refused_by_hash(place, capsys, target_folder, tmp_path):
    prepared(place)
    other = tmp_path / "other"
    other.mkdir()
    for file in target_folder.iterdir():
        (other / file.name).symlink_to(file)
    template = next(
        file
        for file in other.iterdir()
        if "im_start" in file.read_text(errors="replace") and file.suffix == ".jinja"
    )
    text = template.read_text().replace("}}\n", "}}\n ", 1)
    template.unlink()
    template.write_text(text)
    settings = json.loads((place.data / "settings.json").read_text())
    (place.data / "settings.json").write_text(json.dumps(settings | {"target": str(other)}))
    message = ended(place, capsys, f"target.source={other}")
    assert "was made for another chat template (template_sha256" in message


def test_chats_are_cut_and_those_without_an_answer_left_are_counted(place, capsys):
    long = {
        "messages": [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "y"}]
    }
    (place.folder / "chats.jsonl").write_text(
        json.dumps(long) + "\n" + json.dumps(chat(1, True)) + "\n"
    )
    figures = prepared(place, "data.max_chat_tokens=35")
    assert (figures["rows"], figures["tokens"]) == (1, 35)
    assert (
        "left out 1 of 2 chats without an answer in their first 35 tokens"
        in capsys.readouterr().err
    )
    message = ended(place, capsys, "data.max_chat_tokens=20", f"data.folder={place.folder}/none")
    assert "data.max_chat_tokens is 20, but every answer begins later; raise it" in message


def test_answers_are_written_anew_when_asked(place):
    prepared(place)
    rows_before = read_parts(place.data)[0]
    prepared(place, "data.answers=regenerate", f"data.folder={place.folder}/new")
    new = read_parts(place.folder / "new")[0]

    def prompts(rows):
        return {tuple(row.tokens[: row.supervised.index(True)]) for row in rows}

    assert prompts(new) == prompts(rows_before) and {tuple(row.tokens) for row in new} != {
        tuple(row.tokens) for row in rows_before
    }
    assert all(sum(row.supervised) <= 6 for row in new)  # data.max_answer_tokens


def test_online_states_take_no_disk(place, capsys):
    figures = prepared(place, "data.states=online")
    assert figures["states_dtype"] is None and not list(place.data.glob("*.states*"))
    assert "target states" not in capsys.readouterr().err


# Text of another folder, of another machine


def test_an_exported_text_trains_the_same_rows(place, capsys):
    prepared(place)
    path = place.folder / "text.rows"
    prepared(place, "--export", str(path))
    assert f"10 rows written to {path}; data.source={path} reads them" in capsys.readouterr().err
    rows = [row for part in read_parts(place.data).values() for row in part]
    for number, source in enumerate([path, place.data]):
        folder = place.folder / str(number)
        prepared(place, f"data.source={source}", f"data.folder={folder}")
        assert [row for part in read_parts(folder).values() for row in part] == rows
    header = open_rows(path).header
    assert header.made_for["target_sha256"] and header.sources[0]["sha256"]
    # The content of this source is known too.
    write_rows(path, rows[1:], header)
    message = ended(place, capsys, f"data.source={path}", f"data.folder={place.folder}/0")
    assert "holds text of another content of" in message


@pytest.mark.parametrize(
    ("key", "named"),
    [("tokenizer_sha256", "another tokenizer"), ("template_sha256", "another chat template")],
)
def test_rows_of_another_tokenizer_are_refused(place, capsys, key, named):
    path = place.folder / "text.rows"
    write_rows(path, [Row([1, 2], [False, True])], Header({key: "9" * 64}))
    message = ended(place, capsys, f"data.source={path}")
    assert f"{path}: its rows are of {named} ({key} 999999999999 there, " in message


def test_rows_of_another_target_or_of_none_are_told(place, capsys):
    path = place.folder / "text.rows"
    write_rows(path, [Row([1, 2, 3], [False, True, True])], Header({"target_sha256": "9" * 64}))
    prepared(place, f"data.source={path}")
    output = capsys.readouterr().err
    assert "does not say which tokenizer and chat template its rows are of" in output
    assert "its answers are of another target" in output


def test_an_incomplete_text_is_not_exported(place, capsys):
    message = ended(place, capsys, "--part", "0/2", "--export", str(place.folder / "text.rows"))
    assert "is not complete; let the other shares write theirs first" in message
    status = run_main(prepare.main, ["--config", place.config, "--export", "text.npz"])
    assert status == 2 and "expected a name that ends in .rows" in capsys.readouterr().err


def test_text_that_processes_of_0_1_0_divided_is_exported(place, capsys):
    prepared(place)
    path = place.data / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 2}))
    assert "filled by 2 processes of version 0.1.0" in ended(place, capsys)
    prepared(place, "--export", str(place.folder / "text.rows"))
    assert len(open_rows(place.folder / "text.rows")) == 10


# Tokens without an embedding


@pytest.fixture
def short_target(target_folder, tmp_path) -> Path:
    """The target, whose tokenizer has a token that was added and never got an embedding."""
    folder = tmp_path / "short"
    folder.mkdir()
    for file in target_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_target(str(target_folder), "float32", "unused").spec.vocab_size
    tokenizer.add_tokens([f"<|more{n}|>" for n in range(rows - len(tokenizer))])
    tokenizer.add_tokens(["<|image|>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<|image|>") == rows == 300
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("content", ["question", "answer"])
def test_a_token_without_an_embedding_is_refused_with_its_line(
    place, capsys, short_target, content
):
    records = [chat(number, True) for number in range(3)]
    records[1]["messages"][content == "answer"]["content"] += " <|image|>"
    (place.folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    message = ended(place, capsys, f"target.source={short_target}")
    assert f"{place.folder}/chats.jsonl:2: token 300 ('<|image|>') at position " in message
    assert "has no row in the target's embedding, which ends at 299; take it out" in message
    assert not list(place.data.glob("part-*"))


def test_a_token_without_an_embedding_is_refused_wherever_it_comes_from(place, capsys):
    path = place.folder / "text.rows"
    rows = [Row([1, 2, 3], [False, True, True]), Row([5, 300], [False, True])]
    write_rows(path, rows, Header())
    assert f"{path}, row 1: token 300 (" in ended(place, capsys, f"data.source={path}")
    prepared(place, f"data.folder={place.folder}/other")
    write_rows(place.folder / "other" / "part-0001.rows", rows, Header(items=4))
    message = ended(place, capsys, f"data.folder={place.folder}/other")
    assert f"{place.folder}/other, part 1, row 1: token 300 at position 1 has no row" in message


def test_a_check_that_counts_one_token_too_many_is_seen(place, capsys, short_target, monkeypatch):
    right = vocabulary.check_ids
    monkeypatch.setattr(
        "beagle_jax.data.source.check_ids",
        lambda rows, size, *more: right(rows, size + 1, *more),
    )
    with pytest.raises(AssertionError):
        test_a_token_without_an_embedding_is_refused_with_its_line(
            place, capsys, short_target, "answer"
        )


# Fields that nothing reads


@pytest.mark.parametrize("record", [{"id": 7}, {"messages": [{"name": "Ann"}, {}]}])
def test_fields_that_nothing_reads_are_named_once_or_refused(place, capsys, record):
    records = [chat(number, True) for number in range(3)]
    for changed in records[1:]:
        for message, more in zip(
            changed["messages"], record.get("messages", [{}, {}]), strict=True
        ):
            message.update(more)
        changed.update({key: value for key, value in record.items() if key != "messages"})
    (place.folder / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    field, line = ("id" if "id" in record else "name"), f"{place.folder}/chats.jsonl:2"
    prepared(place)
    output = capsys.readouterr().err
    assert output.count(f"{line}: ") == 1 and output.count(f" {field}") == 1
    message = ended(place, capsys, "data.unread=refuse", f"data.folder={place.folder}/other")
    assert message.startswith(f"error: {line}: ") and "data.unread: ignore" in message


# Preview


def test_the_preview_marks_what_is_learned_and_loads_no_weights(place, capsys, monkeypatch):
    monkeypatch.setattr(
        prepare_command, "configured_target", lambda *_, **__: pytest.fail("weights were loaded")
    )
    assert run_main(prepare.main, ["--config", place.config, "--preview"]) == 0
    blocks = capsys.readouterr().out.split("--- row ")[1:]
    assert [block.splitlines()[0] for block in blocks] == [
        "1: 39 tokens, 9 supervised",
        "2: 39 tokens, 9 supervised",
        "3: 29 tokens, the target will answer",
    ]
    assert ">>It is 0.<|im_end|><<" in blocks[0] and ">>" not in blocks[2]
    assert not place.data.exists()


def test_the_preview_of_a_self_written_text_shows_our_prompts(place, capsys):
    assert (
        run_main(prepare.main, ["--config", place.config, "--preview", "1", "data.source=self"])
        == 0
    )
    assert capsys.readouterr().out.startswith("--- row 1: ")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Letters:
    """A tokenizer with one letter per token, as much of it as the preview reads."""

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def test_colours_only_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    row = Row([ord(letter) for letter in "abcd"], [False, False, True, True])
    coloured = preview([row], Letters(), Terminal()).splitlines()[1]
    assert coloured == "\033[2;37ma\033[0m\033[37mb\033[0m\033[1;32mc\033[0m\033[32md\033[0m"
    assert preview([row], Letters(), io.StringIO()).splitlines()[1] == "ab>>cd<<"
    monkeypatch.setenv("NO_COLOR", "1")
    assert preview([row], Letters(), Terminal()).splitlines()[1] == "ab>>cd<<"


def test_parts_of_other_processes_must_be_seen(place, monkeypatch):
    """Processes that write to their own disks would train on different rows."""
    target = load_target(load_config(place.config).target.source, "float32", "unused")
    monkeypatch.setattr(fill, "this_process", lambda: fill.Share(0, 2))
    with pytest.raises(
        UserError,
        match="lacks files that other processes wrote; set a folder on a file system that all",
    ):
        fill.rows_and_states(load_config(place.config), target)

"""Suites: records of every layout become prompts with turns; which file or download is used."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from beagle_jax.errors import UserError
from beagle_jax.evaluation.suites import SUITES, suite

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"

# One record as each suite's file or dataset has it, and what the user then says, turn by turn.
RECORDS = {
    "mt_bench": (
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]},
        "writing",
        ["Write.", "Rewrite."],
    ),
    "gsm8k": (
        {"question": "1 + 1?", "answer": "2"},
        "gsm8k",
        ["1 + 1?\nThink step by step, then give the answer on a last line after ####."],
    ),
    "cnn_dm": (
        {"article": "It rained."},
        "cnn_dm",
        ["Summarize this article in a few sentences.\n\nIt rained."],
    ),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n    {}\n"},
        "humaneval",
        ["Complete this code.\n\ndef f():\n    {}"],
    ),
    "alpaca": ({"instruction": "Add.", "input": "", "output": "3"}, "alpaca", ["Add."]),
    "spec_bench": ({"question_id": 1, "category": "rag", "turns": ["What?"]}, "rag", ["What?"]),
}


def said(chat) -> list[str]:
    return [chat.messages[0]["content"], *chat.later]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_becomes_what_the_user_says(name, tmp_path):
    record, category, turns = RECORDS[name]
    with gzip.open(tmp_path / SUITES[name].file, "wt", encoding="utf-8") as stream:
        # Empty lines are no records.
        stream.write(json.dumps(record) + "\n\n \n" + json.dumps(record) + "\n")
    chats = suite(name, None, str(tmp_path))
    assert [(said(chat), chat.kind) for chat in chats] == 2 * [(turns, category)]
    assert (
        chats[1].where.endswith(f"{SUITES[name].file}:4")
        and len(suite(name, 1, str(tmp_path))) == 1
    )


def test_mt_bench_is_one_of_the_six_tasks_of_spec_bench(tmp_path):
    categories = [
        "writing",
        "humanities",
        "translation",
        "summarization",
        "qa",
        "math_reasoning",
        "rag",
    ]
    for name in ("spec_bench", "mt_bench"):
        with gzip.open(tmp_path / SUITES[name].file, "wt", encoding="utf-8") as stream:
            stream.writelines(
                json.dumps({"category": category, "turns": ["What?"]}) + "\n"
                for category in categories
            )
    assert [chat.kind for chat in suite("spec_bench", None, str(tmp_path))] == [
        "mt_bench",
        "mt_bench",
        *categories[2:],
    ]
    assert [chat.kind for chat in suite("mt_bench", None, str(tmp_path))] == categories


@pytest.mark.parametrize("limit", [None, 1])
def test_without_a_file_the_hub_is_asked(monkeypatch, tmp_path, limit):
    requests = []

    class Records(list):
        def take(self, count):
            return self[:count]

    def load_dataset(*arguments, **options):
        requests.append((arguments, options))
        return Records(
            [
                {"prompt": ["Write.", "Rewrite."], "category": "writing"},
                {"prompt": ["Sum."], "category": "math"},
            ]
        )

    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(
            load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=OSError)
        ),
    )
    chats = suite("mt_bench", limit, str(tmp_path))
    assert requests == [
        (("HuggingFaceH4/mt_bench_prompts", None), {"split": "train", "streaming": True})
    ]
    assert [said(chat) for chat in chats] == [["Write.", "Rewrite."], ["Sum."]][:limit]


def test_any_file_of_turns_is_a_suite(tmp_path):
    (tmp_path / "own.jsonl").write_text(
        '{"turns": ["One?", "Two?"], "category": "x"}\n\n{"prompt": "Three?"}\n'
    )
    assert [said(chat) for chat in suite(str(tmp_path / "own.jsonl"), None)] == [
        ["One?", "Two?"],
        ["Three?"],
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "spec_bench",
            None,
            "eval.suites: spec_bench is not on the hub and there is no .*spec_bench.jsonl.gz; "
            "set eval.folder",
        ),
        (
            "specbench",
            None,
            "eval.suites: 'specbench' is not a file or folder; expected held_out, mt_bench, gsm8k",
        ),
        (
            "gsm8k",
            '{"answer": "2"}',
            r"gsm8k_test.jsonl.gz:1: the key 'question' with text is missing \(keys: answer\); "
            "this is not a record of gsm8k",
        ),
        (
            "gsm8k",
            '{"question": null}',
            r"gsm8k_test.jsonl.gz:1: the key 'question' with text is missing \(keys: question\); "
            "this is not a record of gsm8k",
        ),
        ("gsm8k", "\n", "eval.suites: gsm8k holds no prompts; is its file in eval.folder whole"),
        (
            "gsm8k",
            "[1]",
            "gsm8k_test.jsonl.gz:1: the line is a list, not an object; this is not a record of "
            "gsm8k",
        ),
        (
            "mt_bench",
            '{"turns": ["Hi", " "]}',
            "mt_bench.jsonl.gz:1: expected user turns that are not empty, found",
        ),
        ("mt_bench", '{"turns": ["Hi"]}\n{"turns"', "mt_bench.jsonl.gz:2: not JSON"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, text, message):
    if text is not None:
        with gzip.open(tmp_path / SUITES[name].file, "wt", encoding="utf-8") as stream:
            stream.write(text)
    with pytest.raises(UserError, match=message):
        suite(name, None, str(tmp_path))


def test_a_broken_archive_is_named(tmp_path):
    (tmp_path / "gsm8k_test.jsonl.gz").write_bytes(
        gzip.compress(b'{"question": "1 + 1?"}\n' * 99)[:-20]
    )
    with pytest.raises(UserError, match=r"gsm8k_test.jsonl.gz:.* cannot be read"):
        suite("gsm8k", None, str(tmp_path))


def test_no_hub_library_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError,
        match=r"alpaca.jsonl.gz, and the hub needs the datasets library .*; pip install datasets, "
        r"or set eval.folder",
    ):
        suite("alpaca", 3, str(tmp_path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the suites' files are not part of this repository")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mt_bench", 80),
        ("gsm8k", 1319),
        ("humaneval", 164),
        ("spec_bench", 480),
        ("eagle_cnn_dm", 80),
    ],
)
def test_the_published_files(name, count):
    chats = suite(name, None, str(SHARED))
    assert len(chats) == count
    if name == "mt_bench":
        assert (
            all(len(chat.later) == 1 for chat in chats) and len({chat.kind for chat in chats}) == 8
        )
    if name == "spec_bench":
        tasks = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
        assert Counter(chat.kind for chat in chats) == dict.fromkeys(tasks, 80)


def test_the_suites_of_the_report_have_their_definitions():
    assert {"mt_bench", "gsm8k", "cnn_dm", "humaneval", "alpaca", "spec_bench"} <= SUITES.keys()

"""Chats through the `datasets` library, from local folders; nothing is fetched."""

import sys

import pytest

from beagle_jax.data.chats import Chat, read_chats
from beagle_jax.data.hub import hub_chats
from beagle_jax.errors import UserError

QUESTION, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
RECORDS = [
    {"messages": [QUESTION, ANSWER], "prompt": None, "conversations": None},
    {"messages": None, "prompt": "Why?", "conversations": None},
    {
        "messages": None,
        "prompt": None,
        "conversations": [{"from": "gpt", "value": "cut"}, {"from": "gpt", "value": "off"}],
    },
    {
        "messages": None,
        "prompt": None,
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
    },
]


@pytest.fixture(scope="module")
def datasets():
    """The package. Its import takes seconds, which only the worker that runs these tests pays."""
    return pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def saved(datasets, tmp_path_factory) -> str:
    """A folder of save_to_disk with one split."""
    folder = tmp_path_factory.mktemp("saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(datasets, tmp_path_factory) -> str:
    """A folder with a data file, like a dataset's repository."""
    folder = tmp_path_factory.mktemp("files")
    datasets.Dataset.from_list(RECORDS).to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "files"])
def test_chats_of_a_local_dataset(kind, streaming, request, capsys):
    folder = request.getfixturevalue(kind)
    where = f"hf:{folder}[train], record"
    question = {"role": "user", "content": "Why?"}
    assert list(hub_chats(folder, "train", streaming)) == [
        Chat((QUESTION, ANSWER), f"{where} 1"),
        Chat((question,), f"{where} 2"),
        Chat((QUESTION, ANSWER), f"{where} 4"),
    ]
    assert "left out 1 of 4 conversations without a question" in capsys.readouterr().out


def test_streaming_reads_no_further_than_asked(datasets, files, monkeypatch):
    dataset = datasets.load_dataset(files, split="train", streaming=True)
    records = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: dataset.map(lambda record: records.append(1) or record),
    )
    next(hub_chats(files, "train", True))
    assert len(records) < len(RECORDS)


def test_a_slice_of_a_split(files):
    assert len(list(hub_chats(files, "train[:1]", False))) == 1


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (
            "/no/such/folder/at-all",
            "train",
            "data.source: hf:/no/such/folder/at-all, split 'train', cannot be opened",
        ),
        ("{files}", "test", "split 'test', cannot be opened"),
        ("{saved}", "test", "data.split: 'test' is not in .*; it holds train"),
    ],
)
def test_what_is_not_there_is_named(datasets, name, split, message, files, saved, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        list(hub_chats(name.format(files=files, saved=saved), split, False))


def test_a_bad_record_is_named(datasets, tmp_path):
    datasets.Dataset.from_list([{"text": "Hi"}]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"\[train\], record 1: the keys are text; expected"):
        list(hub_chats(str(tmp_path), "train", False))


def test_without_the_library_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:some/set needs the datasets library .*pip install"):
        hub_chats("some/set", "train", False)


def test_files_need_no_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi"}\n')
    assert len(read_chats(str(tmp_path / "a.jsonl"))) == 1

"""The folder of training text: what it was made for, and damaged parts."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from beagle_jax.config import DataConfig
from beagle_jax.data.fingerprint import fingerprints
from beagle_jax.data.folder import claim, is_claimed, read_parts, source_revision, write_part
from beagle_jax.data.share import ALONE, Share
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError

MADE_FOR = {
    "target": "a",
    "target_sha256": "1" * 64,
    "tokenizer_sha256": "2" * 64,
    "template_sha256": "3" * 64,
}


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return DataConfig(folder=str(tmp_path / "data"))


def test_the_same_settings_are_welcome_again(config):
    claim(config, MADE_FOR, ALONE)
    claim(config, MADE_FOR, ALONE)
    assert is_claimed(config.folder)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("target_sha256", "another target: its weights differ"),
        ("tokenizer_sha256", "another tokenizer"),
        ("template_sha256", "another chat template"),
    ],
)
def test_a_folder_made_for_something_else_is_refused_by_hash(config, key, named):
    claim(config, MADE_FOR, ALONE)
    with pytest.raises(
        UserError,
        match=rf"data was made for {named} \({key} {MADE_FOR[key][:12]} there, 999999999999 "
        r"now\); delete",
    ):
        claim(config, MADE_FOR | {key: "9" * 64}, ALONE)


def test_a_folder_of_before_there_were_hashes_is_still_taken(config, tmp_path):
    """An old settings.json: no hashes, no processes, none of the newer keys."""
    newer = ("split", "streaming", "answers", "max_chat_tokens", "states", "states_dtype")
    old = {
        "target": "a",
        **{key: value for key, value in config.model_dump().items() if key not in newer},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "settings.json").write_text(json.dumps(old))
    claim(config, MADE_FOR, ALONE)
    with pytest.raises(UserError, match="answers 'keep' there, 'regenerate' now"):
        claim(DataConfig(folder=config.folder, answers="regenerate"), MADE_FOR, ALONE)
    with pytest.raises(UserError, match="states_dtype None there, 'int8' now"):
        claim(DataConfig(folder=config.folder, states_dtype="int8"), MADE_FOR, ALONE)


def test_several_processes_claim_together(config):
    """The shares of `prepare --part`, in any order; nothing that is stored depends on them."""
    stored = []
    for index in (1, 0, 2):
        claim(config, MADE_FOR, Share(index, 3))
        stored.append(Path(config.folder, "settings.json").read_text())
    assert len(set(stored)) == 1


def test_a_folder_that_processes_of_0_1_0_filled_is_refused(config):
    claim(config, MADE_FOR, ALONE)
    path = Path(config.folder, "settings.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 2}))
    with pytest.raises(UserError, match=r"filled by 2 processes of version 0.1.0.*--export text"):
        claim(config, MADE_FOR, ALONE)


def test_parts_come_by_number(config, tmp_path):
    rows = {number: [Row([number], [True])] for number in (0, 2, 9999, 10000)}
    (tmp_path / "data").mkdir()
    for number in reversed(rows):
        write_part(config.folder, number, rows[number])
    assert list(read_parts(config.folder).items()) == list(rows.items())


DAMAGED_LINES = [
    "{",
    '{"tokens": [1]}',
    "[]",
    '{"tokens": [1], "supervised": 1}',
    '{"tokens": [1, 2], "supervised": [1]}',
    '{"tokens": [-1], "supervised": [1]}',
    '{"tokens": "1", "supervised": [1]}',
    '{"tokens": [1], "supervised": [7]}',
    '{"tokens": [], "supervised": []}',
    '{"tokens": [1], "supervised": [1]\xff}',
]


@pytest.mark.parametrize("line", DAMAGED_LINES)
def test_a_damaged_part_names_its_line(config, tmp_path, line):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "part-0000.jsonl"
    path.write_bytes(b'{"tokens": [1], "supervised": [1]}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=f"{path}:2: not a row of training text .*; delete"):
        read_parts(config.folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"target": "a\xff"}'])
def test_a_damaged_list_of_settings_is_named(config, tmp_path, text):
    claim(config, MADE_FOR, ALONE)
    path = tmp_path / "data" / "settings.json"
    path.write_bytes(text.encode("latin-1"))
    reads = (lambda: claim(config, MADE_FOR, ALONE), lambda: source_revision(config.folder))
    for call in reads:
        with pytest.raises(UserError, match=f"{path}: .*; delete data.folder, or set another"):
            call()


class Words:
    """A tokenizer of words, as much of it as a fingerprint reads."""

    def __init__(self, words="a b c", template="{{ messages }}", split=lambda text: text.split()):
        self.chat_template, self._words, self._split = template, words.split(), split

    def get_vocab(self):
        return {word: number for number, word in enumerate(self._words)}

    def encode(self, text):
        return [hash(word) for word in self._split(text)]


def test_each_hash_follows_what_it_names(tiny_params):
    base = fingerprints(tiny_params, Words())
    assert fingerprints(tiny_params, Words()) == base
    half = {
        "embed_VD": tiny_params["embed_VD"].astype(jnp.bfloat16),
        **{k: v for k, v in tiny_params.items() if k != "embed_VD"},
    }
    assert fingerprints(half, Words()) == base  # computing in another dtype is no other target
    layers = [
        *tiny_params["layers"][:-1],
        tiny_params["layers"][-1] | {"q_FD": tiny_params["layers"][-1]["q_FD"] * 1.01},
    ]
    changed = {
        "target_sha256": fingerprints(tiny_params | {"layers": layers}, Words()),
        "tokenizer_sha256": fingerprints(tiny_params, Words("a c b")),
        "template_sha256": fingerprints(tiny_params, Words(template="{{ messages[0] }}")),
    }
    for key, after in changed.items():
        assert {name for name in base if after[name] != base[name]} == {key}
    assert (
        fingerprints(tiny_params, Words(split=list))["tokenizer_sha256"] != base["tokenizer_sha256"]
    )

"""Files of token rows: what is written is what is mapped, and damage is named."""

import json
import mmap
from dataclasses import asdict

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from beagle_jax.data.rows_file import FORMAT, Header, open_rows, write_rows
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError

ROWS = [
    Row([5, 6, 7], [False, True, True]),
    Row([1], [False]),
    Row([9, 8, 7, 6], [False, True, False, True]),
]
HEADER = Header({"target": "x", "tokenizer_sha256": "1" * 64}, [{"name": "a", "sha256": "2"}], 3)


def check_same(path, rows) -> None:
    opened = open_rows(path)
    assert list(opened) == rows and opened[-1] == rows[-1] and opened[1:] == rows[1:]
    assert opened.answer_tokens_R.tolist() == [sum(row.supervised) for row in rows]


def test_rows_come_back_as_they_were(tmp_path):
    write_rows(tmp_path / "a.rows", ROWS, HEADER)
    check_same(tmp_path / "a.rows", ROWS)
    opened = open_rows(tmp_path / "a.rows")
    assert opened.prompt_tokens_R.tolist() == [1, 1, 1]
    assert (opened.header.made_for, opened.header.items) == (HEADER.made_for, 3)
    assert opened.header.sources == HEADER.sources


def test_a_row_of_another_place_is_seen(tmp_path):
    """The planted bug of `check_same`."""
    write_rows(tmp_path / "a.rows", ROWS[::-1], HEADER)
    with pytest.raises(AssertionError):
        check_same(tmp_path / "a.rows", ROWS)


@pytest.mark.parametrize(("token", "dtype"), [(2**16 - 1, np.uint16), (2**16, np.uint32)])
def test_tokens_take_the_bytes_that_they_need(tmp_path, token, dtype):
    write_rows(tmp_path / "a.rows", [Row([token, 3], [False, True])], Header())
    tokens_N = open_rows(tmp_path / "a.rows").tokens_N
    assert tokens_N.dtype == dtype and tokens_N.tolist() == [token, 3]


def test_rows_are_views_of_the_mapped_file(tmp_path):
    """A loader reads a row by its number, and no other byte of the file."""
    write_rows(tmp_path / "a.rows", ROWS, HEADER)
    opened = open_rows(tmp_path / "a.rows")
    tokens_L, supervised_L = opened.arrays(2)
    assert tokens_L.tolist() == ROWS[2].tokens and supervised_L.tolist() == ROWS[2].supervised
    assert np.shares_memory(tokens_L, opened.tokens_N)
    base = opened.tokens_N
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)


def test_a_part_may_have_no_row(tmp_path):
    write_rows(tmp_path / "a.rows", [], HEADER)
    assert list(open_rows(tmp_path / "a.rows")) == []


def changed(path, **arrays):
    held = load_file(path)
    opened = open_rows(path)
    save_file(held | arrays, path, {FORMAT: json.dumps(asdict(opened.header))})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": np.arange(8, dtype=np.uint16)}, "its rows are not those that its header"),
        ({"supervised": np.ones(8, bool)}, "its rows are not those that its header"),
        ({"start": np.array([0, 3, 3, 8])}, "its index does not divide 8 tokens into rows"),
        ({"start": np.array([0, 3, 4, 7])}, "its index does not divide 8 tokens into rows"),
        ({"start": np.array([0, 2, 4, 8])}, "its rows are not those that its header"),
        ({"answer_tokens": np.zeros(2, np.int32)}, "it has 8 tokens in 3 rows, and lists"),
        ({"tokens": np.zeros(8, np.float32)}, "has no array tokens of type U16 or U32"),
    ],
)
def test_what_was_changed_is_named(tmp_path, arrays, message):
    path = tmp_path / "a.rows"
    write_rows(path, ROWS, HEADER)
    changed(path, **arrays)
    with pytest.raises(UserError, match=f"{path}: {message}"):
        open_rows(path)


def test_what_is_no_file_of_rows_is_named(tmp_path):
    path = tmp_path / "a.rows"
    with pytest.raises(UserError, match=f"{path}: cannot be read as token rows"):
        open_rows(path)
    write_rows(path, ROWS, HEADER)
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"{path}: cannot be read as token rows"):
            open_rows(path)
    save_file({"tokens": np.zeros(1, np.uint16)}, path)
    with pytest.raises(UserError, match=f"{path}: its metadata has nothing; expected {FORMAT}"):
        open_rows(path)

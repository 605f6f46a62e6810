"""Tokens that end an answer of a model folder, from whichever of its files names them."""

import json
import logging
from pathlib import Path

import pytest
from test_weight_edges import folder_of

from beagle_jax.errors import UserError
from beagle_jax.weights.target import load_target


@pytest.fixture
def model(tmp_path):
    """Writes a folder with these end tokens; ... leaves the key, or the file, out."""

    def write(config=..., generation=..., token=None) -> Path:
        folder = folder_of(tmp_path, config={"eos_token_id": config})
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation is not ...:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": token}))
        return folder

    return write


def ends(folder: Path) -> tuple[int, ...]:
    return load_target(str(folder), "float32", str(folder)).eos_ids


@pytest.mark.parametrize(
    ("config", "generation", "token", "expected"),
    [
        (1, ..., None, (1,)),
        ([1, 3], ..., None, (1, 3)),
        (1, {"eos_token_id": [2, 5]}, None, (2, 5)),
        (1, {"eos_token_id": None}, None, (1,)),
        (1, {}, None, (1,)),
        (None, ..., "#", (2,)),
        (..., {"eos_token_id": None}, "#", (2,)),
        ([1, 2], ..., "#", (1, 2)),
    ],
)
def test_the_first_file_that_names_any_decides(model, caplog, config, generation, token, expected):
    with caplog.at_level(logging.WARNING):
        assert ends(model(config, generation, token)) == expected
    assert not caplog.records


def test_no_file_names_any(model):
    with pytest.raises(UserError, match=r"tokenizer_config.json names no eos_token, so that no"):
        ends(model(None))


def test_the_tokenizer_s_end_token_that_ends_nothing_is_named(model, caplog):
    assert ends(model(1, {"eos_token_id": [1, 5]}, "#")) == (1, 5)
    assert "end token, '#' (2), ends no answer: the model names 1, 5" in caplog.text


def test_an_end_token_beyond_the_vocabulary_is_named(model, caplog):
    assert ends(model(1, {"eos_token_id": [1, 61]})) == (1, 61)
    assert "eos_token_id names 61, and the vocabulary ends at 60" in caplog.text

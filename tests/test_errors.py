"""Errors hold what callers need beside their text, and what lower floors log is printed."""

import logging

import pytest

from beagle_jax import terminal
from beagle_jax.data.records import file_records
from beagle_jax.errors import BadFile, UserError
from beagle_jax.json_file import read_json


@pytest.mark.parametrize(
    ("text", "where"),
    [('{"a": 1}\n{"b": \n', ":2"), ('{"a": 1}\n{"b": "\udce9"}\n', ":2"), ("[1]\n]\n", ":2")],
    ids=["cut", "not UTF-8", "brackets"],
)
def test_a_bad_file_says_where(tmp_path, text, where):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadFile, match=f"^{path}{where}: not ") as caught:
        list(file_records(path))
    assert (caught.value.path, caught.value.where) == (path, where)


def test_a_file_that_is_bad_as_a_whole(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[]")
    with pytest.raises(UserError, match="holds a JSON list, expected an object") as caught:
        read_json(path, "")
    assert isinstance(caught.value, BadFile)
    assert (caught.value.path, caught.value.where) == (path, "")


def test_progress_is_printed_and_a_warning_goes_to_stderr(capsys):
    log = logging.getLogger("beagle_jax.data.chats")
    terminal.listen()
    terminal.listen()  # once is enough
    log.info("left out %d chats", 3)
    log.warning("two chats are the same")
    log.debug("not for users")
    assert capsys.readouterr() == ("left out 3 chats\n", "warning: two chats are the same\n")


def test_a_logger_that_is_set_up_already_is_left_alone(monkeypatch, capsys):
    logger = logging.getLogger("beagle_jax")
    monkeypatch.setattr(logger, "handlers", [logging.NullHandler()])
    terminal.listen()
    logging.getLogger("beagle_jax.data.chats").info("left out 3 chats")
    assert capsys.readouterr() == ("", "")

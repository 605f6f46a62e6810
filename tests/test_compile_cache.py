"""Where commands keep compiled programs."""

import os
import sys

import pytest

from beagle_jax import compile_cache
from beagle_jax.command import add_overrides, parser, read_config
from beagle_jax.compile_cache import keep_programs

FOLDER = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture
def no_jax(monkeypatch):
    """As in a command's process before it loads jax."""
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv(FOLDER, "")  # restored afterwards
    monkeypatch.delenv(FOLDER)


def test_a_command_keeps_programs_in_its_cache_folder(no_jax, tmp_path):
    made = parser("generate", "", "")
    add_overrides(made)
    read_config(made.parse_args(["--quiet", f"target.cache_dir={tmp_path}", "target.source=x"]))
    assert os.environ[FOLDER].startswith(str(tmp_path / "programs"))


def test_a_folder_that_the_user_named_is_used(no_jax, monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, "/elsewhere")
    keep_programs(str(tmp_path))
    assert os.environ[FOLDER] == "/elsewhere"


def test_a_process_that_has_loaded_jax_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER, raising=False)
    keep_programs(str(tmp_path))
    assert FOLDER not in os.environ


def test_another_processor_has_a_folder_of_its_own(monkeypatch, tmp_path):
    own = compile_cache._folder(str(tmp_path))
    assert own == compile_cache._folder(str(tmp_path))
    monkeypatch.setattr(compile_cache.platform, "machine", lambda: "another")
    assert compile_cache._folder(str(tmp_path)) != own

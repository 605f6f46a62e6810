"""Text, states, checkpoints, drafts and exports under URLs, with fsspec's store in memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_cases import ended, make_workplace, workplace  # noqa: F401
from loop_cases import (
    Breaking,
    config_for,
    interrupt,
    loader_of,
    same_params,
    saved_steps,
    train_stage,
)

from beagle_jax import convert, prepare, remote, train
from beagle_jax.config import load_config
from beagle_jax.data.states import store_states
from beagle_jax.errors import UsageError, UserError, run_main
from beagle_jax.files import whole, write_text
from beagle_jax.remote import check_url, fetch, is_url, local, publish, remove, size_of, url_of
from beagle_jax.training import checkpoint

# Programs of the tiny target are compiled, unless the cache has them.
pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def store(monkeypatch, tmp_path):
    """An empty store in memory; copies lie in a folder of the test."""
    monkeypatch.setenv("BEAGLE_JAX_REMOTE", str(tmp_path / "copies"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def forget_copies(tmp_path) -> None:
    """What another machine begins with."""
    shutil.rmtree(tmp_path / "copies", ignore_errors=True)


def names(store) -> list[str]:
    return sorted(store.find("/"))


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gs://bucket/x", True),
        ("memory://x", True),
        ("gs:/bucket/x", True),  # with one slash: refused, as a folder gs: would appear
        ("runs/data", False),
        ("/data/x:y", False),
        ("C:/data", False),
        ("hf:org/name", False),
        ("hf:/data/set", False),
        ("hf://datasets/org/name/x.jsonl", True),
        ("openai:http://127.0.0.1:8000/v1#m", False),
        ("pypi:name==1", False),
    ],
)
def test_urls_are_told_from_paths(name, expected):
    assert is_url(name) is expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gz://bucket/x", "the scheme gz:// is not supported; expected a local path, or a URL"),
        ("gs:/bucket/x", "looks like a URL with one slash; write gs://.."),
        ("file:///data/x", "write the path of a local file without file://"),
        ("memory://", "expected memory://, a bucket and a path, without .."),
        ("memory://a/../../b", "expected memory://, a bucket and a path, without .."),
    ],
)
def test_other_urls_are_refused(url, message):
    with pytest.raises(UserError) as caught:
        check_url(url)
    assert str(caught.value).startswith(f"{url}: ") and message in str(caught.value)


def test_a_package_that_a_scheme_needs_is_named(monkeypatch):
    def absent(scheme):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(UserError, match="gs:// needs a package: Please install gcsfs"):
        check_url("gs://bucket/of/this/test")


@pytest.mark.parametrize("setting", ["data.folder", "train.folder", "data.source", "draft.init"])
@pytest.mark.parametrize("url", ["gz://bucket/x", "gs:/bucket/x"])
def test_unsupported_schemes_are_refused_before_anything_is_written(tmp_path, setting, url):
    """Today's symptom was a local folder called `gs:`."""
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "beagle_jax.train", "--config", str(ROOT / "configs" / "quickstart.yaml")),
            f"{setting}={url}",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and f"{setting}: {url}: " in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", ["eval.folder", "eval.suites", "target.shape"])
def test_settings_that_are_local_say_so(setting):
    with pytest.raises(UsageError, match=f"{setting} is 'memory://x/y', but it is a local file"):
        load_config(ROOT / "configs" / "quickstart.yaml", [f"{setting}=memory://x/y"])


# Files


def test_a_copy_follows_its_url(store, tmp_path, caplog):
    caplog.set_level("INFO", "beagle_jax")
    store.pipe({"/a/x.txt": b"one", "/a/b/y.txt": b"two", "/a/z.states": b"large"})
    folder = fetch("memory://a", skip=("*.states",))
    assert folder == local("memory://a") and url_of(folder / "b") == "memory://a/b"
    texts = {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert texts == {"x.txt": "one", "y.txt": "two"}
    assert [record.getMessage() for record in caplog.records] == [
        f"copies 2 files of memory://a, 0.0 MB, to {folder}"
    ]
    fetch("memory://a", skip=("*.states",))
    assert len(caplog.records) == 1  # nothing changed
    store.pipe("/a/x.txt", b"six")
    store.rm("/a/b/y.txt")
    fetch("memory://a", skip=("*.states",))
    assert (folder / "x.txt").read_text() == "six" and not (folder / "b" / "y.txt").exists()
    assert size_of(folder / "z.states") == 5 and size_of(folder / "nothing") is None
    assert fetch(folder / "z.states").read_text() == "large"


def test_files_appear_at_the_url_whole_or_not_at_all(store):
    path = local("memory://a/x.json")
    path.parent.mkdir(parents=True)
    write_text(path, "first")
    assert store.cat("/a/x.json") == b"first" and path.read_text() == "first"

    def broken():
        with whole(path) as partial:
            partial.write_text("second, half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert names(store) == ["/a/x.json"] and store.cat("/a/x.json") == b"first"
    remove(path)
    assert names(store) == [] and not path.exists()


def test_a_folder_is_published_with_what_is_gone(store):
    folder = local("memory://a/draft")
    folder.mkdir(parents=True)
    (folder / "x").write_text("1")
    (folder / "y").write_text("2")
    publish(folder)
    assert names(store) == ["/a/draft/x", "/a/draft/y"]
    (folder / "x").unlink()
    (folder / "y").write_text("three")
    publish(folder)
    assert names(store) == ["/a/draft/y"] and store.cat("/a/draft/y") == b"three"


def test_local_files_are_left_alone(store, tmp_path):
    (tmp_path / "x").write_text("1")
    assert fetch(tmp_path / "x") == tmp_path / "x" and url_of(tmp_path / "x") is None
    publish(tmp_path)
    assert names(store) == [] and size_of(tmp_path / "x") == 1


# A whole run

FOLDERS = ["data.folder=memory://bucket/data", "train.folder=memory://bucket/run"]


def digest(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["sha256"]


def test_a_run_under_urls_is_that_of_a_disk(workplace, store, tmp_path, monkeypatch, capsys):
    """Also on a machine that has only the URLs, from the middle of the run."""
    argv = ["--config", workplace.config]
    assert run_main(train.main, argv) == 0
    there = workplace.folder
    half = ["train.late.steps=0"]
    assert run_main(train.main, [*argv, *FOLDERS, *half]) == 0
    for name in ("/bucket/run/log.jsonl", "/bucket/run/rows.json", "/bucket/data/settings.json"):
        assert name in names(store)
    assert "/bucket/run/checkpoints/early/3/sizes.json" in names(store)

    forget_copies(tmp_path)
    capsys.readouterr()
    assert run_main(train.main, [*argv, *FOLDERS]) == 0
    said = capsys.readouterr().err
    assert "files of memory://bucket/data" in said and "early stage: continues from step 3" in said
    drafts = [there / "run" / "draft", fetch("memory://bucket/run/draft")]
    weights = [(folder / "model.safetensors").read_bytes() for folder in drafts]
    assert weights[0] == weights[1]
    parts = sorted((there / "data").glob("part-*"))
    assert parts and all(
        store.cat(f"/bucket/data/{path.name}") == path.read_bytes()
        for path in parts
        if path.suffix in (".rows", ".states")
    )
    logs = [(there / "run" / "log.jsonl").read_text(), store.cat("/bucket/run/log.jsonl").decode()]
    losses = [[json.loads(line).get("loss") for line in log.splitlines()] for log in logs]
    assert [x for x in losses[0] if x] == [x for x in losses[1] if x]
    assert not Path("memory:").exists()

    # Decoding finds the draft there too, and an export is written there.
    forget_copies(tmp_path)
    out = "memory://bucket/torch"
    command = ["to-torch", "--config", workplace.config, FOLDERS[1], "--out", out]
    assert run_main(convert.main, command) == 0
    assert "/bucket/torch/model.safetensors" in names(store)
    status, message = ended(capsys, "convert", *command)
    assert status == 1 and f"--out {out}: this folder exists" in message


def test_a_run_that_publishes_nothing_is_seen(workplace, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "publish", lambda path: None)
    with pytest.raises(AssertionError):
        test_a_run_under_urls_is_that_of_a_disk(workplace, store, tmp_path, monkeypatch, capsys)


def test_text_is_exported_to_a_url_and_read_from_it(workplace, store, tmp_path, capsys):
    argv = ["--config", workplace.config, "data.states=online"]
    data = f"data.folder={tmp_path / 'first'}"
    url = "memory://texts/all.rows"
    assert run_main(prepare.main, [*argv, data, "--export", url]) == 0
    assert names(store) == ["/texts/all.rows"]
    forget_copies(tmp_path)
    capsys.readouterr()
    second = [f"data.source={url}", f"data.folder={tmp_path / 'second'}"]
    assert run_main(prepare.main, [*argv, *second]) == 0
    assert f"copies 1 files of {url}" in capsys.readouterr().err
    parts = [(tmp_path / name / "part-0000.rows").read_bytes() for name in ("first", "second")]
    tokens = [part[-200:] for part in parts]
    assert tokens[0] == tokens[1]


def test_states_of_other_machines_are_not_copied_to_look_at_them(store, tiny_params, tmp_path):
    """A process that writes its share downloads no states of the others."""
    from conftest import TINY
    from test_loader import rows_of_lengths

    rows, path = rows_of_lengths(4, 9, 5), local("memory://data/part-0000.states")
    path.parent.mkdir(parents=True)
    assert store_states(tiny_params, TINY, [(path, rows)]) is not None
    forget_copies(tmp_path)
    path.parent.mkdir(parents=True)
    assert store_states(tiny_params, TINY, [(path, rows)]) is None
    assert not path.exists()
    stored = remote.fetch(path)
    np.testing.assert_array_equal(len(stored.read_bytes()), 18 * TINY.hidden_size * 4)


# Checkpoints


def test_a_checkpoint_whose_upload_was_interrupted_is_set_aside(
    workplace,
    store,
    tmp_path,
    capsys,
):
    argv = ["--config", workplace.config, *FOLDERS, "train.late.steps=0"]
    assert run_main(train.main, argv) == 0
    store.rm("/bucket/run/checkpoints/early/3/sizes.json")
    forget_copies(tmp_path)
    capsys.readouterr()
    assert run_main(train.main, argv) == 0
    said = capsys.readouterr().err
    assert "this checkpoint is not complete (its sizes.json is missing" in said
    assert "early stage: continues from step 2" in said


def cut_and_resumed(frozen, monkeypatch, tmp_path, caplog) -> dict:
    """A stage under a URL that is interrupted, and goes on where another machine would."""
    caplog.set_level("INFO")
    monkeypatch.setattr(checkpoint, "_apart", lambda name: True)
    config = config_for("memory://bucket/run")
    with pytest.raises(KeyboardInterrupt):
        train_stage(config, frozen, Breaking(loader_of(20, 1), 8, interrupt))
    forget_copies(tmp_path)
    params = train_stage(config, frozen)
    assert "early stage: continues from step 5 of 12" in caplog.text
    assert saved_steps(config) == [10, 12]
    return params


def test_processes_without_a_common_disk_collect_and_spread_the_state(
    frozen, store, monkeypatch, tmp_path, caplog
):
    """As several processes under a URL do; tests/test_processes.py has two of them."""
    expected = train_stage(config_for(tmp_path / "whole"), frozen)
    same_params(cut_and_resumed(frozen, monkeypatch, tmp_path, caplog), expected)


def test_planted_bug_the_state_that_was_read_is_not_spread(
    frozen, store, monkeypatch, tmp_path, caplog
):
    expected = train_stage(config_for(tmp_path / "whole"), frozen)
    monkeypatch.setattr(
        checkpoint, "_placed", lambda values, like: like if values.ndim else jnp.asarray(values)
    )
    with pytest.raises(AssertionError):
        same_params(cut_and_resumed(frozen, monkeypatch, tmp_path, caplog), expected)


def test_stores_that_orbax_opens_are_written_by_all_processes(store, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    folder = "memory://bucket/run/checkpoints/early"
    assert checkpoint.checkpoint_folder(folder) == local(folder)
    monkeypatch.setattr(checkpoint, "check_url", lambda name: None)
    assert str(checkpoint.checkpoint_folder("gs://bucket/run")) == "gs://bucket/run"

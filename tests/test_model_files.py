"""Which files of a folder are the model: extra files next to it, and the hub's cache."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import llama_tensors
from safetensors.numpy import save_file
from test_shards import FIRST, SECOND, SPEC, shards, weight_map, written

from beagle_jax.errors import UserError
from beagle_jax.hub_cache import snapshot_folder
from beagle_jax.weights import hf, model_files
from beagle_jax.weights.hf import HFFolder, download
from beagle_jax.weights.target import fill_params, open_source

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def whole(folder: Path) -> None:
    """A checkpoint in one file."""
    save_file(llama_tensors(), folder / "model.safetensors")


def sharded(folder: Path) -> None:
    """A checkpoint in two files, with their index."""
    written(folder, shards(), weight_map(shards()))


def numbered(folder: Path) -> None:
    """A checkpoint in two files without an index."""
    for file, tensors in shards().items():
        save_file(tensors, folder / file)


def renamed(folder: Path) -> None:
    """A checkpoint in one file with another name."""
    save_file(llama_tensors(), folder / "weights.safetensors")


def listed_elsewhere(folder: Path) -> None:
    """The index lists files with other names."""
    names = {FIRST: "part-a.safetensors", SECOND: "part-b.safetensors"}
    held = {names[file]: tensors for file, tensors in shards().items()}
    written(folder, held, weight_map(held))


def _tensor_file(name: str):
    return lambda folder: save_file({"norm.weight": np.ones(64, np.float32)}, folder / name)


def _bytes(name: str):
    return lambda folder: (folder / name).write_bytes(b"\0\x05\x16\x07 not what the name says")


BESIDE = {
    "consolidated": _tensor_file("consolidated.safetensors"),
    "consolidated shard": _tensor_file("consolidated-00001-of-00002.safetensors"),
    "consolidated index": _bytes("consolidated.safetensors.index.json"),
    "index of pickles": lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{}"),
    "pickle": _bytes("pytorch_model.bin"),
    "apple double": _bytes("._model.safetensors"),
    "apple double of a shard": _bytes(f"._{FIRST}"),
    "apple double of the index": _bytes("._model.safetensors.index.json"),
    "finder": _bytes(".DS_Store"),
    "optimizer": _tensor_file("optimizer.safetensors"),
    "optimizer shard": _tensor_file("optimizer-00001-of-00002.safetensors"),
    "trainer": _bytes("training_args.bin"),
    "random states": _tensor_file("random_states_0.safetensors"),
    "adapter": _tensor_file("adapter_model.safetensors"),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("model", [whole, sharded, numbered, renamed, listed_elsewhere])
def test_what_lies_beside_the_model_is_not_read(tmp_path, model, beside):
    model(tmp_path)
    expected = dict(HFFolder(tmp_path).tensors())
    BESIDE[beside](tmp_path)
    opened = HFFolder(tmp_path)
    fill_params(SPEC, opened, jnp.dtype("float32"), "here")
    tensors = dict(opened.tensors())
    assert tensors.keys() == expected.keys() == llama_tensors().keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array)


@pytest.mark.parametrize("beside", ["consolidated", "optimizer", "adapter"])
def test_planted_bug_every_file_is_the_model(tmp_path, beside, monkeypatch):
    monkeypatch.setattr(hf, "model_files", lambda folder: sorted(folder.glob("*.safetensors")))
    whole(tmp_path)
    BESIDE[beside](tmp_path)
    with pytest.raises(UserError, match=r"extra tensor norm.weight"):
        fill_params(SPEC, HFFolder(tmp_path), jnp.dtype("float32"), "here")


def test_a_model_of_any_name_is_read_beside_nothing_else(tmp_path):
    _tensor_file("value_head.safetensors")(tmp_path)
    whole(tmp_path)
    assert [path.name for path in model_files.model_files(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize("files", [["adapter_config.json"], ["adapter_model.safetensors"], "both"])
def test_an_adapter_alone_is_named(tmp_path, files):
    for name in ["adapter_config.json", "adapter_model.safetensors"] if files == "both" else files:
        (_tensor_file if name.endswith("tensors") else _bytes)(name)(tmp_path)
    with pytest.raises(
        UserError, match=r"this is a LoRA adapter \(adapter_.*\), not a model; merge"
    ):
        open_source(str(tmp_path), tmp_path)


def test_an_adapter_beside_the_model_is_told(tmp_path, capsys):
    whole(tmp_path)
    HFFolder(tmp_path)
    assert capsys.readouterr().err == ""
    BESIDE["adapter"](tmp_path)
    HFFolder(tmp_path)
    printed = capsys.readouterr().err
    assert "the adapter adapter_model.safetensors is beside the model and is not applied" in printed


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ("consolidated", "no file of a model in this folder, only consolidated.safetensors"),
        ("optimizer", "no file of a model in this folder, only optimizer.safetensors"),
        ("apple double", r"no \*.safetensors file in this folder; convert the checkpoint"),
        ("pickle", r"no \*.safetensors file in this folder; convert the checkpoint"),
    ],
)
def test_a_folder_without_a_model_says_what_it_holds(tmp_path, beside, message):
    BESIDE[beside](tmp_path)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path), tmp_path)


def test_a_folder_of_gguf_files_is_led_to_the_file(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"to read the GGUF file, name it: tiny.gguf"):
        open_source(str(tmp_path), tmp_path)


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository's folder in the hub's cache: files are links into `blobs`."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    whole(repository / "blobs")
    (repository / "blobs" / "model.safetensors").rename(repository / "blobs" / "1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (repository / "blobs" / "2").write_text(json.dumps({"model_type": "llama"}))
    (snapshot / "config.json").symlink_to("../../blobs/2")
    return repository


@pytest.mark.parametrize("below", ["", "snapshots", f"snapshots/{COMMIT}"])
def test_a_repository_of_the_hub_cache_stands_for_its_snapshot(repository, below, monkeypatch):
    opened = open_source(str(repository / below), repository)
    assert opened.path == repository / "snapshots" / COMMIT
    monkeypatch.chdir(repository / below)
    assert open_source(".", repository).path.resolve() == opened.path.resolve()


def test_of_several_snapshots_refs_main_names_the_one(repository):
    shutil.copytree(repository / "snapshots" / COMMIT, repository / "snapshots" / OTHER)
    assert open_source(str(repository), repository).path.name == COMMIT
    (repository / "refs" / "main").write_text(OTHER + "\n")
    assert open_source(str(repository), repository).path.name == OTHER
    (repository / "refs" / "main").write_text("a" * 40)
    with pytest.raises(UserError, match=rf"target.source: .* \(snapshots: {COMMIT}, {OTHER}\)"):
        open_source(str(repository), repository)


def test_a_repository_without_the_commit_of_refs_main(repository):
    shutil.rmtree(repository / "refs")
    assert open_source(str(repository), repository).path.name == COMMIT
    shutil.rmtree(repository / "snapshots" / COMMIT)
    with pytest.raises(UserError, match=r"names no snapshot that is there \(snapshots: none\)"):
        open_source(str(repository), repository)


def test_other_folders_stand_for_themselves(tmp_path):
    (tmp_path / "my_model" / "snapshots" / "1").mkdir(parents=True)
    for path in (tmp_path / "my_model", tmp_path / "nowhere"):
        assert snapshot_folder(path, "target.source") == path


def test_data_sets_of_the_hub_cache_have_snapshots_too(tmp_path):
    snapshot = tmp_path / "datasets--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert snapshot_folder(snapshot.parent.parent, "data.source") == snapshot


@pytest.mark.parametrize("where", ["own", "hub"])
def test_offline_the_own_cache_is_used_and_then_the_hub_s(repository, where, monkeypatch, capsys):
    """The library decides what a snapshot is. Only the switch to offline is stubbed."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True, raising=False)
    empty = repository.parent.parent / "empty"
    caches = {"own": repository.parent if where == "own" else empty}
    monkeypatch.setattr(
        constants, "HF_HUB_CACHE", str(repository.parent if where == "hub" else empty)
    )
    assert download("org/name", caches["own"]) == repository / "snapshots" / COMMIT
    printed = capsys.readouterr().err
    assert ("hf:org/name is read from the hub's cache" in printed) == (where == "hub")
    with pytest.raises(UserError, match="hf:org/other could not be downloaded"):
        download("org/other", caches["own"])


@pytest.mark.parametrize("with_index", [False, True])
def test_a_whole_file_is_read_and_parts_beside_it_are_named(tmp_path, with_index, caplog):
    """As transformers chooses."""
    numbered(tmp_path)
    if with_index:
        sharded(tmp_path)
    tensors = {name: array + 1 for name, array in llama_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    held = dict(HFFolder(tmp_path).tensors())
    assert held.keys() == tensors.keys()
    np.testing.assert_array_equal(held["model.norm.weight"], tensors["model.norm.weight"])
    assert "model.safetensors is read; the parts beside it (2 files) are not" in caplog.text


def test_a_cache_folder_whose_download_did_not_end_is_named(tmp_path):
    (tmp_path / "models--org--name" / "blobs").mkdir(parents=True)
    with pytest.raises(UserError, match="without snapshots; its download did not end"):
        snapshot_folder(tmp_path / "models--org--name", "target.source")


def test_a_gguf_file_may_be_in_capitals(tmp_path):
    (tmp_path / "MODEL.GGUF").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="not a readable GGUF file"):
        open_source(str(tmp_path / "MODEL.GGUF"), tmp_path)

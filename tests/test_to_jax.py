"""Targets as orbax checkpoints: equal to the source, laid out over a mesh, checked for damage."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from conftest import environment
from convert_cases import refused
from gguf_files import llama_tensors, write_llama
from safetensors.numpy import save_file
from test_resume import small_disk

from beagle_jax import convert, generate, train
from beagle_jax.errors import UserError, run_main
from beagle_jax.weights.gguf import GGUFFile
from beagle_jax.weights.orbax_target import OrbaxFolder, _by_name
from beagle_jax.weights.target import load_target


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """One model as a GGUF file and as a Hugging Face folder."""
    root = tmp_path_factory.mktemp("to_jax")
    write_llama(root / "tiny.gguf", llama_tensors())
    opened, folder = GGUFFile(root / "tiny.gguf"), root / "folder"
    opened.tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**opened.config(), "eos_token_id": 2}))
    save_file(llama_tensors(), folder / "model.safetensors")
    return {"gguf": root / "tiny.gguf", "folder": folder}


def to_jax(source: Path, out: Path, *more: str) -> int:
    config = out.parent / "run.yaml"
    config.write_text(yaml.safe_dump({"target": {"source": str(source)}}))
    return run_main(convert.main, ["to-jax", "--config", str(config), "--out", str(out), *more])


def same_target(actual, expected) -> None:
    assert (actual.spec, actual.eos_ids) == (expected.spec, expected.eos_ids)
    assert (
        actual.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
        and actual.tokenizer.chat_template == expected.tokenizer.chat_template
    )
    assert jax.tree.structure(actual.params) == jax.tree.structure(expected.params)
    for mine, theirs in zip(
        jax.tree.leaves(actual.params), jax.tree.leaves(expected.params), strict=True
    ):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_bit_equal_to_the_source(sources, tmp_path, kind):
    assert to_jax(sources[kind], tmp_path / "out") == 0
    for dtype in ("float32", "bfloat16"):
        same_target(
            load_target(str(tmp_path / "out"), dtype, "unused"),
            load_target(str(sources[kind]), dtype, "unused"),
        )


# A process with four devices writes a folder, and takes it as training does on another mesh: arrays
# born in parts, and the values.
WRITE_AND_RESTORE = """
import sys, jax, numpy as np
from beagle_jax import convert
from beagle_jax.config import MeshConfig, TargetConfig
from beagle_jax.errors import run_main
from beagle_jax.sharding import make_mesh
from beagle_jax.weights.target import configured_target
config, out, read = sys.argv[1:]
assert run_main(convert.main, ["to-jax", "--config", config, "--out", out]) == 0
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
params = configured_target(TargetConfig(source=out), mesh, decoding=False).params
gate_FD = params["layers"][0]["gate_FD"]
assert gate_FD.shape == (96, 64) and gate_FD.addressable_shards[0].data.shape[0] == 48
np.savez(read, *[np.asarray(leaf) for leaf in jax.tree.leaves(params)])
"""


def stored_parts(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of the parts in which each array is stored."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder / "arrays").item_metadata.tree
    return {name: leaf.storage.chunk_shape for name, leaf in _by_name(tree).items()}


def separate_target(source: Path):
    """Loads a target as training does, whose projections are not joined."""
    return load_target(str(source), "float32", "unused", join=False)


def test_a_mesh_writes_in_parts_and_another_reads_in_its_own(sources, tmp_path):
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    config.write_text(
        yaml.safe_dump(
            {"target": {"source": str(sources["folder"])}, "mesh": {"data": 1, "tensor": 4}}
        )
    )
    command = [
        sys.executable,
        "-c",
        WRITE_AND_RESTORE,
        str(config),
        str(out),
        str(tmp_path / "read.npz"),
    ]
    done = subprocess.run(command, env=environment(4), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts, expected = stored_parts(out), separate_target(sources["folder"])
    assert (parts["layers.0.gate_FD"], parts["layers.0.down_DF"]) == ((24, 64), (64, 24))
    same_target(separate_target(out), expected)
    for mine, theirs in zip(
        np.load(tmp_path / "read.npz").values(), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


CHATS = [
    {"messages": [{"role": "user", "content": "ab a"}, {"role": "assistant", "content": answer}]}
    for answer in ("b ab 1", "2 a b")
]


def commands(target: Path, folder: Path) -> tuple[list[dict], dict]:
    """Returns the log of two training steps, and what prompt lookup then decodes."""
    folder.mkdir()
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    settings = {
        "target": {"source": str(target)},
        "data": {
            "source": str(folder / "chats.jsonl"),
            "folder": str(folder / "data"),
            "answer_tokens": 8,
        },
        "train": {
            "folder": str(folder / "run"),
            "batch": 2,
            "row_tokens": 16,
            "early": {"steps": 2, "window": 2},
            "late": "none",
        },
        "decode": {"levels": 2, "max_new_tokens": 6},
        "log": {"every": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    assert run_main(train.main, ["--config", str(folder / "run.yaml")]) == 0
    assert (
        run_main(
            generate.main,
            ["--config", str(folder / "run.yaml"), "ab", "--json", str(folder / "answer.json")],
        )
        == 0
    )
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [line for line in log if "loss" in line], json.loads(
        (folder / "answer.json").read_text()
    )


@pytest.mark.usefixtures("shared_steps")
def test_training_and_decoding_take_the_folder_for_the_target(sources, tmp_path, capsys):
    assert to_jax(sources["folder"], tmp_path / "out") == 0
    (expected_log, expected), (log, answer) = (
        commands(target, tmp_path / name)
        for name, target in (("hf", sources["folder"]), ("jax", tmp_path / "out"))
    )
    assert len(log) == 2 and [line["loss"] for line in log] == [
        line["loss"] for line in expected_log
    ]
    assert answer["equal"] and {key: answer[key] for key in ("text", "tokens", "rounds")} == {
        key: expected[key] for key in ("text", "tokens", "rounds")
    }
    assert "loading target" in capsys.readouterr().err


# A thread of orbax that has lost its event loop says so when the write it waited for has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("limit", [1000, 20_000], ids=["tokenizer", "arrays"])
def test_a_full_disk_leaves_no_half_folder(sources, tmp_path, capsys, limit):
    with small_disk(limit):
        message = refused(capsys, to_jax(sources["folder"], tmp_path / "out"))
    assert (
        "out: cannot be written (" in message
        and "free some space or choose another folder" in message
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_half_precision_stays_what_it_is(sources, tmp_path, capsys):
    assert to_jax(sources["folder"], tmp_path / "out", "target.dtype=bfloat16") == 0
    same_target(
        load_target(str(tmp_path / "out"), "bfloat16", "unused"),
        load_target(str(sources["folder"]), "bfloat16", "unused"),
    )
    with pytest.raises(
        UserError,
        match=r"its arrays are bfloat16, and target.dtype is float32; set target.dtype=bfloat16",
    ):
        load_target(str(tmp_path / "out"), "float32", "unused")


def test_other_folders_are_refused(sources, tmp_path, capsys):
    assert to_jax(sources["folder"], tmp_path / "out") == 0
    out = tmp_path / "out"
    assert "is already an output of convert to-jax" in refused(
        capsys, to_jax(out, tmp_path / "again")
    )
    assert "target.quantize is int8, which is for decoding; set target.quantize=none" in refused(
        capsys,
        to_jax(
            sources["folder"], tmp_path / "again", "target.quantize=int8", "target.group_size=16"
        ),
    )
    assert "this folder exists; choose another, or give --overwrite" in refused(
        capsys, to_jax(sources["folder"], out)
    )
    (out / "stale").write_text("")
    assert to_jax(sources["folder"], out, "--overwrite") == 0 and not (out / "stale").exists()
    settings = json.loads((out / "target.json").read_text())
    (out / "target.json").write_text(json.dumps({**settings, "model_type": "beagle_draft"}))
    with pytest.raises(
        UserError, match=r"target.json: model_type is 'beagle_draft', expected 'beagle_target'"
    ):
        OrbaxFolder(out)
    (out / "target.json").unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors file in this folder"):
        load_target(str(out), "float32", "unused")


def test_a_config_that_contradicts_the_arrays(sources, tmp_path):
    assert to_jax(sources["folder"], tmp_path / "out") == 0
    path = tmp_path / "out" / "config.json"
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), "intermediate_size": 32, "num_hidden_layers": 3}
        )
    )
    with pytest.raises(UserError, match="its arrays do not fit its config") as caught:
        load_target(str(tmp_path / "out"), "float32", "unused")
    assert "missing array layers.2.q_FD" in str(
        caught.value
    ) and "layers.0.gate_FD is float32 [96, 64], expected float32 [32, 64]" in str(caught.value)


# tensorstore leaves an exception in a future that nobody asks.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_arrays_are_noticed(sources, tmp_path):
    """Every byte that orbax wrote is either checked or makes no difference."""
    assert to_jax(sources["folder"], tmp_path / "out") == 0
    expected = load_target(str(tmp_path / "out"), "float32", "unused")
    files = sorted(
        path
        for path in (tmp_path / "out" / "arrays").rglob("*")
        if path.is_file() and path.stat().st_size
    )
    ended = []
    for case in range(24):
        rng = np.random.default_rng(case)
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] ^= rng.integers(1, 256)
        path.write_bytes(changed if case % 4 else whole[: len(whole) // 2])
        try:
            same_target(load_target(str(tmp_path / "out"), "float32", "unused"), expected)
            ended.append("right")
        except UserError:
            ended.append("refused")
        path.write_bytes(whole)
    assert "refused" in ended

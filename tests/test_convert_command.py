"""The convert command: whole folders or none, replacement, and PyTorch to JAX."""

import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from command_cases import make_target
from convert_cases import PROVENANCE, exported, from_torch, place, refused, to_torch, torch_draft  # noqa: F401 (fixtures)
from safetensors.numpy import load_file, save_file
from test_resume import small_disk

from beagle_jax import convert
from beagle_jax.commands import convert as converting
from beagle_jax.errors import run_main
from beagle_jax.weights import torch_export
from beagle_jax.weights.draft import load_draft, save_draft
from beagle_jax.weights.hf import HFFolder

# The comparison sees what is wrong


def change_module(monkeypatch, *changes: tuple[str, str]) -> str:
    """Changes some text of the exported module; returns the expected message."""
    right = wrong = torch_export.module_source("modeling_beagle")
    for old, new in changes:
        wrong = wrong.replace(old, new)
    assert wrong != right
    source = torch_export.module_source
    monkeypatch.setattr(
        torch_export,
        "module_source",
        lambda name: wrong if name == "modeling_beagle" else source(name),
    )
    return "differ from those of the JAX block: states by"


def swapped_in_module(monkeypatch):
    """The module uses gate_proj and up_proj the wrong way round."""
    swap = (
        ("gate_proj(z", "temporary(z"),
        ("up_proj(z", "gate_proj(z"),
        ("temporary(z", "up_proj(z"),
    )
    return change_module(monkeypatch, *swap)


def late_keys(monkeypatch):
    """The module lets a query see the state at its own position."""
    return change_module(
        monkeypatch, ("positions_S[None] < positions_T", "positions_S[None] <= positions_T")
    )


def wrong_rows(monkeypatch):
    """The module scores the first tokens instead of the listed ones."""
    return change_module(
        monkeypatch, ("head_VD[self.hot_tokens.long()]", "head_VD[: len(self.hot_tokens)]")
    )


def swapped_in_file(monkeypatch):
    """The file holds keys and values the wrong way round."""
    write = torch_export.write_tensors

    def wrong(path, tensors):
        names = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
        write(path, {**tensors, names[0]: tensors[names[1]], names[1]: tensors[names[0]]})

    monkeypatch.setattr(torch_export, "write_tensors", wrong)
    return "differ from those of the JAX draft (self_attn.k_proj.weight, self_attn.v_proj.weight)"


@pytest.mark.parametrize("bug", [swapped_in_module, late_keys, wrong_rows, swapped_in_file])
@pytest.mark.parametrize("before", [False, True], ids=["new", "overwrite"])
def test_a_planted_bug_leaves_no_folder(place, tmp_path, monkeypatch, capsys, bug, before):
    if before:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text('{"model_type": "beagle_draft"}')
    expected = bug(monkeypatch)
    status = to_torch(place, "hot", tmp_path / "out", "--overwrite")
    captured = capsys.readouterr()
    assert status == 1 and expected in captured.err and "draft written" not in captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * before
    assert (
        not before
        or (tmp_path / "out" / "config.json").read_text() == '{"model_type": "beagle_draft"}'
    )


def test_without_torch_the_message_says_how_to_get_it(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    status = to_torch(place, "hot", tmp_path / "out")
    assert "PyTorch is not installed, and converting needs it: pip install torch" in refused(
        capsys, status
    )
    assert not any(tmp_path.iterdir())


# The output folder


def test_an_existing_folder_is_refused_or_replaced_as_a_whole(place, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert to_torch(place, "hot", out) == 0
    (out / "stale.txt").write_text("left from before")
    assert "this folder exists; choose another, or give --overwrite" in refused(
        capsys, to_torch(place, "whole", out)
    )
    assert (out / "stale.txt").exists()
    assert to_torch(place, "whole", out, "--overwrite") == 0
    assert not (out / "stale.txt").exists() and "hot_tokens" not in load_file(
        out / "model.safetensors"
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_overwriting_does_not_lose_other_things(place, exported, tmp_path, capsys):
    for source in (place.folder / "hot", place.folder):
        status = to_torch(place, "hot", source, "--overwrite")
        assert "this folder holds the files to convert" in refused(capsys, status)
    status = from_torch(
        place, exported["hot"] / "model.safetensors", exported["hot"], "--overwrite"
    )
    assert "this folder holds the files to convert" in refused(capsys, status)
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, place.folder / "target"):  # a target has a config.json too
        assert "this folder holds no output of convert or train" in refused(
            capsys, to_torch(place, "hot", out, "--overwrite")
        )
    assert (place.folder / "target" / "model.safetensors").exists()
    assert "a file of this name exists" in refused(
        capsys, to_torch(place, "hot", tmp_path / "thesis.txt", "--overwrite")
    )
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_that_cannot_be_made_is_named(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status = to_torch(place, "hot", tmp_path / "file" / "out")
    assert f"--out {tmp_path}/file/out: cannot be written" in refused(capsys, status)


@pytest.mark.parametrize("before", [False, True], ids=["new", "overwrite"])
def test_a_full_disk_leaves_no_half_folder(place, exported, tmp_path, capsys, before):
    """In both directions an existing folder stays as it was."""
    if before:
        shutil.copytree(exported["hot"], tmp_path / "out")
    with small_disk(4000):
        statuses = [
            to_torch(place, "hot", tmp_path / "out", "--overwrite"),
            from_torch(place, exported["hot"], tmp_path / "out", "--overwrite"),
        ]
    message = refused(capsys, max(statuses))
    assert (
        statuses == [1, 1]
        and message.count("cannot be written (") == 2
        and message.count("free some space or choose another folder") == 2
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * before
    assert (
        not before
        or (tmp_path / "out" / "model.safetensors").read_bytes()
        == (exported["hot"] / "model.safetensors").read_bytes()
    )


def test_a_failed_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    right, calls = os.replace, []

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("no")
        right(*arguments)

    monkeypatch.setattr(converting.os, "replace", second_fails)
    with pytest.raises(OSError, match="no"), converting.staged(tmp_path / "out") as folder:
        (folder / "new").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/old",
    ]


# From PyTorch


@pytest.mark.parametrize("name", ["whole", "hot"])
@pytest.mark.parametrize("of", ["folder", "file"])
def test_a_round_trip_is_exact(place, exported, tmp_path, name, of):
    source = exported[name] if of == "folder" else exported[name] / "model.safetensors"
    assert from_torch(place, source, tmp_path / "back") == 0
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (
            place.folder / name / file
        ).read_bytes(), file
    assert len(list((tmp_path / "back").iterdir())) == 2


def test_what_torch_saves_again_comes_back(place, exported, tmp_path):
    torch_draft(exported["hot"]).save_pretrained(tmp_path / "saved")
    assert from_torch(place, tmp_path / "saved", tmp_path / "back") == 0
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (place.folder / "hot", tmp_path / "back")
    )
    assert before.keys() == after.keys() and all(
        np.array_equal(before[name], after[name]) for name in before
    )
    assert json.loads((tmp_path / "back" / "config.json").read_text())["versions"] == {
        "jax": "0.10.2"
    }


def test_the_list_of_scored_tokens_may_not_be_lost(place, exported, tmp_path, capsys):
    tensors = load_file(exported["hot"] / "model.safetensors")
    del tensors["hot_tokens"]
    (tmp_path / "there").mkdir()
    save_file(tensors, tmp_path / "there" / "model.safetensors")
    (tmp_path / "there" / "config.json").write_bytes((exported["hot"] / "config.json").read_bytes())
    assert "missing tensor hot_tokens [220]" in refused(
        capsys, from_torch(place, tmp_path / "there", tmp_path / "here")
    )


# The command


def test_drafts_of_another_target_are_refused(place, exported, tmp_path, capsys):
    make_target(tmp_path / "target")
    settings = json.loads((tmp_path / "target" / "config.json").read_text())
    (tmp_path / "target" / "config.json").write_text(
        json.dumps({**settings, "rope_theta": 5e5, "rope_parameters": None})
    )
    other = f"target.source={tmp_path / 'target'}"
    for status in (
        to_torch(place, "hot", tmp_path / "out", other),
        from_torch(place, exported["hot"], tmp_path / "out", other),
    ):
        assert status == 1
    message = refused(capsys, status)
    assert (
        message.count("this draft belongs to another target (rope_theta") == 2
        and not (tmp_path / "out").exists()
    )


def test_a_draft_of_another_public_target_is_refused(place, tmp_path, capsys, monkeypatch):
    """Two targets may have one shape. Public names tell them apart, names of folders do not."""
    draft = load_draft(place.folder / "hot", place.target.spec)
    monkeypatch.setattr(converting, "open_source", lambda *_: HFFolder(place.folder / "target"))
    for made_for, source_named, refuses in (
        ("hf:org/chat", "hf:org/code", True),
        ("hf:org/chat@v1", "hf:org/chat@v2", True),
        ("hf:org/chat", "hf:org/chat@v2", False),
        ("hf:org/chat", "a/folder", False),
    ):
        source = tmp_path / "native"
        save_draft(source, replace(draft, provenance={**PROVENANCE, "target": made_for}))
        status = to_torch(
            place, source, tmp_path / "out", f"target.source={source_named}", "--overwrite"
        )
        assert status == refuses
        if refuses:
            assert (
                f"{source}: this draft belongs to another target ({made_for}, and target.source is "
                f"{source_named})" in refused(capsys, status)
            )
        else:
            assert (
                from_torch(
                    place,
                    tmp_path / "out",
                    tmp_path / "back",
                    f"target.source={source_named}",
                    "--overwrite",
                )
                == 0
            )
            other = from_torch(
                place,
                tmp_path / "out",
                tmp_path / "back",
                "target.source=hf:org/code",
                "--overwrite",
            )
            assert "this draft belongs to another target (hf:org/chat" in refused(capsys, other)


@pytest.mark.parametrize("of", ["native", "torch"])
def test_a_changed_bit_is_noticed(place, exported, tmp_path, capsys, of):
    folder = tmp_path / "there"
    shutil.copytree(place.folder / "hot" if of == "native" else exported["hot"], folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    status = (
        to_torch(place, folder, tmp_path / "out")
        if of == "native"
        else from_torch(place, folder, tmp_path / "out")
    )
    assert f"{folder}: settings and tensors do not match the checksum in config.json" in refused(
        capsys, status
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "arguments are required: --out"),
        (["to-torch", "--config", "x"], "arguments are required: --out"),
        (["sideways", "--config", "x", "--out", "y"], "invalid choice: 'sideways'"),
        (
            ["to-torch", "--config", "x", "--out", "y", "--source", "z"],
            "--source is not an option of to-torch",
        ),
        (
            ["from-torch", "--config", "x", "--out", "y", "--source", "z", "--report", "r"],
            "--report is not an option of from-torch",
        ),
        (["from-torch", "--config", "x", "--out", "y"], "from-torch needs --source"),
    ],
)
def test_usage(capsys, argv, expected):
    status = run_main(convert.main, argv)
    assert status == 2 and expected in refused(capsys, status)


def test_the_draft_of_the_training_folder_is_the_default(place, tmp_path, capsys):
    status = run_main(
        convert.main, ["to-torch", "--config", place.config, "--out", str(tmp_path / "out")]
    )
    assert f"{place.folder}/draft/config.json: no such file; train a draft first" in refused(
        capsys, status
    )


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        run_main(convert.main, ["--help"])
    assert (
        "example:\n  python -m beagle_jax.convert --config quickstart to-jax --out"
        in capsys.readouterr().out
    )

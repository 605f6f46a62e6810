"""Checkpoints in several files: the index is checked against the files."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import llama_tensors
from safetensors.numpy import save_file
from weight_cases import LLAMA

from beagle_jax.errors import UserError
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights import hf
from beagle_jax.weights.hf import HFFolder
from beagle_jax.weights.target import fill_params

SPEC = TargetSpec.from_hf_config(LLAMA, "test")
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def shards() -> dict[str, dict[str, np.ndarray]]:
    """Returns the tensors of two files."""
    tensors = llama_tensors()
    names = sorted(tensors)
    return {
        FIRST: {name: tensors[name] for name in names[::2]},
        SECOND: {name: tensors[name] for name in names[1::2]},
    }


def weight_map(held: dict[str, dict]) -> dict[str, str]:
    return {name: file for file, names in held.items() for name in names}


def written(folder: Path, held: dict[str, dict[str, np.ndarray]], weight_map: object) -> HFFolder:
    for file, tensors in held.items():
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return HFFolder(folder)


def loaded(opened: HFFolder):
    return fill_params(SPEC, opened, jnp.dtype("float32"), "here")


def test_an_index_that_fits_changes_nothing(tmp_path):
    held = shards()
    opened = written(tmp_path, held, weight_map(held))
    assert {name for name, _ in opened.shapes()} == set(llama_tensors())
    loaded(opened)


def test_a_table_of_angles_is_listed_and_not_read(tmp_path):
    held = shards()
    held[FIRST]["model.layers.0.self_attn.rotary_emb.inv_freq"] = (
        1e4 ** (-np.arange(0, 16, 2) / 16)
    ).astype(np.float32)
    loaded(written(tmp_path, held, weight_map(held)))


def moved(held, listed):
    """Puts a tensor into another file than the index says."""
    held[SECOND][Q_PROJ] = held[FIRST].pop(Q_PROJ)
    return [
        f"{Q_PROJ} is listed in {FIRST}, which lacks it",
        f"{Q_PROJ} is in {SECOND}, but listed in {FIRST}",
    ]


def doubled(held, listed):
    """Puts a tensor into two files."""
    held[SECOND][Q_PROJ] = 2 * held[FIRST][Q_PROJ]
    return [f"{Q_PROJ} is in {SECOND}, but listed in {FIRST}"]


def lost(held, listed):
    """Leaves out a file."""
    del held[SECOND]
    return [f"{SECOND} is listed, but not in the folder"]


def left_over(held, listed):
    """Leaves a file of an older checkpoint."""
    held["model-00003-of-00003.safetensors"] = {Q_PROJ: held[FIRST][Q_PROJ]}
    return ["model-00003-of-00003.safetensors is in the folder, but not listed"]


def unlisted(held, listed):
    """Removes a tensor from the index."""
    del listed[Q_PROJ]
    return [f"{Q_PROJ} is in {FIRST}, but not listed"]


def promised(held, listed):
    """Adds a tensor to the index that no file holds."""
    listed["lm_head.weight"] = FIRST
    return [f"lm_head.weight is listed in {FIRST}, which lacks it"]


@pytest.mark.parametrize("change", [moved, doubled, lost, left_over, unlisted, promised])
def test_an_index_that_contradicts_the_files(tmp_path, change, monkeypatch):
    held = shards()
    listed = weight_map(held)
    expected = change(held, listed)
    with pytest.raises(UserError) as caught:
        loaded(written(tmp_path, held, listed))
    message = str(caught.value)
    assert (
        f"model.safetensors.index.json: the index does not match the files ({len(expected)} "
        "differences)" in message
    )
    assert message.split("\n  ")[1:] == expected
    # The planted bug: nobody looks. What is left is seen only where a tensor is missing or there
    # twice.
    monkeypatch.setattr(hf, "check_index", lambda *_: None)
    if change in (moved, unlisted, promised):
        loaded(HFFolder(tmp_path))
    else:
        with pytest.raises(UserError, match="the weights do not fit the config"):
            loaded(HFFolder(tmp_path))


def test_many_contradictions_are_counted_and_some_are_shown(tmp_path):
    held = shards()
    swapped = {name: SECOND if file == FIRST else FIRST for name, file in weight_map(held).items()}
    with pytest.raises(UserError) as caught:
        loaded(written(tmp_path, held, swapped))
    lines = str(caught.value).split("\n  ")
    assert (
        f"({2 * len(swapped)} differences)" in lines[0]
        and len(lines) == 12
        and lines[-1] == f"and {2 * len(swapped) - 10} more"
    )


@pytest.mark.parametrize("content", [None, [], {"x": 1}])
def test_an_index_without_a_list(tmp_path, content):
    with pytest.raises(
        UserError, match=r"index.json: weight_map is not a list of tensors with the file of each"
    ):
        loaded(written(tmp_path, shards(), content))

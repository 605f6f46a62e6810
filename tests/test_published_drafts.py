"""What published drafts hold besides their weights, and which files of their folders are read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from convert_cases import from_torch, refused
from eagle3_cases import V
from safetensors.numpy import save_file
from test_eagle3_import import CONFIG as EAGLE3
from test_eagle3_import import TARGET, imported
from test_eagle3_import import published as published_eagle3
from test_eagle3_import import write as write_eagle3
from test_eagle_import import CONFIG, PARAMS, embedding_of, published, spec_of, target, write
from test_torch_import import place
from test_torch_import import published as published_beagle

from beagle_jax.errors import UserError
from beagle_jax.weights import rotary_table
from beagle_jax.weights.eagle_import import read_eagle_draft
from beagle_jax.weights.torch_files import weight_files

__all__ = ["place", "target"]  # fixtures
ANGLES = "layers.0.self_attn.rotary_emb.inv_freq"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def table(theta: float, size: int = 8) -> np.ndarray:
    return (theta ** -(np.arange(0, size, 2) / size)).astype(np.float32)


def read(target: Path, folder: Path, allow_pickle: bool = False):
    return read_eagle_draft(folder, spec_of(target), "there", allow_pickle, no_copies)


def no_copies(name: str) -> np.ndarray:
    raise AssertionError(f"{name} is compared")


# Tables of rotary frequencies


@pytest.mark.parametrize("scaled", [False, True])
def test_a_draft_s_table_of_its_config_s_frequencies_is_left(target, tmp_path, scaled):
    config = CONFIG | ({"rope_scaling": LLAMA3} if scaled else {})
    tensors = published() | {ANGLES: table(1e4)}
    draft = read(target, write(tmp_path / "there", tensors, config))
    assert draft.params.keys() == PARAMS.keys()


def check_tables_are_compared(target: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=rf"{ANGLES} holds frequencies that differ from the conf"):
        read(target, folder)


@pytest.mark.parametrize("stored", [table(5e5), table(1e4, 16), table(1e4) / 2])
def test_a_draft_s_table_of_other_frequencies_is_refused(target, tmp_path, stored):
    folder = write(tmp_path / "there", published() | {ANGLES: stored}, CONFIG)
    check_tables_are_compared(target, folder)


def test_planted_bug_tables_of_drafts_are_not_compared(target, tmp_path, monkeypatch):
    monkeypatch.setattr(rotary_table, "agrees", lambda *_: True)
    folder = write(tmp_path / "there", published() | {ANGLES: table(5e5)}, CONFIG)
    with pytest.raises(pytest.fail.Exception):
        check_tables_are_compared(target, folder)


def test_tables_of_eagle_3_and_beagle_drafts_are_compared(place, tmp_path, capsys):
    tensors = published_eagle3("SafeAILab")
    name = "midlayer.self_attn.rotary_emb.inv_freq"
    imported(write_eagle3(tmp_path / "good", tensors | {name: table(1e4)}, EAGLE3))
    bad = write_eagle3(tmp_path / "bad", tensors | {name: table(5e5)}, EAGLE3)
    with pytest.raises(UserError, match="inv_freq holds frequencies that differ"):
        imported(bad)
    for theta, status in ((1e4, 0), (5e5, 1)):
        there = published_beagle(
            place,
            tmp_path / f"there{status}",
            lambda held, theta=theta: held.update({f"speculative_decoder.{ANGLES}": table(theta)}),
        )
        code = from_torch(place, there, tmp_path / f"here{status}")
        if status:
            assert "inv_freq holds frequencies that differ" in refused(capsys, code)
        else:
            assert code == 0


# Files beside the draft

OTHERS = (
    "._model.safetensors",
    "optimizer.safetensors",
    "consolidated.safetensors",
    "adapter_model.safetensors",
    ".DS_Store",
    "training_args.bin",
    "optimizer.pt",
    "training_state.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "._pytorch_model.bin",
)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "weights.safetensors", "pytorch_model.bin", "draft.pt"]
)
def test_what_lies_beside_a_draft_is_not_read(target, tmp_path, name):
    tensors = published()
    folder = write(tmp_path / "there", tensors, CONFIG)
    (folder / "model.safetensors").unlink()
    pickled = not name.endswith("safetensors")
    if pickled:
        torch.save({key: torch.from_numpy(x) for key, x in tensors.items()}, folder / name)
    else:
        save_file(tensors, folder / name)
    for other in OTHERS:
        if not (pickled and other.endswith("safetensors")):
            (folder / other).write_bytes(b"\0\x05\x16\x07 not what the name says")
    assert weight_files(folder, True) == [folder / name]
    draft = read(target, folder, allow_pickle=True)
    np.testing.assert_array_equal(draft.params["fc"], PARAMS["fc"].astype(np.float32))


def test_parts_of_a_draft_are_all_read(target, tmp_path):
    tensors = list(published().items())
    folder = write(tmp_path / "there", {}, CONFIG)
    (folder / "model.safetensors").unlink()
    save_file(dict(tensors[:3]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(tensors[3:]), folder / "model-00002-of-00002.safetensors")
    (folder / "optimizer.safetensors").write_bytes(b"x")
    assert read(target, folder).params.keys() == PARAMS.keys()


def test_a_folder_of_other_files_holds_no_draft(tmp_path):
    for name in ("optimizer.safetensors", "training_args.bin"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="no weights in this folder"):
        weight_files(tmp_path, True)


# Dtypes and vocabularies


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64])
def test_pickled_weights_of_another_kind_are_refused(target, tmp_path, dtype):
    tensors = {key: torch.from_numpy(x) for key, x in published().items()}
    tensors["fc.weight"] = torch.ones(tensors["fc.weight"].shape, dtype=dtype)
    folder = write(tmp_path / "there", {}, CONFIG)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"fc.weight is stored as {dtype}; expected float32"):
        read(target, folder, allow_pickle=True)


def test_a_pickled_map_of_fractions_is_refused(tmp_path):
    tensors = {key: torch.from_numpy(x) for key, x in published_eagle3("SafeAILab").items()}
    tensors["d2t"] = tensors["d2t"].float()
    folder = write_eagle3(tmp_path / "there", {}, EAGLE3)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"d2t is stored as torch.float32; expected whole numbers"):
        read_eagle_draft(folder, TARGET, "there", True, no_copies)


def test_t2d_that_names_fewer_tokens_than_are_scored_is_refused(tmp_path):
    tensors = published_eagle3("the target's head")
    config = EAGLE3 | {"draft_vocab_size": None}
    imported(write_eagle3(tmp_path / "good", tensors | {"t2d": np.ones(V, bool)}, config))
    bad = write_eagle3(tmp_path / "bad", tensors | {"t2d": np.arange(V) > 3}, config)
    with pytest.raises(UserError, match=f"t2d says that the draft scores {V - 4} tokens"):
        imported(bad)


def test_an_embedding_that_is_compared_is_the_target_s(target, tmp_path):
    """A copy is compared, whatever lies beside the weights."""
    changed = embedding_of(target).copy()
    changed[-1] += 1
    folder = write(tmp_path / "there", published(changed), CONFIG)
    (folder / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"embed_tokens.weight differ from the target's"):
        read_eagle_draft(
            folder, spec_of(target), "there", read_target=lambda _: embedding_of(target)
        )

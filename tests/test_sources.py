"""Targets and drafts by the names that people know them by: one line each, from Python and config.

The hub is its own cache, offline.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_cases import make_target
from eagle3_cases import random_eagle3
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file
from test_eagle_import import CONFIG as EAGLE_CONFIG
from test_eagle_import import published as published_eagle

from beagle_jax import SpeculativeDecoder, chain, generate, load_draft, load_target
from beagle_jax.errors import UserError, run_main
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.weights.draft import Draft, DraftFiles, save_draft
from beagle_jax.weights.draft_source import published_format
from beagle_jax.weights.torch_export import write_torch_folder

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


def repository(cache: Path, name: str, folder: Path, revision: str = "main") -> None:
    """Puts a folder into a hub cache, as a snapshot of `org/name`."""
    there = cache / f"models--{name.replace('/', '--')}"
    (there / "refs").mkdir(parents=True, exist_ok=True)
    (there / "refs" / revision).write_text(COMMITS[revision])
    shutil.copytree(folder, there / "snapshots" / COMMITS[revision])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A target, and a draft of it in each format, in folders."""
    folder = tmp_path_factory.mktemp("models")
    make_target(folder / "target")
    target = load_target(folder / "target")
    spec = BeagleSpec.from_target(target.spec, init_std=0.3)
    drafts = [Draft(spec, init_draft(spec, jax.random.key(seed)), None, {}) for seed in (1, 2)]
    save_draft(folder / "beagle", drafts[0])
    save_draft(folder / "beagle_v2", drafts[1])
    (folder / "exported").mkdir()
    write_torch_folder(folder / "exported", drafts[0], target.spec.vocab_size, "a card")
    embed_VD = load_file(folder / "target" / "model.safetensors")["model.embed_tokens.weight"]
    for name, tensors, config in (
        ("eagle", published_eagle(embed_VD), EAGLE_CONFIG),
        ("published", _published_beagle(folder, embed_VD), {"beagle_use_lower_layers": 0}),
    ):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def _published_beagle(folder: Path, embed_VD: np.ndarray) -> dict[str, np.ndarray]:
    tensors = load_file(folder / "beagle" / "model.safetensors")
    copied = {"model.embed_tokens.weight": embed_VD.astype(np.float16)}
    return {f"layers.0.{name}": array for name, array in tensors.items()} | copied


@pytest.fixture
def hub(models, tmp_path, monkeypatch) -> Path:
    """The hub's cache with the models, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("target", "beagle", "eagle"):
        repository(tmp_path / "hub", f"org/{name}", models / name)
    repository(tmp_path / "hub", "org/beagle", models / "beagle_v2", "v2")
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["beagle", "exported", "published", "eagle"])
def test_every_format_is_told_by_its_config(models, name):
    target = load_target(models / "target")
    draft = load_draft(models / name, target)
    assert draft.kind == ("eagle" if name == "eagle" else "beagle")
    if name in ("exported", "published"):
        expected = load_draft(models / "beagle", target.spec)
        assert draft.params.keys() == expected.params.keys()
        for param, array in expected.params.items():
            assert np.array_equal(draft.params[param], array)


def test_formats_of_a_config():
    assert published_format({"model_type": "beagle_draft"}) is None
    assert published_format({"model_type": "llama", "hidden_size": 32}) == "eagle"
    assert published_format({"model_type": "llama"}) is None
    assert published_format({"speculators_model_type": "eagle3"}) == "eagle"
    assert published_format({"model_type": "eagle_draft_torch"}) == "beagle"
    assert published_format({"model_type": "no such thing"}) is None


def test_an_eagle3_draft_of_this_library_is_loaded_in_one_line(tmp_path):
    save_draft(tmp_path / "eagle3", random_eagle3())
    assert isinstance(load_draft(tmp_path / "eagle3"), DraftFiles)


def test_one_line_each_and_the_decoder_binds_them(hub):
    target, draft = load_target("hf:org/target"), load_draft("hf:org/beagle")
    assert target.revision == COMMITS["main"]
    answers = SpeculativeDecoder(target, draft, chain(2)).generate(["Hi"], max_new_tokens=12)
    plain = SpeculativeDecoder(target).generate(["Hi"], max_new_tokens=12)
    assert answers[0].tokens == plain[0].tokens and len(answers[0].accepted) == 3


def test_a_draft_without_a_tree_is_used(models):
    target = load_target(models / "target")
    decoder = SpeculativeDecoder(target, load_draft(models / "beagle"))
    assert decoder.tree == chain(5) and SpeculativeDecoder(target).tree.depth == 0


def test_a_revision_is_another_draft(hub):
    """The planted bug, a revision that is not read, would give the first draft twice."""
    target = load_target("hf:org/target")
    first, second = (load_draft(f"hf:org/beagle{at}", target) for at in ("", "@v2"))
    assert first.fingerprint == load_draft("hf:org/beagle@main", target).fingerprint
    assert first.fingerprint != second.fingerprint


def test_a_changed_copy_of_the_embedding_is_refused(models, tmp_path):
    """The target's files are compared, in the precision that they are stored in."""
    shutil.copytree(models / "eagle", tmp_path / "eagle")
    path = tmp_path / "eagle" / "model.safetensors"
    tensors = load_file(path)
    tensors["embed_tokens.weight"][3, 3] += 1
    save_file(tensors, path)
    target = load_target(models / "target", "bfloat16")
    assert load_draft(models / "eagle", target).kind == "eagle"
    with pytest.raises(UserError, match=r"embed_tokens\.weight differ from the target's"):
        load_draft(tmp_path / "eagle", target)


def test_generate_without_a_config(hub, capsys):
    argv = ["target.source=hf:org/target", "draft.path=hf:org/eagle", "Hi", "decode.levels=2"]
    assert run_main(generate.main, [*argv, "decode.max_new_tokens=8"]) == 0
    printed = capsys.readouterr()
    assert "token sequences equal: yes" in printed.out
    assert run_main(generate.main, argv[:2]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert run_main(generate.main, [*argv, "and more"]) == 2
    assert "override 'and more'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:org/none", r"draft\.path: hf:org/none could not be downloaded"),
        ("nothing", r"draft\.path: nothing: .*hf:org/name, a folder, or one of smollm2-135m"),
        ("no/folder", r"no/folder/config\.json"),
    ],
)
def test_what_is_not_there_is_named(hub, source, message):
    with pytest.raises(UserError, match=message):
        load_draft(source)


def test_the_draft_of_the_package_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_draft("smollm2-135m").folder.name == "smollm2-135m"
    (tmp_path / "smollm2-135m").mkdir()  # a folder of that name comes first
    with pytest.raises(UserError, match=r"smollm2-135m/config\.json"):
        load_draft("smollm2-135m")


def test_a_pickle_is_read_only_on_request(models, tmp_path):
    torch = pytest.importorskip("torch")
    shutil.copytree(models / "eagle", tmp_path / "eagle")
    tensors = load_file(tmp_path / "eagle" / "model.safetensors")
    (tmp_path / "eagle" / "model.safetensors").unlink()
    stored = {name: torch.from_numpy(array) for name, array in tensors.items()}
    torch.save(stored, tmp_path / "eagle" / "pytorch_model.bin")
    target = load_target(models / "target")
    with pytest.raises(UserError, match=r"is a pickle.*allow_pickle=True to load_draft"):
        SpeculativeDecoder(target, load_draft(tmp_path / "eagle"), chain(2))
    files = load_draft(tmp_path / "eagle", allow_pickle=True)
    draft = files.read(target)
    expected = load_draft(models / "eagle", target)
    assert all(jnp.array_equal(draft.params[name], expected.params[name]) for name in draft.params)

"""Targets as Hugging Face folders: transformers computes the same from them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from convert_cases import refused
from family_cases import family as family_case
from test_gguf_families import written
from test_real_target import CACHE, SOURCE
from test_to_jax import same_target
from transformers import AutoModelForCausalLM

from beagle_jax import convert
from beagle_jax.errors import UserError, run_main
from beagle_jax.model.joined import separate_layer
from beagle_jax.weights import hf_export
from beagle_jax.weights.target import load_target

family = family_case  # a fixture
TOKENS = torch.tensor([[5, 17, 60, 3, 9, 41, 2, 33, 8, 1]])


def to_hf(source: Path | str, folder: Path, *more: str) -> int:
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({"target": {"source": str(source)}}))
    arguments = ["to-hf", "--config", str(config), "--out", str(folder / "out"), *more]
    return run_main(convert.main, arguments)


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS).logits.float().numpy()


def loaded(folder: Path):
    model, said = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not said["missing_keys"] and not said["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "llama, biases", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_gguf_file_becomes_a_folder(tmp_path, kind):
    path, model = written(tmp_path, kind)
    assert to_hf(path, tmp_path) == 0
    expected = logits_of(model)
    assert expected.std() > 0.3
    # 2e-4: as for the file itself (tests/test_gguf_families.py)
    np.testing.assert_allclose(logits_of(loaded(tmp_path / "out")), expected, atol=2e-4)
    ours, theirs = (load_target(str(x), "float32", "unused") for x in (tmp_path / "out", path))
    # transformers adds a pad token of its own to what it takes for Qwen2's tokenizer
    assert theirs.tokenizer.get_vocab().items() <= ours.tokenizer.get_vocab().items()
    same_target(ours, replace(theirs, tokenizer=ours.tokenizer))


@pytest.mark.parametrize("family", ["qwen3 moe", "llama 3 rope", "gemma 3"], indirect=True)
def test_a_folder_becomes_one_of_its_kind(family, tmp_path, monkeypatch):
    """Experts are written one by one; several files have an index."""
    model, target = family
    monkeypatch.setattr(hf_export, "_SHARD_BYTES", 20_000)
    assert to_hf(target.source, tmp_path) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    np.testing.assert_array_equal(logits_of(loaded(tmp_path / "out")), logits_of(model))


def test_planted_bug_two_matrices_swapped(tmp_path, monkeypatch):
    path, model = written(tmp_path, "llama")
    right = hf_export._named

    def swapped(params, tensor):
        other = {"q_FD": "o_DF", "o_DF": "q_FD"}.get(str(tensor.path[-1]), tensor.path[-1])
        return right(params, tensor._replace(path=(*tensor.path[:-1], other)))

    monkeypatch.setattr(hf_export, "_named", swapped)
    assert to_hf(path, tmp_path) == 0
    assert np.abs(logits_of(loaded(tmp_path / "out")) - logits_of(model)).max() > 0.1


def test_a_config_of_another_model_leaves_no_folder(tmp_path, monkeypatch, capsys):
    path, _ = written(tmp_path, "llama")
    right = hf_export._completed
    monkeypatch.setattr(
        hf_export, "_completed", lambda *given: right(*given) | {"rope_theta": 7.0} | PLAIN_ROPE
    )
    assert "describes another model" in refused(capsys, to_hf(path, tmp_path))
    assert not (tmp_path / "out").exists()


PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}


def test_it_is_written_again_only_over_its_own_output(tmp_path, capsys):
    path, _ = written(tmp_path, "llama")
    assert to_hf(path, tmp_path) == 0
    assert "this folder exists" in refused(capsys, to_hf(path, tmp_path))
    assert to_hf(path, tmp_path, "--overwrite", "target.dtype=bfloat16") == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    record = json.loads((tmp_path / "out/beagle_jax.json").read_text())
    assert record["source"] == str(path)


@pytest.mark.slow
def test_smollm2_becomes_a_folder(tmp_path):
    """The quick start's own target, which is published here as a GGUF file."""
    try:
        target = load_target(SOURCE, "float32", str(CACHE))
    except UserError as error:
        pytest.skip(f"needs the target, which cannot be fetched: {error}")
    assert to_hf(SOURCE, tmp_path, f"target.cache_dir={CACHE}") == 0
    model = loaded(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        if name == "model.layers.7.self_attn.q_proj.weight":
            np.testing.assert_array_equal(
                tensor, separate_layer(target.params["layers"][7])["q_FD"]
            )
    with torch.no_grad():
        answer = model.generate(
            torch.tensor([target.tokenizer.encode("The capital of France is")]),
            do_sample=False,
            max_new_tokens=6,
        )
    assert "Paris" in target.tokenizer.decode(answer[0])

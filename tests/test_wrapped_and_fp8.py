"""Wrapped text models and fp8 checkpoints, against the plain models that they hold."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decode_cases import letters
from safetensors.torch import load_file, save_file
from test_weight_edges import SIZES, logits_of, torch_logits
from torch_targets import random_torch
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.errors import UserError
from beagle_jax.model import wrapped
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights import block_scales
from beagle_jax.weights.target import load_target

# Gemma 3 with a vision tower

TEXT = SIZES | {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)


def load(folder: Path):
    return load_target(str(folder), "float32", "unused")


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A wrapper with random weights, and its text model alone."""
    folder = tmp_path_factory.mktemp("gemma3")
    config = Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, eos_token_id=1
    )
    model = random_torch(Gemma3ForConditionalGeneration, config)
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    text = Gemma3ForCausalLM(Gemma3TextConfig(**TEXT)).eval()
    state = model.model.language_model.state_dict()
    text.model.load_state_dict(state)
    text.tie_weights()
    return folder, text


def names_in_memory(folder: Path, out: Path) -> Path:
    """The folder with the names that the parts have in memory, which some checkpoints use."""
    out.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert name.startswith(("language_model.model.", "vision_tower.", "multi_modal_projector."))
        renamed["model." + name.replace("language_model.model.", "language_model.")] = tensor
    save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("names", ["on disk", "in memory"])
def test_the_text_of_a_multimodal_model_equals_the_text_model(multimodal, tmp_path, names):
    folder, text = multimodal
    if names == "in memory":
        folder = names_in_memory(folder, tmp_path / "renamed")
    target = load(folder)
    expected = torch_logits(text)
    assert expected.std() > 0.3 and target.spec.windows == (5, None)
    np.testing.assert_allclose(logits_of(target), expected, atol=2e-4, rtol=0)
    tokens = torch.tensor([[5, 17, 60, 3]])
    with torch.no_grad():
        full = text.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=32,
            eos_token_id=10_000,
            pad_token_id=0,
        )
    [answer] = SpeculativeDecoder(target).generate([tokens[0].tolist()], max_new_tokens=32)
    ours, theirs = answer.tokens, full[0, 4:].tolist()
    assert ours == theirs[: len(ours)] and (len(ours) == 32 or ours[-1] == 1)


def test_planted_bug_in_the_names(multimodal, monkeypatch):
    monkeypatch.setattr(wrapped, "_PREFIXES", {"model.": "model.", "lm_head.": "lm_head."})
    with pytest.raises(UserError, match=r"missing tensor model\.layers"):
        load(multimodal[0])


def test_what_a_text_config_leaves_out_is_hugging_faces():
    """google/gemma-3-4b-it names six keys."""
    theirs = Gemma3TextConfig().to_dict()
    ours = wrapped.text_config({"model_type": "gemma3", "text_config": {}})
    assert {key: theirs[key] for key in ours} == ours
    few = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {"model_type": "gemma3", "text_config": few, "eos_token_id": [1, 106]}
    spec = TargetSpec.from_hf_config(config, "here")
    sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size, spec.num_layers)
    assert sizes == (8, 4, 256, 262208, 34)
    assert (spec.windows[:6], spec.tie_embeddings) == ((1024,) * 5 + (None,), True)
    assert wrapped.text_config(config)["eos_token_id"] == [1, 106]


# fp8 with scales of blocks

BLOCK = (16, 8)


def quantised(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the fp8 matrix, its scales, and what they mean, a block at a time."""
    rows, columns = matrix.shape
    blocks = (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    scales, low = torch.zeros(blocks), torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    means = torch.zeros_like(matrix)
    for row in range(blocks[0]):
        for column in range(blocks[1]):
            at = (
                slice(row * BLOCK[0], (row + 1) * BLOCK[0]),
                slice(column * BLOCK[1], (column + 1) * BLOCK[1]),
            )
            scale = matrix[at].abs().max() / 448
            low[at] = (matrix[at] / scale).to(torch.float8_e4m3fn)
            scales[row, column], means[at] = scale, low[at].float() * scale
    return low, scales, means


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A folder with fp8 matrices, and the model of the values that they mean."""
    folder = tmp_path_factory.mktemp("fp8")
    # 50 rows and 36 columns: the last blocks are not whole
    sizes = SIZES | {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3}
    config = Qwen3Config(**sizes | {"head_dim": 6, "intermediate_size": 50})
    model = random_torch(Qwen3ForCausalLM, config)
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name.endswith("_proj.weight"):
            low, scales, means = quantised(parameter)
            parameter.copy_(means)
            tensors |= {name: low, f"{name}_scale_inv": scales}
        else:
            tensors[name] = parameter.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }
    (folder / "config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(folder).vocab_size == 61
    return folder, model


def check_fp8(folder: Path, model) -> None:
    np.testing.assert_allclose(logits_of(load(folder)), torch_logits(model), atol=2e-4, rtol=0)


def test_fp8_weights_are_what_their_scales_say(fp8):
    check_fp8(*fp8)
    folder, model = fp8
    target = load(folder)
    expected = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_equal(target.params["layers"][1]["down_DF"], expected)


def test_a_part_of_an_fp8_matrix_is_read_with_its_scales(fp8):
    name = "model.layers.0.mlp.up_proj.weight"
    place = dict(load_places(fp8[0]))[name]
    whole = place.read((slice(None), slice(None)), np.dtype(np.float32))
    for index in ((slice(10, 33), slice(None)), (slice(None), slice(5, 21)), (slice(40, 50),) * 2):
        index = (index[0], slice(0, 36) if index[1] == slice(40, 50) else index[1])
        np.testing.assert_array_equal(place.read(index, np.dtype(np.float32)), whole[index])
    half = place.read((slice(0, 7), slice(None)), np.dtype(jnp.bfloat16))
    np.testing.assert_array_equal(half, whole[:7].astype(jnp.bfloat16))


def load_places(folder: Path):
    from beagle_jax.weights.hf import HFFolder

    return HFFolder(folder).places


def test_planted_bug_in_the_blocks(fp8, monkeypatch):
    right = block_scales.with_scales
    monkeypatch.setattr(
        "beagle_jax.weights.hf.with_scales",
        lambda places, block: [
            (name, place._replace(block=(8, 8)) if hasattr(place, "block") else place)
            for name, place in right(places, block)
        ],
    )
    with pytest.raises((AssertionError, IndexError)):
        check_fp8(*fp8)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (None, r"quantization_config \('fp8'\)"),
        ([8, 8], r"F8_E4M3 with scales of shape \[3, 7\].*and \[5, 7\]"),
        ([16, 0], r"quantization_config \('fp8'\)"),
    ],
)
def test_scales_that_do_not_fit_are_refused(fp8, tmp_path, block, message):
    folder, _ = fp8
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"]["weight_block_size"] = block
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        load(tmp_path)

"""EAGLE-1/2 drafts with their authors' tensor names, and how other drafts are refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import yaml
from command_cases import make_target
from convert_cases import refused
from safetensors.numpy import load_file, save_file
from test_torch_import import Trap

from beagle_jax import convert
from beagle_jax.errors import UserError, run_main
from beagle_jax.model.eagle import EagleSpec, init_eagle
from beagle_jax.model.layers import RopeScaling
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.eagle_import import read_eagle_draft
from beagle_jax.weights.hf import HFFolder

# As in yuhuili/EAGLE-llama2-chat-7B, with the sizes of the tiny target.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 300,
}
SPEC = EagleSpec(
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
)
PARAMS = {
    name: np.asarray(array, np.float16)
    for name, array in init_eagle(SPEC, jax.random.key(0)).items()
}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eagle") / "target"
    make_target(folder)
    return folder


def embedding_of(target: Path) -> np.ndarray:
    return load_file(target / "model.safetensors")["model.embed_tokens.weight"]


def published(embed_VD: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors of method.md 9.3.

    embed_VD: the copy of the target's embedding, if there is one.
    """
    names = {
        "fc": "fc.weight",
        "fc_bias": "fc.bias",
        "post_attention_layernorm": "layers.0.post_attention_layernorm.weight",
    }
    for part, projections in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        names |= {
            f"{projection}_proj": f"layers.0.{part}.{projection}_proj.weight"
            for projection in projections
        }
    tensors = {} if embed_VD is None else {"embed_tokens.weight": embed_VD.astype(np.float16)}
    return tensors | {name: PARAMS[key] for key, name in names.items()}


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def spec_of(target: Path) -> TargetSpec:
    return TargetSpec.from_hf_config(HFFolder(target).config(), "tests")


def run(target: Path, source: Path, out: Path, *more: str) -> int:
    (out.parent / "run.yaml").write_text(yaml.safe_dump({"target": {"source": str(target)}}))
    return run_main(
        convert.main,
        [
            "import-eagle",
            "--config",
            str(out.parent / "run.yaml"),
            "--source",
            str(source),
            "--out",
            str(out),
            *more,
        ],
    )


def test_published_drafts_are_read_exactly(target, tmp_path):
    source = write(tmp_path / "there", published(embedding_of(target)), CONFIG)
    assert run(target, source, tmp_path / "here") == 0
    draft = load_draft(tmp_path / "here", spec_of(target))
    assert draft.spec == SPEC and draft.provenance == {
        "target": str(target),
        "imported_from": "there",
    }
    assert draft.params.keys() == PARAMS.keys()
    for name, array in PARAMS.items():
        assert draft.params[name].dtype == np.float32
        np.testing.assert_array_equal(draft.params[name], array.astype(np.float32))


def test_an_embedding_of_its_own_is_refused(target, tmp_path, capsys):
    """Decoding uses the target's embedding.

    A single changed value is detected; half precision is accepted.
    """
    embed_VD = embedding_of(target).copy()
    embed_VD[17, 3] += 0.01
    source = write(tmp_path / "there", published(embed_VD), CONFIG)
    message = refused(capsys, run(target, source, tmp_path / "here"))
    assert f"{source}: the values of embed_tokens.weight differ from the target's" in message
    assert "set target.source to the model that it was trained for" in message
    assert not (tmp_path / "here").exists()
    with pytest.raises(UserError, match=r"embed_tokens\.weight cannot be compared"):
        read_eagle_draft(source, spec_of(target), "x")


def test_specforge_names_no_bias_and_llama_3_scaling(target, tmp_path):
    tensors = {
        name.replace("fc.", "eagle_fc."): array
        for name, array in published().items()
        if name != "fc.bias"
    }
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = write(
        tmp_path / "there",
        tensors,
        {**CONFIG, "bias": False, "rope_theta": 500000.0, "rope_scaling": scaling},
    )
    assert run(target, source, tmp_path / "here") == 0
    spec = load_draft(tmp_path / "here", spec_of(target)).spec
    assert (spec.fc_bias, spec.rope_theta, spec.rope_scaling) == (
        False,
        5e5,
        RopeScaling(8.0, 1.0, 4.0, 64.0),
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda t: t.pop("layers.0.mlp.up_proj.weight"),
            "missing tensor mlp.up_proj.weight [48, 32]",
        ),
        (lambda t: t.pop("fc.weight"), "missing tensor fc.weight [32, 64]"),
        (
            lambda t: t.update({"layers.0.input_layernorm.weight": np.ones(32, np.float16)}),
            "extra tensor input_layernorm.weight [32]",
        ),
        (
            lambda t: t.update({"layers.1.mlp.up_proj.weight": np.ones((48, 32), np.float16)}),
            "extra tensor layers.1.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({"fc.weight": np.ones((64, 32), np.float16)}),
            "fc.weight has shape [64, 32], expected [32, 64]",
        ),
        (
            lambda t: t.update({"eagle_fc.weight": np.ones((32, 64), np.float16)}),
            "fc.weight is in two files",
        ),
        (
            lambda t: t.update({"embed_tokens.weight": np.ones((301, 32), np.float16)}),
            "embed_tokens.weight has shape [301, 32], expected [300, 32]",
        ),
        (
            lambda t: t.update({"midlayer.hidden_norm.weight": np.ones(32, np.float16)}),
            "holds fc.bias, and config.json does not say bias: true",
        ),
    ],
)
def test_tensors_that_do_not_fit(target, tmp_path, capsys, change, expected):
    tensors = published()
    change(tensors)
    assert expected in refused(
        capsys, run(target, write(tmp_path / "there", tensors, CONFIG), tmp_path / "here")
    )
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"hidden_size": 64},
            "this draft belongs to another target (hidden_size 64 there, 32 here)",
        ),
        (
            {"vocab_size": 32000},
            "this draft belongs to another target (vocab_size 32000 there, 300 here)",
        ),
        ({"num_hidden_layers": 2}, "config.json has 2 layers"),
        ({"attention_bias": True}, "config.json has biases of projections"),
        ({"bias": False}, "config.json says bias False, and the weights hold fc.bias"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4', expected a whole number"),
        (None, "no config.json beside the weights"),
    ],
)
def test_configs_that_do_not_fit(target, tmp_path, capsys, change, expected):
    source = write(
        tmp_path / "there", published(), None if change is None else {**CONFIG, **change}
    )
    assert expected in refused(capsys, run(target, source, tmp_path / "here"))


def test_pickles_only_when_allowed(target, tmp_path, capsys):
    source = tmp_path / "there"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    torch.save(
        {name: torch.from_numpy(array) for name, array in published().items()},
        source / "pytorch_model.bin",
    )
    assert "pytorch_model.bin is a pickle, which may run code" in refused(
        capsys, run(target, source, tmp_path / "here")
    )
    assert run(target, source, tmp_path / "here", "--allow-pickle") == 0
    draft = load_draft(tmp_path / "here", spec_of(target))
    assert all(
        np.array_equal(draft.params[name], array.astype(np.float32))
        for name, array in PARAMS.items()
    )
    torch.save({"fc.weight": Trap(tmp_path / "sprung")}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights_only=True"):
        read_eagle_draft(source, spec_of(target), "x", allow_pickle=True)
    assert not (tmp_path / "sprung").exists()

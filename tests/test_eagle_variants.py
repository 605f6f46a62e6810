"""EAGLE drafts for other targets than Llama.

Biases of queries, keys and values (Qwen2), a config copied from a mixture of experts (Mixtral), and
a fusion layer with and without bias.
"""

import numpy as np
import pytest
from convert_cases import refused
from test_eagle_import import (  # noqa: F401  target is a fixture
    CONFIG,
    PARAMS,
    embedding_of,
    published,
    run,
    spec_of,
    target,
    write,
)

from beagle_jax.errors import UserError
from beagle_jax.weights.draft import load_draft
from beagle_jax.weights.eagle_import import read_eagle_draft

QWEN2 = {**CONFIG, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
MIXTRAL = {
    **CONFIG,
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
}
WIDTHS = {"q": 32, "k": 16, "v": 16}


def biases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        f"layers.0.self_attn.{name}_proj.bias": rng.standard_normal(width).astype(np.float16)
        for name, width in WIDTHS.items()
    }


@pytest.mark.parametrize("settings", [{}, {"qkv_bias": True}])
def test_biases_of_a_qwen2_draft_are_read(target, tmp_path, settings):
    tensors = published(embedding_of(target)) | biases()
    source = write(tmp_path / "there", tensors, QWEN2 | settings)
    assert run(target, source, tmp_path / "here") == 0
    draft = load_draft(tmp_path / "here", spec_of(target))
    assert draft.spec.qkv_bias and draft.spec.fc_bias
    assert draft.params.keys() == PARAMS.keys() | {"q_bias", "k_bias", "v_bias"}
    for name in WIDTHS:
        stored = tensors[f"layers.0.self_attn.{name}_proj.bias"]
        np.testing.assert_array_equal(draft.params[f"{name}_bias"], stored.astype(np.float32))


@pytest.mark.parametrize("config", [QWEN2, MIXTRAL], ids=["qwen2", "mixtral"])
@pytest.mark.parametrize("fc_bias", [True, False])
def test_a_plain_layer_of_another_family_is_read(target, tmp_path, config, fc_bias):
    """EAGLE builds a Llama layer whatever the target's config says."""
    tensors = published(embedding_of(target))
    if not fc_bias:
        del tensors["fc.bias"]
    source = write(tmp_path / "there", tensors, config)
    assert run(target, source, tmp_path / "here") == 0
    spec = load_draft(tmp_path / "here", spec_of(target)).spec
    assert (spec.fc_bias, spec.qkv_bias) == (fc_bias, False)
    assert spec.rms_norm_eps == config["rms_norm_eps"]


@pytest.mark.parametrize(
    ("config", "lacking", "more", "expected"),
    [
        (QWEN2, ["k"], {}, "extra tensor self_attn.q_proj.bias [32]"),
        (
            QWEN2 | {"qkv_bias": False},
            [],
            {},
            "config.json says qkv_bias False, and the weights ho",
        ),
        (
            QWEN2 | {"qkv_bias": True},
            ["q", "k", "v"],
            {},
            "says qkv_bias True, and the weights lac",
        ),
        (
            QWEN2,
            [],
            {"layers.0.self_attn.o_proj.bias": np.zeros(32, np.float16)},
            "extra tensor self_attn.o_proj.bias [32]",
        ),
        (
            MIXTRAL,
            [],
            {"layers.0.block_sparse_moe.gate.weight": np.zeros((8, 32), np.float16)},
            "extra tensor block_sparse_moe.gate.weight [8, 32]",
        ),
        (MIXTRAL | {"sliding_window": 16}, [], {}, "config.json has a sliding window"),
    ],
)
def test_what_the_block_lacks_is_named(
    target,
    tmp_path,
    capsys,
    config,
    lacking,
    more,
    expected,
):
    held = {name: x for name, x in biases().items() if name[19] not in lacking}
    source = write(tmp_path / "there", published(embedding_of(target)) | held | more, config)
    assert expected in refused(capsys, run(target, source, tmp_path / "here"))


def test_factors_of_frequencies_are_refused(target, tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "attention_factor": 1.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    source = write(tmp_path / "there", published(), {**CONFIG, "rope_parameters": rope})
    with pytest.raises(UserError, match="has factors of rotary frequencies"):
        read_eagle_draft(source, spec_of(target), "x")

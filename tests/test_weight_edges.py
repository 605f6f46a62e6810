"""What a checkpoint holds besides the parameters that its config names.

A head of its own under the tied flag, tables of rotary frequencies, quantised weights; and configs
with null values.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decode_cases import letters
from safetensors.numpy import load_file, save_file
from torch_targets import random_torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from beagle_jax.errors import UserError
from beagle_jax.model.config_values import given_values
from beagle_jax.model.layers import RopeFactors, RopeScaling
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import TargetSpec, forward, logits
from beagle_jax.weights.hf import HFFolder
from beagle_jax.weights.target import fill_params, load_target

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    eos_token_id=1,
    bos_token_id=None,
    pad_token_id=None,
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ANGLES = "model.layers.1.self_attn.rotary_emb.inv_freq"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def folder_of(folder: Path, tensors=None, config=None, **settings) -> Path:
    """Writes a tiny random llama of transformers, with changed tensors and config.

    Values in `tensors` and `config` replace or add; ... removes.
    """
    model = random_torch(LlamaForCausalLM, LlamaConfig(**{**SIZES, **settings}))
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    held = load_file(folder / "model.safetensors") | (tensors or {})
    save_file(
        {name: x for name, x in held.items() if x is not ...},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    path = folder / "config.json"
    changed = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))
    return folder


def logits_of(target) -> np.ndarray:
    tokens_BT = np.random.default_rng(1).integers(0, 61, (2, 12))
    positions_BT = jnp.broadcast_to(jnp.arange(12), (2, 12))
    mask_BTT = causal_mask(jnp.full(2, 12), 12)
    states_BTD = forward(target.params, target.spec, tokens_BT, positions_BT, mask_BTT).states_BTD
    return np.asarray(logits(target.params, target.spec, states_BTD))


def torch_logits(model) -> np.ndarray:
    tokens_BT = np.random.default_rng(1).integers(0, 61, (2, 12))
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT)).logits.numpy()


def check_against_transformers(folder: Path):
    """Checks that the loaded target's logits equal those of what transformers loads."""
    target = load_target(str(folder), "float32", str(folder))
    expected = torch_logits(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert expected.std() > 1
    np.testing.assert_allclose(logits_of(target), expected, atol=1e-4, rtol=0)
    return target


def own_head(seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((61, 32)).astype(np.float32)


# A head of its own


@pytest.mark.parametrize("flag", [True, False, ...])
def test_a_head_of_other_values_is_the_head(tmp_path, flag):
    folder = folder_of(tmp_path, {HEAD: own_head()}, {"tie_word_embeddings": flag})
    target = check_against_transformers(folder)
    assert "head_VD" in target.params and not target.spec.tie_embeddings


def test_a_head_of_one_other_value_is_the_head(tmp_path):
    """The last row counts as much as the first."""
    folder = folder_of(tmp_path, tie_word_embeddings=True)
    held = load_file(folder / "model.safetensors")
    head = held[EMBEDDING].copy()
    head[-1, -1] += 1.0
    save_file(held | {HEAD: head}, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(check_against_transformers(folder).params["head_VD"], head)


def test_a_head_of_the_same_values_is_tied(tmp_path):
    folder = folder_of(tmp_path, tie_word_embeddings=True)
    held = load_file(folder / "model.safetensors")
    save_file(held | {HEAD: held[EMBEDDING].copy()}, folder / "model.safetensors", {"format": "pt"})
    assert "head_VD" not in check_against_transformers(folder).params


def test_gemma_s_silence_means_tied_unless_a_head_differs(tmp_path):
    config = Gemma2Config(**SIZES, head_dim=16, sliding_window=6, tie_word_embeddings=False)
    random_torch(Gemma2ForCausalLM, config).save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert "head_VD" in check_against_transformers(tmp_path).params


def test_planted_bug_the_flag_is_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(HFFolder, "_has_own_head", False)
    folder = folder_of(tmp_path, {HEAD: own_head()}, {"tie_word_embeddings": True})
    with pytest.raises(AssertionError, match="Mismatched elements"):
        check_against_transformers(folder)


def test_a_head_of_another_size_is_misshapen(tmp_path):
    folder = folder_of(tmp_path, {HEAD: own_head()[:60].copy()}, {"tie_word_embeddings": True})
    with pytest.raises(
        UserError, match=r"lm_head.weight has shape \[60, 32\], expected \[61, 32\]"
    ):
        load_target(str(folder), "float32", str(folder))


def test_a_head_that_is_promised_and_not_there(tmp_path):
    folder = folder_of(tmp_path, {HEAD: ...}, {"tie_word_embeddings": False})
    with pytest.raises(UserError, match=r"missing tensor lm_head.weight \[61, 32\]"):
        load_target(str(folder), "float32", str(folder))


# Tables of rotary frequencies, and other tensors that no parameter takes


def table(theta: float = 10000.0, dtype=np.float32) -> np.ndarray:
    return (1.0 / theta ** (np.arange(0, 8, 2) / 8)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_a_table_of_the_config_s_frequencies_is_left(tmp_path, dtype):
    tensors = {ANGLES: table(dtype=dtype), "model.rotary_emb.inv_freq": table(dtype=dtype)}
    folder = folder_of(tmp_path, tensors)
    load_target(str(folder), "float32", str(folder))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_table_before_or_after_scaling_is_left(tmp_path, scaled):
    stored = table() / (4.0 if scaled else 1.0)
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    folder = folder_of(tmp_path, {ANGLES: stored}, rope_parameters=rope)
    load_target(str(folder), "float32", str(folder))


@pytest.mark.parametrize(
    ("name", "stored", "message"),
    [
        (ANGLES, table(500000.0), "holds frequencies that differ from the config's"),
        (ANGLES, table(11000.0, jnp.bfloat16), "holds frequencies that differ"),
        (ANGLES, table()[:3].copy(), "holds frequencies that differ"),
        (ANGLES.replace("1", "2"), table(), r"extra tensor model.layers.2.self_attn.rotary"),
        ("model.layers.0.mlp.up_proj.bias", table(), r"extra tensor .*up_proj.bias \[4\]"),
        ("model.layers.2.input_layernorm.weight", table(), "extra tensor model.layers.2"),
        ("score.weight", own_head(), "extra tensor score.weight"),
        (EMBEDDING, np.zeros((64, 32), np.float32), r"has shape \[64, 32\], expected \[61, 32\]"),
    ],
)
def test_what_no_parameter_takes_is_named(tmp_path, name, stored, message):
    with pytest.raises(UserError, match=message):
        load_target(str(folder_of(tmp_path, {name: stored})), "float32", str(tmp_path))


def test_planted_bug_tables_are_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("beagle_jax.weights.target._is_rotary_table", lambda *_: True)
    folder = folder_of(tmp_path, {ANGLES: table(500000.0)})
    with pytest.raises(pytest.fail.Exception), pytest.raises(UserError):
        load_target(str(folder), "float32", str(folder))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, r"quantization_config \('awq'\); this version reads"),
        ({"quant_method": "fp8"}, r"quantization_config \('fp8'\)"),
        ({"bits": 4}, r"quantization_config \(\{'bits': 4\}\)"),
        ("int8", r"quantization_config \('int8'\)"),
    ],
)
def test_quantised_weights_are_refused_by_their_method(tmp_path, quantization, message):
    folder = folder_of(tmp_path, config={"quantization_config": quantization})
    with pytest.raises(UserError, match=message):
        load_target(str(folder), "float32", str(folder))
    fill_params(  # its weights alone would not tell
        TargetSpec.from_hf_config(LlamaConfig(**SIZES).to_dict(), "here"),
        HFFolder(folder),
        jnp.dtype("float32"),
        "here",
    )


# Factors of rotary frequencies


def test_rope_factors_equal_llama_3_scaling(tmp_path):
    """Longrope with one list means what a GGUF file's rope_freqs mean."""
    model = random_torch(LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3))
    plain = (1.0 / 50.0 ** (np.arange(0, 8, 2) / 8)).astype(np.float32)
    factors = [float(x) for x in plain / model.model.rotary_emb.inv_freq.numpy()]
    assert 1.0 in factors and len(set(factors)) > 2
    rope = {"rope_type": "longrope", "rope_theta": 50.0, "attention_factor": 1.0}
    rope |= {"short_factor": factors, "long_factor": factors}
    target = load_target(
        str(folder_of(tmp_path, config={"rope_parameters": LLAMA3})), "float32", str(tmp_path)
    )
    spec = TargetSpec.from_hf_config(
        {**LlamaConfig(**SIZES).to_dict(), "rope_parameters": rope}, "x"
    )
    assert isinstance(spec.rope_scaling, RopeFactors)
    assert isinstance(target.spec.rope_scaling, RopeScaling)

    def scaled(scaling):
        return dataclasses.replace(
            target, spec=dataclasses.replace(target.spec, rope_scaling=scaling)
        )

    same = scaled(spec.rope_scaling)
    np.testing.assert_allclose(logits_of(same), torch_logits(model), atol=1e-4, rtol=0)
    # The planted bug: factors in the wrong order.
    wrong = scaled(RopeFactors(spec.rope_scaling.factors[::-1]))
    with pytest.raises(AssertionError, match="Mismatched elements"):
        np.testing.assert_allclose(logits_of(wrong), torch_logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short_factor": [1.0] * 5, "long_factor": [1.0] * 5}, "has 5 numbers, expected 4"),
        ({"short_factor": [1.0, 0.0, 1.0, 1.0]}, "short_factor is .*, expected a list of numbers"),
    ],
)
def test_other_longrope_is_refused(change, message):
    rope = {"rope_type": "longrope", "rope_theta": 50.0, "attention_factor": 1.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4} | change
    config = {**LlamaConfig(**SIZES).to_dict(), "rope_parameters": rope}
    with pytest.raises(UserError, match=message):
        TargetSpec.from_hf_config(config, "here")


# Values of a config


def spec_of(change: dict, kind=LlamaConfig) -> TargetSpec:
    """Reads the spec of a tiny config, in which ... removes a key."""
    config = {**kind(**SIZES).to_dict(), "rope_parameters": ..., **change}
    return TargetSpec.from_hf_config({k: v for k, v in config.items() if v is not ...}, "here")


@pytest.mark.parametrize(
    "key",
    [
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "rms_norm_eps",
        "max_position_embeddings",
        "partial_rotary_factor",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
        "layer_types",
        "quantization_config",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_null_stands_for_no_value(kind, key):
    config_class = {"llama": LlamaConfig, "gemma3_text": Gemma3TextConfig}[kind]
    assert spec_of({key: None}, config_class) == spec_of({key: ...}, config_class)


@pytest.mark.parametrize("key", ["rope_type", "rope_theta", "partial_rotary_factor", "factor"])
def test_null_within_rope_parameters_stands_for_no_value(key):
    rope = {"rope_type": "default", "rope_theta": 500.0, key: None}
    absent = {name: value for name, value in rope.items() if name != key}
    assert spec_of({"rope_parameters": rope}) == spec_of({"rope_parameters": absent})


def test_null_that_means_something_stays():
    config = {
        "sliding_window": None,
        "head_dim": None,
        "eps": None,
        "rope": {"theta": None, "x": 1},
    }
    assert given_values(config) == {"sliding_window": None, "head_dim": None, "rope": {"x": 1}}
    assert spec_of({"model_type": "mistral", "sliding_window": None}).windows == ()
    assert spec_of({"model_type": "mistral", "sliding_window": ...}).windows == (4096, 4096)


BAD = ["x", float("nan"), float("inf"), -1, -0.5, 0, True, [], {}, 10**400]
NUMBERS = [
    "rope_theta",
    "rms_norm_eps",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
]
COUNTS = ["vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "sliding_window"]
COUNTS += ["sliding_window_pattern", "num_key_value_heads", "max_position_embeddings"]


@pytest.mark.parametrize("value", BAD, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_no_number_is_named(key, value):
    with pytest.raises(UserError, match=f"here: .*{key} is .*expected a number above zero"):
        spec_of({key: value})


@pytest.mark.parametrize("value", [*BAD, 256.0, "256"], ids=lambda value: str(value)[:8])
@pytest.mark.parametrize("key", COUNTS)
def test_what_is_no_count_is_named(key, value):
    with pytest.raises(UserError, match=f"here: .*{key} is .*expected a whole number above zero"):
        spec_of({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', expected a list"),
        ({"layer_types": [1, 2]}, "layer_types is .*expected a list of names"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers is .*expected a list of layers"),
        ({"max_window_layers": -1}, "max_window_layers is -1, expected a whole number from zero"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        ({"hidden_activation": 3}, "hidden_activation is 3, expected a name"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta is '1e4'"),
        ({"rope_scaling": {"type": 5}}, "rope_scaling.type is 5, expected a name"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": -1}, "sliding_attention": {}}},
            "rope_parameters.full_attention.rope_theta is -1",
        ),
        (
            {"rope_parameters": {"sliding_attention": 3}},
            "rope_parameters.sliding_attention is 3, expected an object",
        ),
        (
            {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}},
            "low_freq_factor is 1.0, expected less than high_freq_factor",
        ),
    ],
)
def test_other_values_that_are_none_are_named(change, message):
    with pytest.raises(UserError, match=f"here: .*{message}"):
        spec_of(change)


def test_whole_numbers_where_others_are_usual_are_numbers():
    change = {"rope_theta": 10000, "rms_norm_eps": 1, "query_pre_attn_scalar": 256.0}
    spec = spec_of(change)
    assert (spec.rope_theta, spec.rms_norm_eps) == (10000.0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"initializer_range": 1},
        {"rms_norm_eps": None},
        {"pad_token_id": "none"},
        {"attention_dropout": "0"},
        {"use_cache": 3},
        {"id2label": 7},
        {"dtype": "x"},
    ],
    ids=str,
)
def test_a_config_that_transformers_refuses_is_one_message(tmp_path, change):
    """transformers reads config.json on its way to the tokenizer."""
    folder = folder_of(tmp_path, config=change)
    with pytest.raises(UserError) as caught:
        load_target(str(folder), "float32", str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_the_key_that_transformers_refuses_is_named(tmp_path):
    folder = folder_of(tmp_path, config={"initializer_range": 1})
    with pytest.raises(UserError, match=r"config.json: transformers cannot .*'initializer_range'"):
        load_target(str(folder), "float32", str(folder))

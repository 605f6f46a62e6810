"""GGUF files of each architecture against the transformers model that they were written from.

Also optional keys, split files, stop tokens, and what is refused by its name.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from decode_cases import letters
from gguf_files import write_model
from test_weight_edges import LLAMA3, SIZES, logits_of, torch_logits
from torch_targets import random_torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from beagle_jax.errors import UserError
from beagle_jax.weights import gguf as gguf_module
from beagle_jax.weights import gguf_names
from beagle_jax.weights.gguf import GGUFFile
from beagle_jax.weights.target import load_target

GEMMA_3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 900.0},
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
TIED = {"tie_word_embeddings": True}
ARCHITECTURES = {
    "llama": ("llama", LlamaForCausalLM, LlamaConfig, {}),
    "llama, tied": ("llama", LlamaForCausalLM, LlamaConfig, TIED),
    "llama, wide heads": ("llama", LlamaForCausalLM, LlamaConfig, {"head_dim": 16}),
    "llama, linear": ("llama", LlamaForCausalLM, LlamaConfig, {"rope_parameters": LINEAR}),
    "llama, biases": (
        "llama",
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("qwen2", Qwen2ForCausalLM, Qwen2Config, TIED),
    "qwen3": ("qwen3", Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "gemma": ("gemma", GemmaForCausalLM, GemmaConfig, {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        Gemma2ForCausalLM,
        Gemma2Config,
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, "num_hidden_layers": 3},
    ),
    "gemma3": (
        "gemma3",
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 5,
            "num_hidden_layers": 7,
            "rope_parameters": GEMMA_3_ROPE,
            "final_logit_softcapping": None,
        },
    ),
}


def made(kind: str, **changes):
    """Makes a random transformers model and its architecture's name in llama.cpp."""
    architecture, model_class, config_class, settings = ARCHITECTURES[kind]
    return architecture, random_torch(model_class, config_class(**{**SIZES, **settings, **changes}))


def written(folder: Path, kind: str, changes=None, **more) -> tuple[Path, object]:
    """Writes a GGUF file of a random model with a tokenizer next to it."""
    architecture, model = made(kind, **(changes or {}))
    write_model(folder / "tiny.gguf", architecture, model, **more)
    letters().save_pretrained(folder)
    return folder / "tiny.gguf", model


def load(path: Path):
    return load_target(str(path), "float32", "unused")


def check(path: Path, model) -> None:
    expected = torch_logits(model)
    assert expected.std() > 0.3
    np.testing.assert_allclose(logits_of(load(path)), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_equal_transformers(tmp_path, kind):
    check(*written(tmp_path, kind))


def _changed(name: str, **fields):
    entry = gguf_names.ARCHITECTURES[name]._replace(**fields)
    return {**gguf_names.ARCHITECTURES, name: entry}


@pytest.mark.parametrize(
    ("kind", "planted"),
    [
        ("llama", _changed("llama", interleaved=False)),
        ("llama, biases", _changed("llama", interleaved=False)),
        ("qwen2", _changed("qwen2", interleaved=True)),
        ("qwen3", _changed("qwen3", interleaved=True)),
        ("gemma", _changed("gemma", plus_one=False)),
        ("gemma2", _changed("gemma2", plus_one=False)),
        ("gemma3", _changed("gemma3", every=3)),
    ],
)
def test_planted_bug_in_an_architecture(tmp_path, kind, planted, monkeypatch):
    path, model = written(tmp_path, kind)
    monkeypatch.setattr(gguf_module, "ARCHITECTURES", planted)
    with pytest.raises((AssertionError, UserError)):
        check(path, model)


# Keys that a file may lack


@pytest.mark.parametrize(
    ("kind", "changes", "missing"),
    [
        ("llama", {"num_key_value_heads": 4}, ["attention.head_count_kv"]),
        ("llama", {}, ["rope.freq_base"]),
        ("llama", {}, ["rope.dimension_count", "attention.key_length", "attention.value_length"]),
        ("llama, wide heads", {}, ["rope.dimension_count"]),
        ("llama, wide heads", {}, ["attention.key_length", "attention.value_length"]),
        ("llama, linear", {}, ["rope.scaling.type"]),
        ("llama", {}, ["tokenizer.ggml.pre", "tokenizer.ggml.merges"]),
        ("qwen2", {}, ["rope.freq_base"]),
        (
            "gemma2",
            {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            ["attn_logit_softcapping", "final_logit_softcapping"],
        ),
        ("gemma2", {"sliding_window": 4096}, ["attention.sliding_window"]),
        (
            "gemma3",
            {
                "layer_types": ["full_attention"] * 7,
            },
            ["attention.sliding_window"],
        ),
    ],
    ids=str,
)
def test_a_missing_key_has_the_default_of_llama_cpp(tmp_path, kind, changes, missing):
    check(*written(tmp_path, kind, changes, leave_out=missing))


@pytest.mark.parametrize("missing", ["block_count", "context_length", "embedding_length"])
def test_a_key_without_a_default_is_named(tmp_path, missing):
    path, _ = written(tmp_path, "llama", leave_out=[missing])
    with pytest.raises(UserError, match=f"GGUF metadata lacks 'llama.{missing}'"):
        load(path)


def test_sizes_given_layer_by_layer(tmp_path):
    metadata = {"feed_forward_length": [48, 48], "attention.head_count_kv": [2, 2]}
    check(*written(tmp_path, "llama", metadata=metadata))
    path, _ = written(tmp_path, "llama", metadata={"feed_forward_length": [48, 64]})
    with pytest.raises(UserError, match=r"'llama.feed_forward_length' differs from layer to layer"):
        load(path)


def test_a_window_of_a_llama_file_is_mistral_s(tmp_path):
    path, model = written(tmp_path, "llama", metadata={"attention.sliding_window": 5})
    assert load(path).spec.windows == (5, 5)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        check(path, model)


@pytest.mark.parametrize("pattern", [3, [True, False, True, True, False, True, False]])
def test_a_pattern_of_windows(tmp_path, pattern):
    near = pattern if isinstance(pattern, list) else [(i + 1) % 3 != 0 for i in range(7)]
    types = ["sliding_attention" if value else "full_attention" for value in near]
    metadata = {"attention.sliding_window_pattern": pattern}
    check(*written(tmp_path, "gemma3", {"layer_types": types}, metadata=metadata))


# Rotary factors


def factors_of(model) -> np.ndarray:
    """Returns what the converter writes as rope_freqs.weight."""
    plain = 1.0 / 50.0 ** (np.arange(0, 8, 2, dtype=np.float32) / 8)
    return (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)


def test_rope_freqs_are_llama_3_s_scaling(tmp_path, monkeypatch):
    _, model = made("llama", rope_parameters=LLAMA3)
    factors = factors_of(model)
    assert len(set(factors)) > 2
    path, model = written(
        tmp_path, "llama", {"rope_parameters": LLAMA3}, extra={"rope_freqs.weight": factors}
    )
    check(path, model)
    # The planted bug: the tensor is left where it is.
    hf_config = gguf_module.hf_config
    monkeypatch.setattr(gguf_module, "hf_config", lambda *given: hf_config(*given[:-1], None))
    with pytest.raises(AssertionError, match="Mismatched elements"):
        check(path, model)


def test_the_config_of_rope_freqs_is_one_that_transformers_computes(tmp_path):
    """A folder of `convert to-jax` contains it, and its tokenizer is read through it."""
    _, model = made("llama", rope_parameters=LLAMA3)
    extra = {"rope_freqs.weight": factors_of(model)}
    path, _ = written(tmp_path, "llama", {"rope_parameters": LLAMA3}, extra=extra)
    config = GGUFFile(path).config()
    same = LlamaForCausalLM(LlamaConfig(**config)).eval()
    same.load_state_dict(model.state_dict())
    np.testing.assert_allclose(torch_logits(same), torch_logits(model), atol=1e-4, rtol=0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(path).tokenizer.get_vocab() == letters().get_vocab()


def test_rope_freqs_of_ones_are_none(tmp_path):
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    path, model = written(tmp_path, "llama", extra=ones)
    check(path, model)
    assert load(path).spec.rope_scaling is None


def test_a_table_of_frequencies_is_compared(tmp_path):
    table = (1.0 / 10000.0 ** (np.arange(0, 8, 2) / 8)).astype(np.float32)
    check(*written(tmp_path, "llama", extra={"blk.1.attn_rot_embd.weight": table}))
    path, _ = written(tmp_path, "llama", extra={"blk.1.attn_rot_embd.weight": table * 2})
    with pytest.raises(
        UserError, match=r"layers.1.self_attn.rotary_emb.inv_freq holds frequencies that differ"
    ):
        load(path)


# Split files


def split(folder: Path, **options) -> tuple[list[Path], object]:
    _, model = written(folder, "llama", **options)
    return sorted(folder.glob("*.gguf")), model


@pytest.mark.parametrize("small_first", [False, True])
def test_a_split_file_is_read_from_any_part(tmp_path, small_first):
    options = {"split_max_tensors": 8, "small_first_shard": small_first}
    parts, model = split(tmp_path, **options)
    assert len(parts) >= 3
    for part in parts:
        check(part, model)


def test_missing_parts_are_named(tmp_path):
    parts, _ = split(tmp_path, split_max_tensors=8)
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        with pytest.raises(
            UserError, match=rf"one part of {len(parts)}, and {parts[1].name} is not"
        ):
            load(part)


def test_parts_under_wrong_names_are_refused(tmp_path):
    parts, _ = split(tmp_path, split_max_tensors=8)
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(
        UserError, match=rf"this is part 1 of {len(parts)}, by its name part 1 of 1"
    ):
        load(alone)
    alone.rename(parts[0])
    parts[1].rename(tmp_path / "x")
    parts[2].rename(parts[1])
    (tmp_path / "x").rename(parts[2])
    with pytest.raises(UserError, match=f"this is part 3 of {len(parts)}, by its name part 2 of"):
        load(parts[0])


def test_parts_of_two_models_are_refused(tmp_path):
    for name, layers in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        architecture, model = made("llama", num_hidden_layers=layers)
        write_model(tmp_path / name / "m.gguf", architecture, model, split_max_tensors=15)
    first, second = (sorted((tmp_path / name).glob("*.gguf")) for name in "ab")
    assert len(first) == len(second) == 2
    second[1].replace(first[1])
    letters().save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=r"the weights do not fit the config|is in two parts"):
        load(first[0])


# Ends of answers


@pytest.mark.parametrize(
    ("metadata", "beside", "expected"),
    [
        ({}, None, (1,)),
        ({"tokenizer.ggml.eot_token_id": 2}, None, (1, 2)),
        ({"tokenizer.ggml.eom_token_id": 3}, None, (1, 3)),
        ({"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 3}, None, (1, 2, 3)),
        ({"tokenizer.ggml.eot_token_id": 1}, None, (1,)),
        ({}, {"eos_token_id": [4, 1, 5]}, (1, 4, 5)),
        ({"tokenizer.ggml.eot_token_id": 2}, {"eos_token_id": 6}, (1, 2, 6)),
        ({}, {"eos_token_id": None}, (1,)),
        ({}, {"temperature": 0.6}, (1,)),
    ],
)
def test_all_ends_that_the_files_name_end_an_answer(tmp_path, metadata, beside, expected):
    if beside is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(beside))
    assert load(written(tmp_path, "llama", metadata=metadata)[0]).eos_ids == expected


def test_an_end_may_be_named_beside_the_file_alone(tmp_path):
    path, _ = written(tmp_path, "llama", leave_out=["tokenizer.ggml.eos_token_id"])
    with pytest.raises(UserError, match="names no token that ends an answer"):
        load(path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4]}')
    assert load(path).eos_ids == (4,)
    for wrong in ('{"eos_token_id": []}', '{"eos_token_id": ["x"]}', '{"eos_token_id": -1}'):
        (tmp_path / "generation_config.json").write_text(wrong)
        with pytest.raises(UserError, match=r"eos_token_id is .*; expected a token's id"):
            load(path)


@pytest.mark.parametrize("name", ["eos", "eot", "eom"])
def test_an_end_beyond_the_tokens_is_damage(tmp_path, name):
    path, _ = written(tmp_path, "llama", metadata={f"tokenizer.ggml.{name}_token_id": 61})
    with pytest.raises(UserError, match=f"{name}_token_id is 61, and there are 61 tokens"):
        load(path)


# What is refused


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen3moe"}, "architecture is 'qwen3moe'; this version reads"),
        ({"general.architecture": "falcon"}, "architecture is 'falcon'"),
        ({"general.architecture": "clip"}, "architecture is 'clip'"),
        (
            {"general.type": "adapter"},
            r"the type of this GGUF file is 'adapter' \(general.type\), not a model",
        ),
        ({"general.type": "mmproj"}, "the type of this GGUF file is 'mmproj'"),
        ({"expert_count": 8}, r"architecture 'llama' with 8 experts \(a mixture of experts"),
        ({"rope.scaling.type": "yarn"}, "RoPE scaling 'yarn' is not supported"),
        ({"rope.dimension_count": 4, "attention.key_length": 8}, "keys of 8 .* and rotates 4"),
        ({"attention.value_length": 4}, "keys of 8 dimensions and has values of 4"),
        ({"logit_scale": 0.5}, "'llama.logit_scale' is 0.5, which this version does not support"),
        ({"attention.causal": False}, "'llama.attention.causal' is False"),
        ({"final_logit_softcapping": 30.0}, "'llama.final_logit_softcapping' is 30.0"),
        ({"attention.head_count": "x"}, "head_count' is 'x', expected a number of heads"),
        ({"rope.freq_base": "x"}, "'llama.rope.freq_base' is 'x', expected a number"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_name(tmp_path, metadata, message):
    if "general.architecture" in metadata:
        path = other_architecture(tmp_path, metadata["general.architecture"])
    else:
        path, _ = written(tmp_path, "llama", metadata=metadata)
    with pytest.raises(UserError, match=message):
        load(path)


def other_architecture(folder: Path, architecture: str) -> Path:
    """Writes a llama's file with another `general.architecture`."""
    writer = gguf.GGUFWriter(folder / "tiny.gguf", architecture)
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((61, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", "blk.0.attn_q.bias"),  # not all that attention_bias stands for
        ("llama", "blk.0.attn_q_norm.weight"),
        ("llama", "blk.2.attn_norm.weight"),
        ("llama", "blk.0.ffn_gate_inp.weight"),
        ("qwen2", "blk.0.attn_output.bias"),
        ("qwen2", "rope_freqs.weight"),
        ("qwen3", "blk.0.attn_q.bias"),
        ("gemma2", "blk.0.attn_q_norm.weight"),
        ("gemma3", "mm.input_projection.weight"),
    ],
)
def test_a_tensor_that_no_parameter_takes_is_named(tmp_path, kind, extra):
    path, _ = written(tmp_path, kind, extra={extra: np.ones(32, np.float32)})
    name = extra.replace("blk.2.attn_norm", "model.layers.2.input_layernorm")
    with pytest.raises(UserError, match=rf"extra tensor {name} \[32\]"):
        load(path)


def test_a_file_without_a_template_or_first_token_has_a_tokenizer(tmp_path):
    architecture, model = made("llama")
    write_model(tmp_path / "tiny.gguf", architecture, model)
    tokenizer = load(tmp_path / "tiny.gguf").tokenizer
    assert tokenizer.chat_template is None and tokenizer.bos_token is None

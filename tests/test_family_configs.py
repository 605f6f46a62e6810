"""What the config.json of a target family sets, and what is refused by name."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Phi3Config, Phi3Model

from beagle_jax.errors import UserError
from beagle_jax.model.layers import RopeScaling, rope_tables
from beagle_jax.model.target import TargetSpec

# Configs

CONFIG = {
    "model_type": "llama",
    "vocab_size": 12,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def _read(**changes) -> TargetSpec:
    return TargetSpec.from_hf_config({**CONFIG, **changes}, "here")


def test_plain_llama_has_no_extras():
    spec = _read(sliding_window=4)  # Llama has none, whatever the config says
    assert (spec.biases, spec.qk_norm, spec.rope_scaling, spec.windows, spec.shortest_window) == (
        (),
        False,
        None,
        (),
        None,
    )
    assert (spec.num_kv_heads, spec.head_dim) == (4, 16)


def test_gemma_3_as_old_files_say_it():
    """Keys of transformers 4, which wrote no layer types, no rope_parameters and no defaults."""
    old = {
        "rope_theta": 5e5,
        "rope_local_base_freq": 7.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 9,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
    }
    spec = _read(model_type="gemma3_text", **old)
    assert (spec.windows, spec.rope_theta, spec.local_rope_theta) == ((9, 9, None), 5e5, 7.0)
    assert (spec.rope_scaling, spec.score_scale, spec.embed_scale) == (RopeScaling(8.0), 0.25, 8.0)
    assert (spec.tie_embeddings, spec.head_dim, spec.num_kv_heads) == (True, 256, 4)
    bare = _read(model_type="gemma3_text")
    assert (bare.rope_theta, bare.local_rope_theta, bare.windows) == (1e6, 1e4, (4096,) * 3)
    assert (bare.score_cap, bare.logit_cap) == (None, None)
    assert _read(model_type="gemma3_text", attn_logit_softcapping=50.0).score_cap == 50.0
    assert (_read(model_type="gemma2").score_cap, _read(model_type="gemma2").logit_cap) == (
        50.0,
        30.0,
    )


def test_what_moe_configs_ask_for():
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    experts = _read(model_type="qwen3_moe", **moe, decoder_sparse_step=2).experts
    assert (experts.count, experts.per_token, experts.width, experts.dense_layers) == (
        8,
        2,
        24,
        (0, 2),
    )
    assert not experts.renormalised
    mixtral = _read(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    assert (
        mixtral.experts.width,
        mixtral.experts.renormalised,
        mixtral.rope_theta,
        mixtral.windows,
    ) == (96, True, 1e6, ())
    spec = _read(model_type="qwen3_moe", **moe, use_sliding_window=True, max_window_layers=2)
    assert spec.windows == (4096,) * 3  # this family knows no first layers without a window


def test_what_configs_ask_for():
    scaling = {"type": "linear", "factor": 2}
    assert _read(rope_scaling=scaling, rope_theta=7.0).rope_scaling == RopeScaling(2.0)
    assert _read(model_type="mistral").windows == (4096,) * 3  # transformers' own default
    assert _read(model_type="mistral", sliding_window=None).windows == ()
    assert _read(model_type="mistral", num_key_value_heads=None).num_kv_heads == 4
    assert _read(model_type="qwen2", sliding_window=9).windows == ()
    config = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}
    assert _read(**config).windows == ()  # the first 28 layers see everything
    assert _read(**config, max_window_layers=2).windows == (None, None, 9)
    assert _read(
        **config, layer_types=["sliding_attention", "full_attention", "full_attention"]
    ).windows == (9, None, None)
    assert _read(**config, max_window_layers=2).shortest_window == 9
    assert _read(model_type="qwen3").head_dim == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma3"},  # without a text_config
            r"model_type is 'gemma3'; this version supports 'llama' \(Llama, Vicuna, "
            r"SmolLM2\), 'mistral'",
        ),
        ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'"),
        ({"model_type": "mixtral"}, "the model config lacks num_experts, num_experts_per_tok"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            r"is 3; expected 1 to 2 \(num_local_experts\)",
        ),
        (
            {"model_type": "gemma3_text", "hidden_activation": "gelu"},
            "hidden_activation is 'gelu'; expected 'gelu_pytorch_tanh'",
        ),
        (
            {"model_type": "gemma3_text", "sliding_window": None},
            "sliding_window is null; 'gemma3_text' needs a number",
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention is true",
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"sliding_attention": {"rope_type": "linear"}},
            },
            "'linear' of sliding layers",
        ),
        (
            {"rope_scaling": {"rope_type": "3d", "factor": 2.0}},
            "rope type '3d' is not supported; expected one of 'default', 'linear'",
        ),
        ({"model_type": "gpt_oss"}, "'gpt_oss' is not supported: it has attention sinks"),
        ({"model_type": "deepseek_v3"}, "it has multi-head latent attention"),
        ({"model_type": "qwen3_next"}, "it has layers of linear attention"),
        ({"model_type": "granite"}, "it has scales of embeddings, residuals and logits"),
        ({"model_type": "glm4"}, "'glm4' is not supported"),
        (
            {"model_type": "phi3", "partial_rotary_factor": 0.2},
            "partial_rotary_factor 0.2 rotates 3 of 16 numbers",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8}},
            "rope type 'longrope' lacks long_factor",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries"),
        (
            {"model_type": "olmo3", "sliding_window": None},
            "sliding_window is null; 'olmo3' needs a number",
        ),
        (
            {"model_type": "exaone4", "sliding_window_pattern": "LLX"},
            "sliding_window_pattern is 'LLX', expected a number from zero, or letters",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope type 'llama3' lacks low_freq_factor, high_freq_factor, orig",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"model_type": "mistral", "attention_bias": True},
            "attention_bias is true, which 'mistral' does not have",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 3},
            "layer_types mixes kinds of attention, which 'mistral'",
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "layer_types": ["chunked_attention"] * 3,
            },
            "3 entries, among them 'chunked",
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "layer_types": ["full_attention"] * 2,
            },
            "has 2 entries; expected 3 of",
        ),
    ],
)
def test_configs_refused_by_name(changes, message):
    with pytest.raises(UserError, match=f"here: .*{message}"):
        _read(**changes)


def test_families_of_2026_as_their_configs_say_it():
    olmo2, olmo3 = _read(model_type="olmo2"), _read(model_type="olmo3", num_hidden_layers=4)
    for spec in (olmo2, olmo3):
        assert (spec.pre_norms, spec.post_norms, spec.qk_norm_whole) == (False, True, True)
    assert (olmo2.rope_theta, olmo3.rope_theta, olmo3.local_rope_theta) == (1e4, 5e5, 5e5)
    assert olmo3.windows == (4096, 4096, 4096, None)
    smollm3 = _read(model_type="smollm3", num_hidden_layers=8)
    assert (smollm3.unrotated, smollm3.rope_theta, smollm3.tie_embeddings) == ((3, 7), 2e6, True)
    assert _read(model_type="smollm3", no_rope_layers=[0, 1, 1, 1]).unrotated == (0,)
    # EXAONE 4.0 32B gives letters, and 1.2B no window
    letters = {"sliding_window_pattern": "LLLG", "num_hidden_layers": 6, "num_key_value_heads": 2}
    exaone = _read(model_type="exaone4", sliding_window=9, **letters)
    assert exaone.windows == (9, 9, 9, None, 9, None) and exaone.unrotated == (3, 5)
    assert (exaone.qk_norm, exaone.pre_norms, exaone.post_norms) == (True, False, True)
    small = _read(model_type="exaone4", sliding_window=None, num_key_value_heads=2)
    assert (small.windows, small.unrotated) == ((), ())
    phi = _read(model_type="phi3", partial_rotary_factor=0.75, sliding_window=262144)
    assert (phi.rotary_dim, phi.windows[0], phi.num_kv_heads) == (12, 262144, 4)


def _by_torch(rope: dict, context: int, length: int, **more):
    """transformers' cosines and sines [length, H] of the last positions of a text."""
    config_class, model_class = (Phi3Config, Phi3Model) if more else (LlamaConfig, LlamaModel)
    config = config_class(
        hidden_size=256,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=8,
        pad_token_id=None,
        max_position_embeddings=context,
        rope_parameters=rope,
        **more,
    )
    made = model_class(config).rotary_emb
    return [x[0].numpy() for x in made(torch.zeros(1), torch.arange(length)[None])]


YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.01 * pair for pair in range(48)],
    "long_factor": [1.0 + pair for pair in range(48)],
}
ORIGINAL = {"original_max_position_embeddings": 64}
ROPES = {
    "yarn": (YARN, 65536, 300),
    "yarn of DeepSeek": ({**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}, 65536, 300),
    "yarn, not truncated": ({**YARN, "truncate": False, "beta_fast": 16.0}, 65536, 300),
    "yarn, scaled": ({**YARN, "attention_factor": 1.3}, 65536, 300),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, 512, 512),
    # 300 of 4096 configured positions, trained on 64: the long factors
    "longrope, long": (LONG, 4096, 300),
    "longrope, short": (LONG, 64, 60),
    "longrope, scaled": ({**LONG, "attention_factor": 1.5}, 4096, 300),
    "longrope, factor": ({**LONG, "factor": 3.0}, 4096, 300),
}


def rope_difference(name: str, **changes) -> float:
    rope, context, length = ROPES[name]
    more = ORIGINAL if rope["rope_type"] == "longrope" else {}
    expected = _by_torch(dict(rope), context, length, **more)
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": context}
    kind = "phi3" if more else "llama"
    spec = _read(model_type=kind, rope_parameters=rope, **sizes, **more)
    scaling = spec.rope_scaling._replace(**changes) if changes else spec.rope_scaling
    tables = rope_tables(
        jnp.arange(length), spec.rotary_dim or spec.head_dim, spec.rope_theta, scaling
    )
    return max(
        float(np.abs(ours - theirs).max()) for ours, theirs in zip(tables, expected, strict=True)
    )


@pytest.mark.parametrize("name", ROPES)
def test_rotary_scaling_is_that_of_transformers(name):
    # 1e-4: cosines of angles up to 512, in float32 on both sides
    assert rope_difference(name) < 1e-4


def test_planted_bug_in_rotary_scaling():
    assert rope_difference("yarn", scale=1.0) > 0.1
    assert rope_difference("longrope, long", factors=tuple(LONG["short_factor"])) > 0.1


def test_scaling_is_chosen_by_the_configured_context_alone():
    """transformers takes the short factors for a short text of a long model; we never change."""
    sizes = {"hidden_size": 256, "num_attention_heads": 2, **ORIGINAL}
    long, short = (
        _read(model_type="phi3", rope_parameters=LONG, max_position_embeddings=context, **sizes)
        for context in (4096, 64)
    )
    assert long.rope_scaling.factors == tuple(LONG["long_factor"])
    assert short.rope_scaling.factors == tuple(LONG["short_factor"])
    assert (long.rope_scaling.scale, short.rope_scaling.scale) == (pytest.approx(1.41421356), 1.0)

"""What the config.json of a target family sets, and what is refused by name."""

import pytest

from beagle_jax.errors import UserError
from beagle_jax.model.layers import RopeScaling
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
            {"model_type": "gemma3"},
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
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported; expected one of 'default', 'linear'",
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

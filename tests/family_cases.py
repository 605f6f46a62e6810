"""Tiny targets of every family, with random weights from PyTorch."""

import pytest
from decode_cases import NEVER, letters
from torch_targets import random_torch
from transformers import (
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from beagle_jax.weights.target import load_target

# Theta 50 and 64 tokens put the eight waves of a head on both sides of the blend and inside it.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
# Theta 50: fast pairs stay, slow ones are slowed, some are blended.
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
}
# A head has 8 numbers, 6 of them rotated. transformers takes the long factors from the second token
# on, and the angle of the first is zero.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 50.0,
    "short_factor": [1.0, 1.0, 1.0],
    "long_factor": [1.5, 3.0, 7.0],
    "attention_factor": 1.25,
    "original_max_position_embeddings": 1,
    "partial_rotary_factor": 0.75,
}
# Every window is shorter than the texts, and longer than some rounds and not others.
FAMILIES = {
    # heads as Llama 2 and Vicuna, head as SmolLM2
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "llama 3 rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"head_dim": 16, "rope_parameters": LLAMA3_ROPE},
    ),
    "linear rope": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LINEAR_ROPE}),
    "yarn rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"head_dim": 16, "rope_parameters": YARN_ROPE},
    ),
    "dynamic rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 4.0}},
    ),
    "olmo 2": (Olmo2ForCausalLM, Olmo2Config, {"attention_bias": True}),
    "olmo 3": (
        Olmo3ForCausalLM,
        Olmo3Config,
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": YARN_ROPE,
            },
        },
    ),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layers": [0, 1]}),
    "exaone 4": (
        Exaone4ForCausalLM,
        Exaone4Config,
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "exaone 4 without window": (
        Exaone4ForCausalLM,
        Exaone4Config,
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "phi 3": (Phi3ForCausalLM, Phi3Config, {"sliding_window": 6}),
    "phi 4 mini": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 1,
            "rope_parameters": LONG_ROPE,
        },
    ),
    "llama with biases": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "mistral without window": (
        MistralForCausalLM,
        MistralConfig,
        {"sliding_window": None, "head_dim": 16},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2 with a window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 with all": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "qwen3 moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3 moe with all": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [0],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    # Softcaps low enough to bend scores and logits; other bases than the defaults.
    "gemma 2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            "head_dim": 16,
            "tie_word_embeddings": False,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma": (GemmaForCausalLM, GemmaConfig, {"head_dim": 16, "hidden_act": "gelu"}),
    "gemma 3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 5,
            "final_logit_softcapping": 20.0,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 900.0},
            },
        },
    ),
}


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    """Makes a random transformers model and loads the same from the folder that it wrote."""
    model_class, config_class, settings = FAMILIES[request.param]
    config = config_class(
        **{
            **dict(
                vocab_size=61,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                rms_norm_eps=1e-3,
                max_position_embeddings=256,
                eos_token_id=NEVER[0],
                bos_token_id=None,
                pad_token_id=None,
            ),
            **settings,
        }
    )
    model = random_torch(model_class, config)
    folder = tmp_path_factory.mktemp("family")
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    return model, load_target(str(folder), "float32", str(folder))


each_family = pytest.mark.parametrize("family", FAMILIES, indirect=True)

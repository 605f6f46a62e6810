"""Each family of the target against transformers' own model of it: logits, states, greedy tokens,
drafted tokens.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY, random_params
from decode_cases import NEVER, letters, target_of
from torch_targets import random_torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from beagle_jax.decoding.batch import write_answers
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.tree import ROOT_ONLY, chain, static_tree
from beagle_jax.errors import UserError
from beagle_jax.model import target as target_module
from beagle_jax.model.beagle import DraftSpec, init_draft
from beagle_jax.model.layers import RopeScaling, apply_rope, rms_norm, rope_tables
from beagle_jax.model.masks import causal_mask, within_window
from beagle_jax.model.target import TargetSpec, forward, logits, param_table
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import fill_params, load_target, open_source

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
PROMPTS = [[5, 17, 60, 3], [8], list(range(40))]


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    """A random model of transformers, and the same loaded from the folder it wrote."""
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


def _check_states_and_logits(model, spec, params):
    tokens_BT = np.random.default_rng(1).integers(0, spec.vocab_size, (3, 24))
    positions_BT = jnp.broadcast_to(jnp.arange(24), (3, 24))
    # One operation after the other: families and plants share nearly all of them, so that there is
    # little to compile.
    mask_BTT = causal_mask(jnp.full(3, 24), 24)
    states_BTD = forward(params, spec, tokens_BT, positions_BT, mask_BTT).states_BTD
    with torch.no_grad():
        expected_BTD = model.model(torch.from_numpy(tokens_BT)).last_hidden_state
        expected_BTV = model(torch.from_numpy(tokens_BT)).logits.numpy()
    assert expected_BTV.std() > 1  # a flat output would equal anything
    np.testing.assert_allclose(states_BTD, expected_BTD.numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits(params, spec, states_BTD), expected_BTV, atol=1e-4, rtol=0)


@each_family
def test_states_and_logits_equal_torch(family):
    model, target = family
    _check_states_and_logits(model, target.spec, target.params)


def _without(key):
    """Leaves one tensor out of the last layer, as if the loader did not know it."""

    def plant(spec, params):
        *rest, last = params["layers"]
        return spec, {
            **params,
            "layers": [*rest, {name: array for name, array in last.items() if name != key}],
        }

    return plant


def _norms_swapped(spec, params):
    def swap(layer):
        return {**layer, "q_norm_H": layer["k_norm_H"], "k_norm_H": layer["q_norm_H"]}

    return spec, {**params, "layers": [swap(layer) for layer in params["layers"]]}


def _norm_ignored(key):
    def drop(layer):
        return {**layer, key: jnp.zeros_like(layer[key])}

    return lambda spec, params: (
        spec,
        {**params, "layers": [drop(layer) for layer in params["layers"]]},
    )


def _experts_swapped(spec, params):
    def swap(layer):
        return {
            **layer,
            "up_EFD": layer["up_EFD"][jnp.array([1, 0, *range(2, spec.experts.count)])],
        }

    return spec, {**params, "layers": [swap(layer) for layer in params["layers"]]}


def _experts(**changes):
    return lambda spec, params: (
        dataclasses.replace(spec, experts=spec.experts._replace(**changes)),
        params,
    )


def _scaling(**changes):
    return lambda spec, params: (
        dataclasses.replace(spec, rope_scaling=spec.rope_scaling._replace(**changes)),
        params,
    )


def _change(**changes):
    return lambda spec, params: (dataclasses.replace(spec, **changes), params)


PLANTS = [
    ("llama 3 rope", "scaling ignored", _change(rope_scaling=None)),
    ("llama 3 rope", "no blend", _scaling(high_freq_factor=1.0 + 1e-6)),
    ("llama 3 rope", "all waves slowed", _scaling(original_positions=None)),
    ("linear rope", "scaling ignored", _change(rope_scaling=None)),
    ("llama with biases", "o bias left out", _without("o_bias_D")),
    ("llama with biases", "down bias left out", _without("down_bias_D")),
    ("mistral", "window one longer", _change(windows=(6, 6))),
    ("mistral", "window one shorter", _change(windows=(4, 4))),
    ("mistral", "no window", _change(windows=())),
    ("mistral without window", "default window", _change(windows=(20, 20))),
    ("qwen2", "q bias left out", _without("q_bias_F")),
    ("qwen2", "k bias left out", _without("k_bias_F")),
    ("qwen2", "v bias left out", _without("v_bias_F")),
    ("qwen2 with a window", "window in every layer", _change(windows=(3, 3))),
    ("qwen2 with a window", "window in the wrong layer", _change(windows=(3, None))),
    ("qwen3", "norms left out", _change(qk_norm=False)),
    ("qwen3", "norms swapped", _norms_swapped),
    ("qwen3 with all", "o bias left out", _without("o_bias_D")),
    ("mixtral", "shares do not sum to one", _experts(renormalised=False)),
    ("mixtral", "one expert only", _experts(per_token=1)),
    ("mixtral", "two experts swapped", _experts_swapped),
    ("qwen3 moe", "shares do not sum to one", _experts(renormalised=False)),
    ("qwen3 moe with all", "shares sum to one", _experts(renormalised=True)),
    ("gemma 2", "scores not capped", _change(score_cap=None)),
    ("gemma 2", "logits not capped", _change(logit_cap=None)),
    ("gemma 2", "windows the other way round", _change(windows=(None, 6))),
    ("gemma 3", "Llama's layers", _change(gemma=False)),
    ("gemma 3", "embedding not scaled", _change(embed_scale=1.0)),
    ("gemma 3", "scores scaled by head width", _change(score_scale=None)),
    ("gemma 3", "one rotary base", _change(local_rope_theta=None)),
    ("gemma 3", "rope scaling ignored", _change(rope_scaling=None)),
    ("gemma 3", "one window too long", _change(windows=(6, None))),
    ("gemma 3", "norm after attention left out", _norm_ignored("after_attention_norm_D")),
    ("gemma 3", "norm after the MLP left out", _norm_ignored("after_mlp_norm_D")),
]


@pytest.mark.parametrize(
    ("family", "plant"),
    [(name, plant) for name, _, plant in PLANTS],
    indirect=["family"],
    ids=[f"{name}: {what}" for name, what, _ in PLANTS],
)
def test_planted_bug_in_states(family, plant):
    model, target = family
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _check_states_and_logits(model, *plant(target.spec, target.params))


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
def test_planted_bug_norm_after_rope(family, monkeypatch):
    """A norm without weight commutes with a rotation, so what tells the order is the weight: here
    it comes late.
    """
    late = []

    def norm(x, weight_D, *rest, **named):
        if x.ndim < 5:
            return rms_norm(x, weight_D, *rest, **named)
        late.append(weight_D)
        return rms_norm(x, jnp.ones_like(weight_D), *rest, **named)

    monkeypatch.setattr(target_module, "rms_norm", norm)
    monkeypatch.setattr(
        target_module,
        "apply_rope",
        lambda x, *rotary: apply_rope(x, *rotary) * late.pop(0).reshape(1, 1, 1, 1, -1),
    )
    model, target = family
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _check_states_and_logits(model, target.spec, target.params)


def _torch_answers(model):
    """Greedy tokens of transformers' generate, each prompt alone."""
    answers = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        with torch.no_grad():  # with the mask given, generate does not take token 0 for padding
            full = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=32
            )
        answers.append(full[0, len(prompt) :].tolist())
    assert (
        len(set(itertools.chain(*answers))) > 7
    )  # a token that repeats for ever would equal anything
    return answers


def _decoded(target, tree=ROOT_ONLY):
    """Our tokens, with a random draft where the tree needs one."""
    spec = DraftSpec.from_target(target.spec, init_std=0.3)
    decoder = SpeculativeDecoder(
        target, Draft(spec, init_draft(spec, jax.random.key(1)), None, {}), tree
    )
    return [answer.tokens for answer in decoder.generate(PROMPTS, max_new_tokens=32)]


# What these bring is in the products of a layer, which know of no cache and no tree; the window of
# one of them others have too.
LAYERS_ALONE = (
    "llama 3 rope",
    "linear rope",
    "llama with biases",
    "mistral without window",
    "qwen2",
    "qwen3",
    "qwen3 with all",
    "qwen3 moe",
)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LAYERS_ALONE else name
        for name in FAMILIES
    ],
    indirect=True,
)
def test_greedy_tokens_equal_torch_with_a_tree(family):
    model, target = family
    assert _decoded(target, static_tree([(0,), (1,), (0, 0), (0, 0, 0)])) == _torch_answers(model)


@pytest.mark.parametrize("family", ["mistral", "qwen3 moe with all", "gemma 3"], indirect=True)
def test_greedy_tokens_equal_torch_plainly(family):
    """What a family brings is in `forward`, which a tree asks for more rows: windows, experts and
    Gemma's layers stand for all.
    """
    model, target = family
    assert _decoded(target) == _torch_answers(model)


@pytest.mark.parametrize("far", [-1, 1])
@pytest.mark.parametrize("family", ["mistral"], indirect=True)
def test_planted_bug_in_the_window_over_the_cache(family, far, monkeypatch):
    """New tokens see right, slots are cut off one too early or too late."""

    def wrong(position_BT, key_BS, window):
        return within_window(position_BT, key_BS, window + (far if key_BS.shape[0] == 1 else 0))

    monkeypatch.setattr(target_module, "within_window", wrong)
    model, target = family
    # A stop token of its own keeps the planted program apart from the right one.
    assert _decoded(
        dataclasses.replace(target, eos_ids=(20_000 + far,)), chain(3)
    ) != _torch_answers(model)


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
def test_planted_bug_in_greedy_tokens(family):
    model, target = family
    _, params = _without("q_bias_F")(target.spec, target.params)
    assert _decoded(dataclasses.replace(target, params=params)) != _torch_answers(model)


# Parts


def test_window_looks_as_drawn():
    found = within_window(jnp.array([[4, 1]]), jnp.arange(6)[None], 3)
    assert found.astype(int).tolist() == [[[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]]


def _rope_difference(scaling) -> float:
    """From transformers' cosines and sines for the sizes of Llama 3.1."""
    rope = {**LLAMA3_ROPE, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=8,
        rope_parameters=rope,
        max_position_embeddings=131072,
    )
    expected = LlamaForCausalLM(config).model.rotary_emb(torch.zeros(1), torch.arange(64)[None])
    found = rope_tables(jnp.arange(64)[None], 128, 5e5, scaling)
    return max(
        float(np.abs(ours - theirs.numpy()).max())
        for ours, theirs in zip(found, expected, strict=True)
    )


def test_llama3_rope_equals_torch():
    assert _rope_difference(RopeScaling(8.0, 1.0, 4.0, 8192)) < 1e-5
    assert (
        _rope_difference(RopeScaling(8.0, 1.0, 2.0, 8192)) > 1e-3
    )  # planted: another end of the blend


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
    """Keys of transformers 4, which wrote neither layer types nor rope_parameters, nor what was the
    default.
    """
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
    asked = _read(model_type="qwen3_moe", **moe, use_sliding_window=True, max_window_layers=2)
    assert asked.windows == (4096,) * 3  # this family knows no first layers without a window


def test_what_configs_ask_for():
    scaling = {"type": "linear", "factor": 2}
    assert _read(rope_scaling=scaling, rope_theta=7.0).rope_scaling == RopeScaling(2.0)
    assert _read(model_type="mistral").windows == (4096,) * 3  # transformers' own default
    assert _read(model_type="mistral", sliding_window=None).windows == ()
    assert _read(model_type="mistral", num_key_value_heads=None).num_kv_heads == 4
    assert _read(model_type="qwen2", sliding_window=9).windows == ()
    asked = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}
    assert _read(**asked).windows == ()  # the first 28 layers see everything
    assert _read(**asked, max_window_layers=2).windows == (None, None, 9)
    assert _read(
        **asked, layer_types=["sliding_attention", "full_attention", "full_attention"]
    ).windows == (9, None, None)
    assert _read(**asked, max_window_layers=2).shortest_window == 9
    assert _read(model_type="qwen3").head_dim == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma3"},
            r"model_type is 'gemma3'; this version computes 'llama' \(Llama, Vicuna, "
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


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
def test_a_bias_that_the_config_does_not_name_is_an_extra_tensor(family):
    spec, opened = family[1].spec, open_source(family[1].source, None)
    with pytest.raises(
        UserError, match=r"extra tensor model.layers.0.self_attn.q_proj.bias \[32\]"
    ):
        fill_params(dataclasses.replace(spec, biases=()), opened, jnp.dtype("float32"), "here")
    more = dataclasses.replace(spec, biases=(*spec.biases, "mlp.up_proj"), qk_norm=True)
    with pytest.raises(
        UserError,
        match=r"(?s)missing tensor model.layers.0.mlp.up_proj.bias "
        r"\[48\].*layers.0.self_attn.k_norm.weight \[8\]",
    ):
        fill_params(more, opened, jnp.dtype("float32"), "here")


# The answer writer, whose cache slots are not positions


def _written(spec, prompts, max_new):
    writer = write_answers(
        random_params(spec),
        spec,
        prompts,
        eos_ids=NEVER,
        max_new=max_new,
        batch=16,
        sampling=Sampling(0.0, 1),
        seed=0,
    )
    return {answer.index: answer.tokens for answer in writer}


def test_answers_are_written_only_inside_the_window():
    prompts, windowed = [[5, 6, 7], list(range(12))], dataclasses.replace(TINY, windows=(None, 32))
    expected = _written(TINY, prompts, 20)
    assert _written(windowed, prompts, 20) == expected  # 12 + 20: the window never acts
    message = (
        "sliding window is 32 tokens; a prompt of 12 and an answer of 21 do not fit .* lower "
        "data.max_prompt_tokens"
    )
    with pytest.raises(UserError, match=message):
        _written(windowed, prompts, 21)


def test_planted_bug_window_over_the_ring(monkeypatch):
    """What the refusal is for: without it, longer answers are not those of the decoder."""
    spec = dataclasses.replace(TINY, windows=(7, 7))
    prompts = [[5, 6, 7], list(range(12))]
    right = SpeculativeDecoder(target_of(spec)).generate(prompts, max_new_tokens=20)
    monkeypatch.setattr("beagle_jax.decoding.batch._check_window", lambda *arguments: None)
    found = _written(spec, prompts, 20)
    assert [found[0], found[1]] != [answer.tokens for answer in right]


def test_param_table_names_every_extra():
    spec = dataclasses.replace(TINY, biases=("self_attn.o_proj",), qk_norm=True)
    extra = {
        name: entry for name, entry in param_table(spec).items() if name not in param_table(TINY)
    }
    assert len(extra) == 3 * spec.num_layers
    assert extra["model.layers.1.self_attn.o_proj.bias"] == (("layers", 1, "o_bias_D"), (32,))
    assert extra["model.layers.0.self_attn.q_norm.weight"] == (("layers", 0, "q_norm_H"), (8,))

"""Each target family against transformers' model: logits, states, greedy and drafted tokens."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY
from family_cases import (
    FAMILIES,
    LLAMA3_ROPE,
    each_family,
    family,  # noqa: F401  (the fixture)
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.tree import ROOT_ONLY, chain, static_tree
from beagle_jax.errors import UserError
from beagle_jax.model import experts as experts_module
from beagle_jax.model import target as target_module
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.model.joined import join_layer, separated
from beagle_jax.model.layers import RopeScaling, apply_rope, rms_norm, rope_tables
from beagle_jax.model.masks import causal_mask, within_window
from beagle_jax.model.target import forward, logits
from beagle_jax.model.tensors import param_table
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import fill_params, open_source

PROMPTS = [[5, 17, 60, 3], [8], list(range(40))]


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
    """Planted: leaves one tensor out of the last layer, as if the loader did not know it."""

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
        dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, **changes)),
        params,
    )


def _scaling(**changes):
    return lambda spec, params: (
        dataclasses.replace(spec, rope_scaling=spec.rope_scaling._replace(**changes)),
        params,
    )


def _change(**changes):
    return lambda spec, params: (dataclasses.replace(spec, **changes), params)


def _norms_before(spec, params):
    """Planted: Llama's order of norms, with the weights of the norms after."""

    def move(layer):
        return {
            **layer,
            "input_norm_D": layer["after_attention_norm_D"],
            "mlp_norm_D": layer["after_mlp_norm_D"],
        }

    spec = dataclasses.replace(spec, pre_norms=True, post_norms=False)
    return spec, {**params, "layers": [move(layer) for layer in params["layers"]]}


def _norms_whole(spec, params):
    def widen(layer):
        heads = {"q": spec.num_heads, "k": spec.num_kv_heads}
        return layer | {
            f"{name}_norm_F": jnp.tile(layer[f"{name}_norm_H"], count)
            for name, count in heads.items()
        }

    spec = dataclasses.replace(spec, qk_norm=False, qk_norm_whole=True)
    return spec, {**params, "layers": [widen(layer) for layer in params["layers"]]}


def _whole_heads(spec, params):
    factors = (*spec.rope_scaling.factors, 1.0)
    scaling = spec.rope_scaling._replace(factors=factors)
    return dataclasses.replace(spec, rotary_dim=None, rope_scaling=scaling), params


PLANTS = [
    ("llama 3 rope", "scaling ignored", _change(rope_scaling=None)),
    ("llama 3 rope", "no blend", _scaling(high_freq_factor=1.0 + 1e-6)),
    ("llama 3 rope", "all waves slowed", _scaling(original_positions=None)),
    ("linear rope", "scaling ignored", _change(rope_scaling=None)),
    ("yarn rope", "scaling ignored", _change(rope_scaling=None)),
    ("yarn rope", "scores not scaled", _scaling(scale=1.0)),
    ("olmo 2", "norms before", _norms_before),
    ("olmo 2", "norms left out", _change(qk_norm_whole=False)),
    ("olmo 3", "scaling in every layer", _change(local_rope_theta=None)),
    ("olmo 3", "window in the wrong layer", _change(windows=(None, 5))),
    ("smollm3", "all layers rotated", _change(unrotated=())),
    ("smollm3", "no layer rotated", _change(unrotated=(0, 1))),
    ("exaone 4", "all layers rotated", _change(unrotated=())),
    ("exaone 4", "norms over all heads", _norms_whole),
    ("exaone 4 without window", "full layers not rotated", _change(unrotated=(0, 1))),
    ("phi 3", "no window", _change(windows=())),
    ("phi 4 mini", "whole heads rotated", _whole_heads),
    ("phi 4 mini", "scores not scaled", _scaling(scale=1.0)),
    ("phi 4 mini", "short factors", _scaling(factors=(1.0, 1.0, 1.0))),
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
    ("gemma", "Llama's norms", _change(norm_offset=0.0)),
    ("gemma", "Llama's activation", _change(activation="silu")),
    ("gemma", "embedding not scaled", _change(embed_scale=1.0)),
    ("gemma", "scores scaled as Gemma 2's", _change(score_scale=256**-0.5)),
    ("gemma 2", "scores not capped", _change(score_cap=None)),
    ("gemma 2", "logits not capped", _change(logit_cap=None)),
    ("gemma 2", "windows the other way round", _change(windows=(None, 6))),
    ("gemma 3", "Llama's layers", _change(norm_offset=0.0, post_norms=False, activation="silu")),
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
        _check_states_and_logits(model, *plant(target.spec, separated(target.params)))


@pytest.mark.parametrize("family", ["mixtral", "qwen3 moe"], indirect=True)
@pytest.mark.parametrize("form", ["grouped", "few", "every"])
def test_experts_in_the_forms_of_other_platforms_equal_torch(family, form, monkeypatch):
    """This process has the loop, which the tests above compare."""
    model, target = family
    if form != "grouped":
        monkeypatch.setattr(target_module, "routed", getattr(experts_module, f"_{form}"))

    def arranged(spec, params):
        join = partial(join_layer, spec=spec, turned=form == "grouped")
        return spec, {**params, "layers": [join(layer) for layer in params["layers"]]}

    spec, params = arranged(target.spec, separated(target.params))
    assert ("gate_EDF" in params["layers"][1]) == (form == "grouped")
    _check_states_and_logits(model, spec, params)
    planted = arranged(*_experts_swapped(target.spec, separated(target.params)))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _check_states_and_logits(model, *planted)


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
def test_planted_bug_norm_after_rope(family, monkeypatch):
    """A norm without weight commutes with a rotation, so only its weight shows the order.

    Here the weight is applied late.
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
    """Returns greedy tokens of transformers' generate, each prompt alone."""
    answers = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        with torch.no_grad():  # with the mask given, generate does not take token 0 for padding
            full = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=32
            )
        answers.append(full[0, len(prompt) :].tolist())
    # A token that repeats for ever would equal anything.
    assert len(set(itertools.chain(*answers))) > 7
    return answers


def _decoded(target, tree=ROOT_ONLY):
    """Returns our tokens, with a random draft if the tree needs one."""
    spec = BeagleSpec.from_target(target.spec, init_std=0.3)
    decoder = SpeculativeDecoder(
        target, Draft(spec, init_draft(spec, jax.random.key(1)), None, {}), tree
    )
    return [answer.tokens for answer in decoder.generate(PROMPTS, max_new_tokens=32)]


# What these bring is in the products of a layer, which know of no cache and no tree, or others have
# it too: windows, their pattern, norms after the layer.
LAYERS_ALONE = (
    "gemma",
    "gemma 2",
    "mistral",
    "mixtral",
    "exaone 4",
    "olmo 3",
    "phi 4 mini",
    "qwen2 with a window",
    "llama 3 rope",
    "linear rope",
    "yarn rope",
    "dynamic rope",
    "olmo 2",
    "exaone 4 without window",
    "phi 3",
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
    """The families differ in `forward` alone, which a tree calls with more rows.

    So windows, experts and Gemma's layers represent all families with a tree.
    """
    model, target = family
    assert _decoded(target) == _torch_answers(model)


@pytest.mark.parametrize("far", [pytest.param(-1, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("family", ["mistral"], indirect=True)
def test_planted_bug_in_the_window_over_the_cache(family, far, monkeypatch):
    """New tokens are masked right; slots are cut off one too early or too late."""

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
    _, params = _without("q_bias_F")(target.spec, separated(target.params))
    assert _decoded(dataclasses.replace(target, params=params)) != _torch_answers(model)


# Parts


def test_window_looks_as_drawn():
    mask_BTS = within_window(jnp.array([[4, 1]]), jnp.arange(6)[None], 3)
    assert mask_BTS.astype(int).tolist() == [[[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]]


def _rope_difference(scaling) -> float:
    """Returns the difference from transformers' cosines and sines at the sizes of Llama 3.1."""
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
    tables = rope_tables(jnp.arange(64)[None], 128, 5e5, scaling)
    return max(
        float(np.abs(ours - theirs.numpy()).max())
        for ours, theirs in zip(tables, expected, strict=True)
    )


def test_llama3_rope_equals_torch():
    assert _rope_difference(RopeScaling(8.0, 1.0, 4.0, 8192)) < 1e-5
    # Planted: another end of the blend.
    assert _rope_difference(RopeScaling(8.0, 1.0, 2.0, 8192)) > 1e-3


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


def test_param_table_names_every_extra():
    spec = dataclasses.replace(TINY, biases=("self_attn.o_proj",), qk_norm=True)
    extra = {
        name: entry for name, entry in param_table(spec).items() if name not in param_table(TINY)
    }
    assert len(extra) == 3 * spec.num_layers
    assert extra["model.layers.1.self_attn.o_proj.bias"] == (("layers", 1, "o_bias_D"), (32,))
    assert extra["model.layers.0.self_attn.q_norm.weight"] == (("layers", 0, "q_norm_H"), (8,))

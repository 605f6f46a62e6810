"""The target against transformers' Llama, and its cache against no cache."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY
from torch_targets import random_torch
from transformers import LlamaConfig, LlamaForCausalLM

from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.writer import write_answers
from beagle_jax.model.cache import (
    KVRows,
    append_rows,
    take_rows,
    visible_slots,
    write_all,
    write_rows,
)
from beagle_jax.model.layers import apply_rope, rope_tables
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import TargetSpec, best_tokens, forward, init_cache, logits
from beagle_jax.weights.target import fill_params, open_source

GREEDY = Sampling(temperature=0.0, top_k=1)
NEVER = (10_000,)  # a stop token that is not in the vocabulary


@partial(jax.jit, static_argnums=1)
def _states(params, spec, tokens_BT, length_B, mask_BTT=None):
    """Returns states and cache rows of right-padded tokens, without a cache."""
    B, T = tokens_BT.shape
    mask_BTT = causal_mask(length_B, T) if mask_BTT is None else mask_BTT
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    states_BTD, rows = forward(params, spec, tokens_BT, positions_BT, mask_BTT)
    return states_BTD, rows


@partial(jax.jit, static_argnums=1)
def _over_cache(params, spec, tokens_BT, positions_BT, mask_BTT, cache, length_B):
    visible_BS = visible_slots(length_B, cache)
    states_BTD, rows = forward(params, spec, tokens_BT, positions_BT, mask_BTT, cache, visible_BS)
    return states_BTD, rows


def _pad(prompts, width=None):
    """Returns right-padded tokens [B, T] and lengths [B]."""
    lengths = [len(prompt) for prompt in prompts]
    tokens = np.zeros((len(prompts), width or max(lengths)), np.int32)
    for line, prompt in enumerate(prompts):
        tokens[line, : len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)


def _answers(
    params,
    spec,
    prompts,
    *,
    eos_ids=NEVER,
    max_new,
    batch,
    sampling=GREEDY,
    on_tokens=lambda count: None,
    seed=0,
    parts=None,
):
    """Returns the tokens of `write_answers` in the order of the prompts."""
    tokens_of = {
        answer.index: answer.tokens
        for answer in write_answers(
            params,
            spec,
            prompts,
            eos_ids=eos_ids,
            max_new=max_new,
            batch=batch,
            sampling=sampling,
            seed=seed,
            on_tokens=on_tokens,
            parts=parts,
        )
    }
    assert sorted(tokens_of) == list(range(len(prompts)))
    return [tokens_of[index] for index in range(len(prompts))]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tiny_llama(request, tmp_path_factory):
    """A random Llama of transformers, and the same weights read from the folder it wrote."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-3,
        tie_word_embeddings=request.param,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        max_position_embeddings=128,
    )
    model = random_torch(LlamaForCausalLM, config)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    opened = open_source(str(folder), folder)
    spec = TargetSpec.from_hf_config(opened.config(), str(folder))
    return model, spec, fill_params(spec, opened, jnp.dtype("float32"), str(folder))


def _check_torch_logits(model, spec, params):
    tokens_BT = np.random.default_rng(1).integers(0, spec.vocab_size, (3, 24))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens_BT)).logits.numpy()
    states_BTD, _ = _states(params, spec, jnp.asarray(tokens_BT), jnp.full(3, 24))
    assert expected.std() > 1  # a flat output would equal anything
    np.testing.assert_allclose(logits(params, spec, states_BTD), expected, atol=1e-4, rtol=0)


def _check_torch_greedy(model, spec, params):
    prompts, expected = [[5, 17, 60, 3], [8], list(range(40))], []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():  # with the mask given, generate does not take token 0 for padding
            full = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=32
            )
        expected.append(full[0, len(prompt) :].tolist())
    assert _answers(params, spec, prompts, max_new=32, batch=3) == expected


def _with_layer(params, index, **changes):
    layers = list(params["layers"])
    layers[index] = {**layers[index], **changes}
    return {**params, "layers": layers}


def _interleaved(spec, params, layer=0):
    """Planted: one layer's query rows are left in llama.cpp's order."""
    q_FD = params["layers"][layer]["q_FD"]
    rows = (
        q_FD.reshape(spec.num_heads, 2, spec.head_dim // 2, -1).swapaxes(1, 2).reshape(q_FD.shape)
    )
    return spec, _with_layer(params, layer, q_FD=rows)


PLANTS = {
    "rope base ignored": lambda spec, params: (
        dataclasses.replace(spec, rope_theta=10_000.0),
        params,
    ),
    "eps ignored": lambda spec, params: (dataclasses.replace(spec, rms_norm_eps=1e-6), params),
    "norm weight ignored": lambda spec, params: (
        spec,
        _with_layer(params, 1, input_norm_D=jnp.ones(spec.hidden_size)),
    ),
    "kv heads swapped": lambda spec, params: (
        spec,
        _with_layer(params, 2, k_FD=jnp.roll(params["layers"][2]["k_FD"], spec.head_dim, axis=0)),
    ),
    "interleaved queries": _interleaved,
}


def test_logits_equal_torch(tiny_llama):
    _check_torch_logits(*tiny_llama)


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_in_logits(tiny_llama, plant):
    model, spec, params = tiny_llama
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _check_torch_logits(model, *PLANTS[plant](spec, params))


def test_greedy_tokens_equal_torch(tiny_llama):
    _check_torch_greedy(*tiny_llama)


def test_planted_bug_in_greedy_tokens(tiny_llama):
    model, spec, params = tiny_llama
    with pytest.raises(AssertionError):
        _check_torch_greedy(model, *_interleaved(spec, params))


def test_best_tokens_are_the_argmax_of_logits(tiny_llama):
    _, spec, params = tiny_llama
    states_BTD = jax.random.normal(jax.random.key(0), (3, 5, spec.hidden_size))
    expected = np.argmax(logits(params, spec, states_BTD), axis=-1)
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(best_tokens(params, states_BTD)[0], expected)


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of different lengths, and the four tokens that follow each."""
    rng = np.random.default_rng(3)
    return [
        rng.integers(0, TINY.vocab_size, length).tolist() for length in (7, 1, 10)
    ], rng.integers(0, 61, (3, 4))


def _alone(params, tokens):
    """Returns states [T, D] and cache rows of one sequence without padding or cache."""
    states_1TD, rows = _states(params, TINY, *_pad([tokens]))
    return states_1TD[0], rows


def _decoded(
    params, prompts, next_BT, shift=0, turn=lambda rows, T: rows, cached=lambda length_B: length_B
):
    """Returns states [B, T, D] of `next_BT` over a cache that a padded prefill filled.

    The other arguments plant bugs.
    """
    tokens_BT, length_B = _pad(prompts)
    _, rows = _states(params, TINY, tokens_BT, length_B)
    rows = [turn(layer, tokens_BT.shape[1]) for layer in rows]
    cache = write_all(init_cache(TINY, 3, 20, jnp.float32), rows, jnp.zeros(3, jnp.int32))
    T = next_BT.shape[1]
    positions_BT = length_B[:, None] + jnp.arange(T)[None] + shift
    mask_BTT = causal_mask(jnp.full(3, T), T)
    return _over_cache(
        params, TINY, jnp.asarray(next_BT), positions_BT, mask_BTT, cache, cached(length_B)
    )[0]


def _check_decoded(params, prompts, found_BTD):
    starts, next_BT = prompts
    for line, (start, new) in enumerate(zip(starts, next_BT, strict=True)):
        expected_TD, _ = _alone(params, [*start, *new])
        np.testing.assert_allclose(found_BTD[line], expected_TD[len(start) :], atol=1e-4)


def _turn_back(rows, T):
    """Planted: the rotation of cached keys is undone."""
    cos, sin = rope_tables(jnp.arange(T)[None, None], TINY.head_dim, TINY.rope_theta)
    return rows._replace(k_BKHS=apply_rope(rows.k_BKHS.swapaxes(2, 3), cos, -sin).swapaxes(2, 3))


CACHE_PLANTS = {
    "position one late": {"shift": 1},
    "keys not rotated": {"turn": _turn_back},
    "padding visible": {"cached": lambda length_B: jnp.full_like(length_B, 10)},
    "last slot hidden": {"cached": lambda length_B: length_B - 1},
}


def test_cached_tokens_equal_uncached(tiny_params, prompts):
    _check_decoded(tiny_params, prompts, _decoded(tiny_params, *prompts))


@pytest.mark.parametrize("plant", CACHE_PLANTS)
def test_planted_bug_in_cached_tokens(tiny_params, prompts, plant):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _check_decoded(tiny_params, prompts, _decoded(tiny_params, *prompts, **CACHE_PLANTS[plant]))


def test_one_token_at_a_time_equals_uncached(tiny_params, prompts):
    starts, next_BT = prompts
    tokens_BT, length_B = _pad(starts)
    _, rows = _states(tiny_params, TINY, tokens_BT, length_B)
    cache, states = (
        write_all(init_cache(TINY, 3, 20, jnp.float32), rows, jnp.zeros(3, jnp.int32)),
        [],
    )
    for column in range(next_BT.shape[1]):
        tokens_B1, mask_B11 = (
            jnp.asarray(next_BT[:, column : column + 1]),
            jnp.ones((3, 1, 1), bool),
        )
        states_B1D, rows = _over_cache(
            tiny_params, TINY, tokens_B1, length_B[:, None], mask_B11, cache, length_B
        )
        cache, length_B = write_all(cache, rows, length_B), length_B + 1
        states.append(states_B1D)
    _check_decoded(tiny_params, prompts, jnp.concatenate(states, axis=1))


def _check_padded(params, starts, mask_BTT=None):
    states_BTD, rows = _states(params, TINY, *_pad(starts), mask_BTT)
    for line, start in enumerate(starts):
        expected_TD, expected_rows = _alone(params, start)
        np.testing.assert_allclose(states_BTD[line, : len(start)], expected_TD, atol=1e-4)
        for layer, expected in zip(rows, expected_rows, strict=True):
            np.testing.assert_allclose(
                layer.k_BKHS[line, ..., : len(start)], expected.k_BKHS[0], atol=1e-4
            )
            np.testing.assert_allclose(
                layer.v_BKSH[line, :, : len(start)], expected.v_BKSH[0], atol=1e-4
            )


def test_padded_prefill_equals_each_row_alone(tiny_params, prompts):
    _check_padded(tiny_params, prompts[0])


def test_planted_bug_prefill_sees_padding(tiny_params, prompts):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _check_padded(tiny_params, prompts[0], jnp.ones((3, 10, 10), bool))


def _random_rows(batch, slots, seed) -> KVRows:
    rng = np.random.default_rng(seed)
    key_value = rng.standard_normal((2, batch, 2, 4, slots)).astype(np.float32)
    return KVRows(jnp.asarray(key_value[0]), jnp.asarray(key_value[1].swapaxes(2, 3)))


def _same_rows(actual: KVRows, expected: KVRows):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("batch", [1, 8, 9])  # the slice per sequence ends at 8
def test_write_rows_equals_numpy(batch):
    cache, new = _random_rows(batch, 12, 0), _random_rows(batch, 3, 1)
    start_B = np.arange(batch) % 10  # the last is the highest slot with room
    k_BKHS, v_BKSH = np.array(cache.k_BKHS), np.array(cache.v_BKSH)
    for row, start in enumerate(start_B):
        k_BKHS[row, ..., start : start + 3], v_BKSH[row, :, start : start + 3] = (
            new.k_BKHS[row],
            new.v_BKSH[row],
        )
    _same_rows(write_rows(cache, new, jnp.asarray(start_B)), KVRows(k_BKHS, v_BKSH))


def _first_eight(rows: KVRows) -> KVRows:
    return jax.tree.map(lambda array: array[:8], rows)


def _check_both_paths(start_of_eight_B):
    cache, new, start_B = (
        _random_rows(9, 12, 0),
        _random_rows(9, 3, 1),
        jnp.array([0, 9, 3, 3, 7, 1, 2, 8, 5]),
    )
    mapped = write_rows(cache, new, start_B)
    unrolled = write_rows(_first_eight(cache), _first_eight(new), start_of_eight_B(start_B[:8]))
    _same_rows(unrolled, _first_eight(mapped))


def test_unrolled_write_equals_mapped_write():
    _check_both_paths(lambda start_B: start_B)


def test_planted_bug_in_unrolled_write():
    with pytest.raises(AssertionError, match="not equal"):
        _check_both_paths(lambda start_B: start_B.at[7].add(-1))


TAKEN_BT = np.array([[5, 0, 0, 2], [1, 2, 3, 4], [4, 4, 1, 0]])


def _check_taken(asked_BT):
    rows = _random_rows(3, 6, 0)
    taken = take_rows(rows, jnp.asarray(asked_BT))
    for (row, column), slot in np.ndenumerate(TAKEN_BT):
        np.testing.assert_array_equal(taken.k_BKHS[row, ..., column], rows.k_BKHS[row, ..., slot])
        np.testing.assert_array_equal(taken.v_BKSH[row, :, column], rows.v_BKSH[row, :, slot])


def test_take_rows_by_index():
    _check_taken(TAKEN_BT)


def test_planted_bug_rows_of_another_sequence():
    with pytest.raises(AssertionError, match="not equal"):
        _check_taken(TAKEN_BT[::-1])


def test_appended_rows_are_both_in_order():
    rows, more = _random_rows(2, 3, 0), _random_rows(2, 2, 1)
    both = append_rows(append_rows(None, rows), more)
    _same_rows(take_rows(both, jnp.tile(jnp.arange(3), (2, 1))), rows)
    _same_rows(take_rows(both, jnp.tile(jnp.arange(3, 5), (2, 1))), more)

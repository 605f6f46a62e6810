"""Targets in float16, for GPUs without bfloat16: nothing overflows that need not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_audit
from command_cases import ended, trained, workplace  # noqa: F401 (fixtures)
from conftest import TINY, random_params
from decode_cases import naive_greedy, random_draft, target_of

from beagle_jax import evaluate, generate
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.tree import chain, dynamic_tree
from beagle_jax.errors import UserError, run_main
from beagle_jax.evaluation import audit as audit_module
from beagle_jax.model.attention import merge_attention, partial_attention
from beagle_jax.model.layers import rms_norm
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward, logits
from beagle_jax.weights import target as target_module
from beagle_jax.weights.target import load_target

_forward, _logits = (jax.jit(function, static_argnums=1) for function in (forward, logits))


def _in(dtype, params):
    """The parameters in another dtype; numpy casts without a program for each shape."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(dtype)), params)


def test_logits_are_nearer_to_float32_than_bfloat16_s():
    tokens_BT = jnp.arange(24)[None] % TINY.vocab_size

    def read(dtype):
        params = _in(dtype, random_params(TINY, 0))
        mask = causal_mask(jnp.array([24]), 24)
        outputs = _forward(params, TINY, tokens_BT, jnp.arange(24)[None], mask)
        assert outputs.states_BTD.dtype == dtype
        return np.asarray(_logits(params, TINY, outputs.states_BTD))

    exact, half, brain = (read(dtype) for dtype in (jnp.float32, jnp.float16, jnp.bfloat16))
    assert exact.dtype == half.dtype == np.float32
    error, brain_error = np.abs(half - exact).max(), np.abs(brain - exact).max()
    assert 0 < error < brain_error / 3  # three bits more


@pytest.mark.parametrize("tree", [chain(2), dynamic_tree(2, 2, 5)], ids=["chain", "dynamic"])
def test_it_decodes_as_it_reads(tree):
    target = target_of()
    target = dataclasses.replace(target, params=_in(jnp.float16, target.params))
    prompts = [[5], [7, 8, 9]]
    plain = SpeculativeDecoder(target, context=128).generate(prompts, max_new_tokens=24)
    fast = SpeculativeDecoder(target, random_draft(), tree, context=128)
    answers = fast.generate(prompts, max_new_tokens=24)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in plain]
    assert plain[0].tokens == naive_greedy(target, [5], 24)


@pytest.mark.slow
def test_the_audit_holds_it_as_bfloat16(monkeypatch):
    monkeypatch.setattr(audit_module, "_draws", test_audit.no_draws)
    target = target_of()
    target = dataclasses.replace(target, params=_in(jnp.float16, target.params))
    drafts = {"chain": random_draft()}
    made = test_audit.audited(target, drafts, test_audit.TREES, max_new_tokens=40)
    assert made["passed"] and 1e-4 < made["noise"] < 0.1


def _attended(value: float) -> jax.Array:
    """What a query sees that weighs 4,096 equal values alike."""
    q_BKGTH, k_BKHS = jnp.zeros((1, 1, 1, 1, 8), jnp.float16), jnp.zeros((1, 1, 8, 4096))
    v_BKSH = jnp.full((1, 1, 4096, 8), value, jnp.float16)
    mask = jnp.ones((1, 1, 1, 1, 4096), bool)
    return merge_attention(partial_attention(q_BKGTH, k_BKHS.astype(jnp.float16), v_BKSH, mask))


def test_attention_over_many_keys_does_not_overflow():
    """Neither all at once nor in blocks of them."""
    np.testing.assert_allclose(_attended(400.0), 400.0, rtol=1e-3)


def test_planted_bug_values_are_summed_in_float16(monkeypatch):
    einsum = jnp.einsum
    monkeypatch.setattr(jnp, "einsum", lambda *a, preferred_element_type=None, **k: einsum(*a, **k))
    assert not np.isfinite(_attended(400.0)).any()


def test_masks_and_norms_are_safe():
    q_BKGTH, keys = jnp.ones((1, 1, 1, 2, 8), jnp.float16), jnp.ones((1, 1, 8, 4), jnp.float16)
    mask = jnp.array([[True, False, False, False], [False] * 4])[None, None, None]
    out = merge_attention(
        partial_attention(q_BKGTH, keys, jnp.ones((1, 1, 4, 8), jnp.float16), mask)
    )
    np.testing.assert_array_equal(out[0, 0, 0], [[1.0] * 8, [0.0] * 8])
    large = rms_norm(jnp.full(32, 3e4, jnp.float16), jnp.ones(32, jnp.float16), 1e-6)
    np.testing.assert_array_equal(large, 1)


def test_weights_that_float16_cannot_hold_are_refused(trained, monkeypatch):
    folder = str(trained.folder / "target")
    assert load_target(folder, "float16", "unused").dtype == jnp.float16
    fill = target_module.fill_params

    def with_a_large_one(*arguments):
        params = fill(*arguments)
        return {**params, "norm_D": params["norm_D"].at[3].set(1e5)}

    monkeypatch.setattr(target_module, "fill_params", with_a_large_one)
    load_target(folder, "bfloat16", "unused")
    with pytest.raises(UserError, match=r"\['norm_D'\].*cannot hold.*65504.*bfloat16"):
        load_target(folder, "float16", "unused")


@pytest.mark.slow
def test_the_commands_take_it(trained, capsys):
    argv = ["--config", trained.config]
    assert run_main(generate.main, [*argv, "Hello", "target.dtype=float16"]) == 0
    assert "token sequences equal: yes" in capsys.readouterr().out
    options = ["target.dtype=float16", "eval.limit=2", "--audit"]
    assert run_main(evaluate.main, [*argv, *options]) == 0
    assert "FAILED" not in capsys.readouterr().out
    status, message = ended(capsys, "generate", *argv, "Hello", "target.dtype=half")
    assert status == 2 and "float16" in message

"""The draft block against method.md section 2 written out in numpy."""

import dataclasses
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE

from beagle_jax.config import EarlyStage, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.decoding.draft import grow
from beagle_jax.decoding.drafter import Known
from beagle_jax.decoding.trained import BeagleDrafter, DraftHead
from beagle_jax.decoding.tree import chain
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec, init_draft
from beagle_jax.model.cache import empty_rows
from beagle_jax.model.masks import early_block_mask
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.kinds import OBJECTIVES
from beagle_jax.training.step import stage_loss

LLAMA_2_7B = BeagleSpec(
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
)
LLAMA_3_8B = BeagleSpec(
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=5e5,
    rms_norm_eps=1e-5,
)


@pytest.mark.parametrize(("spec", "count"), [(LLAMA_2_7B, 202_383_360), (LLAMA_3_8B, 218_112_000)])
def test_parameter_count(spec, count):
    shapes = jax.eval_shape(lambda: init_draft(spec, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert {name: leaf.shape for name, leaf in shapes.items()} == spec.param_shapes()


def test_initial_weights(tiny_draft_spec):
    params = init_draft(tiny_draft_spec, jax.random.key(0))
    for name, array in params.items():
        if name.endswith("layernorm"):
            np.testing.assert_array_equal(array, 1.0)
        else:
            assert abs(float(array.std()) / tiny_draft_spec.init_std - 1) < 0.1


def _numpy_block(params, spec, e_LD, h_LD, mask_LL) -> np.ndarray:
    """Computes method.md 2.1 for one row in float64."""
    w = {name: np.asarray(array, np.float64) for name, array in params.items()}

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.rms_norm_eps) * weight

    H, G = spec.head_dim, spec.num_heads // spec.num_kv_heads

    def rotate(x, position):
        angle = position / spec.rope_theta ** (np.arange(H // 2) / (H // 2))
        a, b = x[: H // 2], x[H // 2 :]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
        )

    u, out = norm(e_LD, w["input_layernorm"]), np.zeros((len(e_LD), spec.num_heads * H))
    for i in range(len(e_LD)):
        for n in range(spec.num_heads):
            g = n // G
            q = rotate(w["q_proj"][n * H : (n + 1) * H] @ u[i], i)
            keys = [j for j in range(len(h_LD)) if mask_LL[i, j]]
            if not keys:
                continue
            score = np.array(
                [q @ rotate(w["k_proj"][g * H : (g + 1) * H] @ h_LD[j], j) for j in keys]
            ) / np.sqrt(H)
            share = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
            out[i, n * H : (n + 1) * H] = share @ np.array(
                [w["v_proj"][g * H : (g + 1) * H] @ h_LD[j] for j in keys]
            )
    y = e_LD + out @ w["o_proj"].T
    v = norm(y, w["post_attention_layernorm"])
    gate = v @ w["gate_proj"].T
    return y + (gate / (1 + np.exp(-gate)) * (v @ w["up_proj"].T)) @ w["down_proj"].T


@pytest.fixture(scope="module")
def block_case(tiny_draft_spec, tiny_draft):
    rng = np.random.default_rng(0)
    params = {
        name: array * 0.5 if array.ndim == 2 else array + 0.1 * jnp.arange(array.size) / array.size
        for name, array in tiny_draft.items()
    }
    e_LD, h_LD = (rng.standard_normal((9, tiny_draft_spec.hidden_size)) for _ in range(2))
    mask_LL = np.asarray(early_block_mask(jnp.array([[9]]), 9, 3, jnp.int32(1))[0])
    run = jax.jit(
        lambda p: BeagleBlock(tiny_draft_spec).apply(
            {"params": p}, jnp.float32(e_LD)[None], jnp.float32(h_LD)[None], mask_LL[None]
        )[0]
    )
    return params, run, _numpy_block(params, tiny_draft_spec, e_LD, h_LD, mask_LL)


def test_equals_the_equations(block_case):
    params, run, expected = block_case
    np.testing.assert_allclose(run(params), expected, atol=1e-4)


def test_planted_bug_norms_swapped(block_case):
    params, run, expected = block_case
    swapped = {**params, "input_layernorm": params["post_attention_layernorm"] * 2}
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(run(swapped), expected, atol=1e-4)


def test_row_that_sees_nothing_is_embedding_plus_mlp(block_case, tiny_draft_spec):
    params, run, _ = block_case
    without = {**params, "v_proj": jnp.zeros_like(params["v_proj"])}
    np.testing.assert_allclose(run(params)[0], run(without)[0], atol=1e-6)
    assert float(jnp.abs(run(params)[5] - run(without)[5]).max()) > 1e-2


@partial(jax.jit, static_argnums=1)
def _drafted(params, spec, embed_VD, times=1.0):
    """Returns the predicted states of a chain after one token."""
    cache, length_B = (
        empty_rows(1, spec.num_kv_heads, 4, spec.head_dim, jnp.float32),
        jnp.zeros(1, jnp.int32),
    )
    drafter = BeagleDrafter(spec, params, times * embed_VD, DraftHead(embed_VD, None))
    return grow(drafter, cache, Known(jnp.array([5]), length_B), chain(2)).state_BQD


@partial(jax.jit, static_argnums=1)
def _trained_on(params, spec, embed_VD, times=1.0):
    """Returns the loss of one row."""
    states_BLD = np.random.default_rng(1).standard_normal((1, 6, spec.hidden_size), np.float32)
    ones_11 = np.ones((1, 1), np.int32)
    batch = jax.tree.map(
        jnp.asarray,
        Batch(
            np.arange(6, dtype=np.int32)[None],
            states_BLD,
            np.ones((1, 4), bool),
            6 * ones_11,
            ones_11,
        ),
    )
    config, frozen = (
        TrainConfig(noise="none"),
        FrozenTarget(times * embed_VD, 0.1 * embed_VD),
    )
    return stage_loss(
        params,
        spec,
        config,
        EarlyStage(steps=1),
        OBJECTIVES["beagle"]["early"],
        frozen,
        batch,
        jax.random.key(0),
        ONE_DEVICE,
    )[0]


@pytest.mark.parametrize("run", [_drafted, _trained_on], ids=["drafted", "trained on"])
def test_draft_reads_the_embedding_as_the_target_scales_it(tiny_draft, tiny_draft_spec, run):
    embed_VD = jax.random.normal(jax.random.key(4), (61, tiny_draft_spec.hidden_size))
    scaled = run(tiny_draft, dataclasses.replace(tiny_draft_spec, embed_scale=3.0), embed_VD)
    np.testing.assert_allclose(scaled, run(tiny_draft, tiny_draft_spec, embed_VD, 3.0), atol=1e-4)
    assert float(jnp.abs(scaled - run(tiny_draft, tiny_draft_spec, embed_VD)).max()) > 1e-2


def test_flax_nnx_is_never_imported():
    code = (
        "import sys, beagle_jax.commands.train, beagle_jax.commands.evaluate, "
        "beagle_jax.commands.generate; sys.exit('flax.nnx' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

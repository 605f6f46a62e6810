"""EAGLE's two stages against torch, token-by-token drafting, and what Beagle's stages score."""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from benchmark_cases import benchmark
from conftest import ONE_DEVICE, TINY
from step_cases import CLEAN, NOISY, B, D, L, three_rows

from beagle_jax.config import EarlyStage, StageConfig, TestTimeStage, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.eagle import EagleBlock, EagleSpec
from beagle_jax.model.kinds import fresh_params, spec_type
from beagle_jax.model.masks import causal_mask
from beagle_jax.training import eagle
from beagle_jax.training.eagle import TEST_TIME, eagle_states
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.kinds import OBJECTIVES
from beagle_jax.training.step import (
    make_steps,
    stage_loss,
)

# Moderate weights: float32 error of two summation orders then stays well below the tolerances.
SPEC = replace(EagleSpec.from_target(TINY, init_std=0.15), fc_bias=False)
EARLY = EarlyStage(steps=10, learning_rate=1e-3, warmup=0, window=1)
LATE = TestTimeStage(steps=10, learning_rate=1e-3, warmup=0, simulation_steps=3)


@pytest.fixture(scope="module")
def params() -> dict:
    return fresh_params(SPEC, jax.random.key(1))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """In the first row the answer starts at position 0."""
    return three_rows(0, 3, 3)


@pytest.fixture(scope="module")
def frozen(tiny_params) -> FrozenTarget:
    return FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"][:7])


@lru_cache
def gradient_of(
    config: TrainConfig, stage: StageConfig, spec: BeagleSpec = SPEC, objective=TEST_TIME
):
    """Returns a jitted function (params, frozen, batch, key) -> ((loss, metrics), gradient)."""

    def loss(params, *rest):
        return stage_loss(params, spec, config, stage, objective, *rest, ONE_DEVICE)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_kinds():
    assert (spec_type("beagle"), spec_type("eagle")) == (BeagleSpec, EagleSpec)
    beagle = BeagleSpec.from_target(TINY)
    assert (
        fresh_params(beagle, jax.random.key(0)).keys()
        == beagle.param_shapes().keys()
        != SPEC.param_shapes().keys()
    )


# Against torch

IN_TORCH = {
    "fc": "fc",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "post_attention_layernorm": "norm",
}


def by_torch(params: dict, frozen: FrozenTarget, batch: Batch, steps: int) -> tuple[float, dict]:
    """Returns loss and gradient of benchmarks/torch_eagle.py.

    Every step has weight 1, and gradients flow through predicted states.
    """
    bench = benchmark("torch_eagle")
    block = bench.EagleBlock(
        D,
        SPEC.intermediate_size,
        SPEC.num_heads,
        SPEC.num_kv_heads,
        SPEC.head_dim,
        SPEC.rope_theta,
        SPEC.rms_norm_eps,
    )
    with torch.no_grad():
        for name, its in IN_TORCH.items():
            getattr(block, its).weight.copy_(torch.tensor(np.asarray(params[name])))
    table_VD = np.asarray(frozen.embed_VD)
    inputs = [
        torch.tensor(np.asarray(x))
        for x in (table_VD[batch.tokens_BL], batch.inputs_BLI, batch.counted_BT, frozen.head_VD)
    ]
    loss = bench.eagle_loss(block, *inputs, steps)
    loss.backward()
    return float(loss.detach()), {
        name: getattr(block, its).weight.grad.numpy() for name, its in IN_TORCH.items()
    }


def same_as_torch(params, frozen, batch, theirs: Batch, steps: int, **changes) -> None:
    stage = (
        EARLY
        if steps == 1
        else LATE.changed(
            simulation_steps=steps, step_weights=(1.0,) * steps, detach=False, **changes
        )
    )
    (loss, _), gradient = gradient_of(CLEAN, stage)(params, frozen, batch, jax.random.key(0))
    expected, expected_gradient = by_torch(params, frozen, theirs, steps)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name, value in expected_gradient.items():
        np.testing.assert_allclose(
            gradient[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name
        )


@pytest.mark.parametrize("steps", [1, 3])
def test_loss_and_gradient_are_those_of_torch(params, frozen, batch, steps):
    same_as_torch(params, frozen, batch, batch, steps)


@pytest.mark.parametrize("field", ["tokens_BL", "inputs_BLI", "counted_BT"])
def test_planted_bug_anything_shifted(params, frozen, batch, field):
    shifted = batch._replace(**{field: np.roll(getattr(batch, field), 1, axis=1)})
    with pytest.raises(AssertionError):
        same_as_torch(params, frozen, batch, shifted, 1)


@pytest.mark.parametrize(
    "bug", ["detached", "weighted", "own keys forgotten", "own keys in one place"]
)
def test_planted_bugs_of_the_late_stage(params, frozen, batch, bug, monkeypatch):
    changes = {"detached": {"detach": True}, "weighted": {"step_weights": (3.0, 2.0, 1.0)}}.get(
        bug, {}
    )
    if bug == "own keys forgotten":
        right = eagle._own_key
        monkeypatch.setattr(
            eagle,
            "_own_key",
            lambda q, rows: right(q, rows)._replace(
                total_BKGT=jnp.zeros(q.shape[:4]), out_BKGTH=0 * q
            ),
        )
    elif bug == "own keys in one place":
        right = EagleBlock.keys_values
        monkeypatch.setattr(
            EagleBlock,
            "keys_values",
            lambda self, f, at: right(self, f, at if f.shape[1] == L - 1 else at * 0),
        )
    stage = LATE.changed(**{"step_weights": (1.0,) * 3, "detach": False} | changes)
    # No other test may get this program from the cache.
    (_, _), gradient = gradient_of.__wrapped__(CLEAN, stage)(
        params, frozen, batch, jax.random.key(0)
    )
    _, expected = by_torch(params, frozen, batch, 3)

    def compare():
        for name, value in expected.items():
            np.testing.assert_allclose(
                gradient[name], value, rtol=0, atol=1e-5 * np.abs(value).max()
            )

    with pytest.raises(AssertionError):
        compare()


# Against drafting

FIRST, ASKED = np.array([4, 2, 1]), 6  # of each row six positions, from there on


@jax.jit
def _row(params, e_LD, h_LD):
    return EagleBlock(SPEC).apply(
        {"params": params},
        e_LD[None],
        h_LD[None],
        causal_mask(jnp.array([L - 1]), L - 1),
        method="row",
    )[0]


_simulated = jax.jit(eagle_states, static_argnames=("spec", "count", "steps", "detach"))


def drafted(params, e_BLD, h_BLD, bug: str = "") -> np.ndarray:
    """Returns states [B, T, J, D] by drafting alone.

    Each step reads the row again, with the states drafted so far in place of true ones.
    """
    states_BQJD = np.zeros((B, ASKED, LATE.simulation_steps, D), np.float32)
    for line, (e_LD, h_LD) in enumerate(zip(e_BLD, h_BLD, strict=True)):
        for query in range(ASKED):
            known, at = np.array(h_LD), FIRST[line] + query
            for step in range(min(LATE.simulation_steps, L - at)):
                states_BQJD[line, query, step] = _row(params, e_LD, known)[at + step - 1]
                if bug != "true states":
                    known[at + step - (bug == "one early")] = states_BQJD[line, query, step]
    return states_BQJD


def simulated(params, e_BLD, h_BLD, first_B=FIRST, detach: bool = True) -> jax.Array:
    settings = dict(count=ASKED, steps=LATE.simulation_steps, detach=detach)
    return _simulated(
        params,
        SPEC,
        e_BLD,
        h_BLD,
        jnp.full((B, 1), L),
        jnp.asarray(first_B, jnp.int32)[:, None],
        **settings,
    )


@pytest.fixture(scope="module")
def row() -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.random.default_rng(3).standard_normal((2, B, L, D)).astype(np.float32))


def same_where_it_means_something(actual, expected) -> None:
    for line in range(B):
        for query in range(ASKED):
            steps = L - FIRST[line] - query
            np.testing.assert_allclose(
                actual[line, query, :steps], expected[line, query, :steps], atol=1e-5
            )


def test_simulated_drafting_is_drafting(params, row):
    same_where_it_means_something(simulated(params, *row), drafted(params, *row))


@pytest.mark.parametrize("bug", ["true states", "one early"])
def test_planted_bug_other_states_read(params, row, bug):
    with pytest.raises(AssertionError):
        same_where_it_means_something(simulated(params, *row), drafted(params, *row, bug))


def test_planted_bug_one_start_for_all_rows(params, row):
    with pytest.raises(AssertionError):
        same_where_it_means_something(
            simulated(params, *row, first_B=FIRST[::-1].copy()), drafted(params, *row)
        )


def test_detach_changes_gradients_only(params, row):
    def score(p, detach):
        return jnp.sum(jnp.sin(simulated(p, *row, detach=detach)))

    attached, detached = (jax.value_and_grad(score)(params, detach) for detach in (False, True))
    np.testing.assert_allclose(attached[0], detached[0], rtol=1e-5)
    assert float(jnp.abs(attached[1]["fc"] - detached[1]["fc"]).max()) > 1e-3


# What is scored


def test_the_positions_that_beagle_scores(params, tiny_draft, frozen, batch):
    """Early in windows of one, late from every position: equal counts by step except position 0."""
    beagle = BeagleSpec.from_target(TINY)
    for stage, name in ((EARLY, "early"), (LATE, "test_time")):
        (_, ours), _ = gradient_of(CLEAN, stage)(params, frozen, batch, jax.random.key(0))
        (_, theirs), _ = gradient_of(CLEAN, stage, beagle, OBJECTIVES["beagle"][name])(
            tiny_draft, frozen, batch, jax.random.key(0)
        )
        assert ours.supervised == theirs.supervised == batch.counted_BT.sum()
        # Row 0 has an answer from position 0 on: one prediction less at the first step, and one
        # draft less of each length.
        assert (theirs.count_J - ours.count_J).tolist() == [1.0] * len(ours.count_J)
        assert ours.count_J.tolist() == [
            batch.counted_BT[:, step + 1 :].sum() for step in range(stage.simulation_steps)
        ]


def test_noise_reaches_the_inputs_only(params, frozen, batch):
    """With a zero state half in the fusion nothing reads the states.

    Noise then changes nothing, so the targets are clean.
    """
    drafts = {"whole": params, "deaf": params | {"fc": params["fc"].at[:, D:].set(0)}}
    loss = {
        (config.noise, name): float(
            gradient_of(config, EARLY)(draft, frozen, batch, jax.random.key(1))[0][0]
        )
        for config in (NOISY, CLEAN)
        for name, draft in drafts.items()
    }
    assert loss["none", "deaf"] == loss["uniform", "deaf"]
    assert abs(loss["none", "whole"] - loss["uniform", "whole"]) > 1e-3


@pytest.mark.parametrize("stage", [EARLY, LATE], ids=["early", "late"])
def test_the_step_trains_every_parameter(frozen, batch, stage):
    spec = replace(SPEC, fc_bias=True)
    first = fresh_params(spec, jax.random.key(1))
    step, evaluate, init = make_steps(spec, CLEAN, stage, ONE_DEVICE)
    state, before = init(first), evaluate(first, frozen, batch)
    for _ in range(8):
        state, metrics = step(state, frozen, batch, 42)
    assert all(not np.array_equal(state.params[name], first[name]) for name in first)
    assert metrics.objective < before.objective and metrics.agree_JK.shape == (
        stage.simulation_steps,
        3,
    )

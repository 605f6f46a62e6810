"""EAGLE-3's training-time test against plain torch: states, loss and gradients (method.md 14)."""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ONE_DEVICE, TINY
from eagle3_cases import HOT, PLAIN, SPECS, D, V, random_params
from eagle3_oracle import loss as torch_loss
from eagle3_oracle import simulated, weights
from step_cases import CLEAN, B, L, three_rows

from beagle_jax.config import TestTimeStage
from beagle_jax.data.loader import Batch
from beagle_jax.data.target_forward import states_in_memory
from beagle_jax.model.eagle3 import Eagle3Spec
from beagle_jax.model.kinds import fresh_params
from beagle_jax.training.eagle import eagle_states
from beagle_jax.training.eagle3 import TEST_TIME
from beagle_jax.training.frozen import FrozenTarget, Vocabulary
from beagle_jax.training.step import make_steps, stage_loss

# The defaults that a config gives the stages of an EAGLE-3 draft (tests/test_eagle3_command.py).
STAGE = TestTimeStage(steps=10, learning_rate=1e-3, warmup=0, step_decay=0.8, detach=False)
RNG = np.random.default_rng(4)
HEAD_VD = RNG.standard_normal((V, D)).astype(np.float32)
EMBED_VD = RNG.standard_normal((V, D)).astype(np.float32)
SCORED_V = np.isin(np.arange(V), HOT)
FROZEN = FrozenTarget(
    jnp.asarray(EMBED_VD),
    jnp.asarray(HEAD_VD[HOT]),
    vocabulary=Vocabulary(jnp.asarray(HEAD_VD), jnp.asarray(SCORED_V)),
)


@lru_cache
def batch_of(spec: Eagle3Spec) -> Batch:
    """Rows of 14, 9 and 5 tokens; the first is supervised from its start."""
    batch = three_rows(0, 3, 1)
    rng, live_BL1 = (
        np.random.default_rng(6),
        np.arange(L)[None, :, None] < batch.length_BC[..., None],
    )
    widths = (D * len(spec.state_layers), D)
    taps_BLI, true_BLD = (
        rng.standard_normal((B, L, width)).astype(np.float32) * live_BL1 for width in widths
    )
    return batch._replace(inputs_BLI=taps_BLI, targets_BLD=true_BLD)


def in_torch(w, spec: Eagle3Spec, batch: Batch):
    """Rows for the oracle, without their padding."""
    table_VD = w["embed_VD"].detach() if spec.own_embedding else torch.tensor(EMBED_VD).double()
    for line, length in enumerate(batch.length_BC[:, 0]):
        taps_LI = torch.tensor(np.asarray(batch.inputs_BLI[line, :length])).double()
        yield (
            table_VD[torch.tensor(batch.tokens_BL[line, :length]).long()],
            list(taps_LI.split(D, -1)),
            torch.tensor(np.asarray(batch.targets_BLD[line, :length])).double(),
            batch.counted_BT[line, :length],
        )


@lru_cache
def by_torch(spec: Eagle3Spec, steps: int, bug: str = "", decay: float = 0.8):
    """(loss, N, gradient by name) of the oracle."""
    w = weights(random_params(spec))
    rows = list(in_torch(w, spec, batch_of(spec)))
    value, counted = torch_loss(
        w, spec, rows, torch.tensor(HEAD_VD).double(), HOT, steps, decay, bug
    )
    value.backward()
    zero = {name: torch.zeros_like(x) for name, x in w.items()}
    return (
        float(value.detach()),
        counted,
        {name: (zero[name] if x.grad is None else x.grad).numpy() for name, x in w.items()},
    )


@lru_cache
def gradient_of(spec: Eagle3Spec, stage: TestTimeStage, config=CLEAN):
    def value(params, *rest):
        return stage_loss(params, spec, config, stage, TEST_TIME, *rest, ONE_DEVICE)

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def ours(spec: Eagle3Spec, stage: TestTimeStage, frozen=FROZEN, batch=None):
    batch = batch_of(spec) if batch is None else batch
    return gradient_of(spec, stage)(random_params(spec), frozen, batch, jax.random.key(0))


def same_as_torch(spec: Eagle3Spec, stage: TestTimeStage, bug: str = "") -> None:
    (value, metrics), gradient = ours(spec, stage)
    expected, counted, by_name = by_torch(spec, stage.simulation_steps, bug)
    assert int(metrics.supervised) == counted
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, expected_gradient in by_name.items():
        np.testing.assert_allclose(
            gradient[name],
            expected_gradient,
            rtol=0,
            atol=1e-4 * np.abs(expected_gradient).max() + 1e-9,
            err_msg=name,
        )


@pytest.mark.parametrize("name", SPECS)
def test_loss_and_gradient_are_those_of_torch(name):
    same_as_torch(SPECS[name], STAGE.changed(simulation_steps=3))


def test_seven_steps_are_those_of_torch():
    same_as_torch(PLAIN, STAGE.changed(simulation_steps=7))


@pytest.mark.parametrize(
    "bug",
    [
        "all counted",
        "mask one early",
        "target early",
        "not renormalised",
        "equal weights",
        "no final norm",
        "detached",
        "fc again",
        "own keys forgotten",
        "later columns seen",
        "one place",
        "feature first",
    ],
)
def test_planted_bugs(bug):
    with pytest.raises(AssertionError):
        same_as_torch(PLAIN, STAGE.changed(simulation_steps=3), bug)


def test_planted_bug_the_output_is_carried_raw(monkeypatch):
    """Of the draft that norms it."""
    spec = SPECS["speculators"]
    expected = by_torch(spec, 3)[0]
    (value, _), _ = gradient_of.__wrapped__(
        replace(spec, norm_output=False), STAGE.changed(simulation_steps=3)
    )(random_params(spec), FROZEN, batch_of(spec), jax.random.key(0))
    assert abs(float(value) / expected - 1) > 1e-4


# States

_states = jax.jit(eagle_states, static_argnames=("spec", "count", "steps", "detach"))


@pytest.mark.parametrize("name", SPECS)
def test_states_are_those_of_torch(name):
    """Of every column and step; ours are by the query that a draft starts at, one later."""
    spec, steps = SPECS[name], 4
    params, batch = random_params(spec), batch_of(spec)
    w = weights(params)
    table_VD = params["embed_VD"] if spec.own_embedding else EMBED_VD
    simulated_BTJD = np.asarray(
        _states(
            params,
            spec,
            np.asarray(table_VD)[batch.tokens_BL],
            batch.inputs_BLI,
            batch.length_BC,
            batch.first_BC,
            count=L,
            steps=steps,
            detach=False,
        )
    )
    compared = 0
    for line, (e_LD, streams, _, _) in enumerate(in_torch(w, spec, batch)):
        with torch.no_grad():
            made = simulated(w, spec, e_LD, streams, steps)
        for (j, t), o_D in made.items():
            # 1e-5: float32 against float64; outputs reach 9, and differ by less than 4e-6
            np.testing.assert_allclose(simulated_BTJD[line, j + 1, t - 1], o_D, rtol=0, atol=1e-5)
            compared += 1
    assert compared == sum(max(n - t, 0) for n in (14, 9, 5) for t in range(1, steps + 1))


# Which positions count, and what they weigh


def test_a_whole_vocabulary_counts_every_supervised_position():
    spec = PLAIN.scoring(V)
    batch = batch_of(spec)
    whole = FrozenTarget(jnp.asarray(EMBED_VD), jnp.asarray(HEAD_VD))
    (_, metrics), _ = ours(spec, STAGE, whole)
    assert int(metrics.supervised) == batch.counted_BT.sum()
    (_, fewer), _ = ours(PLAIN, STAGE)
    likely_BL = (batch.targets_BLD @ HEAD_VD.T).argmax(-1)
    counted_BL = batch.counted_BT & SCORED_V[likely_BL]
    assert int(fewer.supervised) == counted_BL.sum() < batch.counted_BT.sum()
    assert fewer.count_J.tolist() == [counted_BL[:, step + 1 :].sum() for step in range(4)]


def held_out(spec: Eagle3Spec, frozen=FROZEN, objective=TEST_TIME):
    """Loss and metrics of the evaluation step: over all tokens, at all supervised positions."""

    @jax.jit
    def figures(params, frozen, batch, key):
        rest = (frozen, batch, key, ONE_DEVICE, frozen.vocabulary)
        return stage_loss(params, spec, CLEAN, STAGE, objective, *rest)

    return figures(random_params(spec), frozen, batch_of(spec), jax.random.key(0))


def test_held_out_figures_count_tokens_that_the_draft_does_not_score_as_missed():
    """The loss of a head of its own is over its tokens, at these positions too."""
    value, metrics = held_out(PLAIN)
    expected, counted, _ = by_torch(PLAIN, STAGE.simulation_steps, "all counted")
    assert int(metrics.supervised) == counted == batch_of(PLAIN).counted_BT.sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    (_, of_scored), _ = ours(PLAIN, STAGE)
    np.testing.assert_array_equal(metrics.agree_JK, of_scored.agree_JK)
    assert (metrics.count_J > of_scored.count_J).all()


def test_planted_bug_held_out_figures_over_the_tokens_of_the_draft():
    _, metrics = held_out(
        PLAIN, replace(FROZEN, vocabulary=None), replace(TEST_TIME, only_scored=False)
    )
    (_, of_scored), _ = ours(PLAIN, STAGE)
    assert metrics.agree_JK.sum() > of_scored.agree_JK.sum()


def test_the_held_out_loss_through_the_head_of_the_target_is_over_all_tokens():
    spec = SPECS["the target's head"]
    value, _ = held_out(spec)
    all_tokens = FrozenTarget(jnp.asarray(EMBED_VD), jnp.asarray(HEAD_VD))
    np.testing.assert_allclose(value, held_out(spec, all_tokens)[0], rtol=1e-6)
    wrong, _ = held_out(
        spec, replace(FROZEN, vocabulary=None), replace(TEST_TIME, only_scored=False)
    )
    assert abs(wrong / value - 1) > 1e-3  # the planted bug: over the tokens of the draft


def test_the_order_of_the_vocabulary_changes_nothing():
    """Ascending, as the authors' is, or by frequency: rows of the heads move together."""
    order = np.argsort(HOT)
    params = random_params(PLAIN)
    moved = params | {"head_VD": params["head_VD"][order]}
    ascending = replace_head(FROZEN, HEAD_VD[HOT[order]])
    step = gradient_of(PLAIN, STAGE)
    before, after = (
        step(each, frozen, batch_of(PLAIN), jax.random.key(0))
        for each, frozen in ((params, FROZEN), (moved, ascending))
    )
    np.testing.assert_allclose(before[0][0], after[0][0], rtol=1e-6)
    wrong = step(params, ascending, batch_of(PLAIN), jax.random.key(0))
    assert abs(wrong[0][0] / before[0][0] - 1) > 1e-3  # the planted bug


def replace_head(frozen: FrozenTarget, head_VD: np.ndarray) -> FrozenTarget:
    return replace(frozen, head_VD=jnp.asarray(head_VD))


@pytest.mark.parametrize("kind", ["reverse_kl", "total_variation"])
def test_other_distances_train_the_head(kind):
    """The gradient that the loss computes in parts is that of its own value. (lk_hybrid has a
    weight without a gradient.)
    """
    config = CLEAN.changed(loss=kind, loss_rows=5)
    step = gradient_of(PLAIN, STAGE.changed(simulation_steps=2), config)
    params, batch, key = random_params(PLAIN), batch_of(PLAIN), jax.random.key(0)
    (_, _), gradient = step(params, FROZEN, batch, key)
    for name in ("head_VD", "norm", "fc"):
        along = np.random.default_rng(3).standard_normal(params[name].shape).astype(np.float32)
        ends = [
            float(step(params | {name: params[name] + size * along}, FROZEN, batch, key)[0][0])
            for size in (1e-3, -1e-3)
        ]
        # 2 %: float32 differences of values near 3
        slope = float(np.sum(np.asarray(gradient[name]) * along))
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-3, slope, rtol=0.02, atol=2e-3)


# The step


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("narrow", "stored"),
        ("SafeAILab", "online"),
        pytest.param("narrow", "online", marks=pytest.mark.slow),
        pytest.param("SafeAILab", "stored", marks=pytest.mark.slow),
    ],
)
def test_the_step_trains_every_parameter_but_the_embedding(tiny_params, states, name):
    spec = SPECS[name]
    batch = three_rows(0, 3, 3)
    joined_BLI = states_in_memory(tiny_params, TINY, batch.tokens_BL, batch.length_BC, spec.taps)
    stored = batch._replace(inputs_BLI=joined_BLI[..., :-D], targets_BLD=joined_BLI[..., -D:])
    batch = stored if states == "stored" else stored._replace(inputs_BLI=None, targets_BLD=None)
    table_VD = tiny_params["embed_VD"]
    vocabulary = Vocabulary(table_VD, jnp.asarray(SCORED_V))
    frozen = FrozenTarget(table_VD, table_VD[HOT], tiny_params, TINY, vocabulary)
    first = fresh_params(spec, jax.random.key(1))
    step, evaluate, init = make_steps(spec, CLEAN, STAGE, ONE_DEVICE)
    before = evaluate(first, frozen, batch)
    # 1e-5: the same streams, stored and computed in the step
    expected = evaluate(first, frozen, stored).objective
    np.testing.assert_allclose(before.objective, expected, rtol=1e-5)
    state = init(first)
    for _ in range(8):
        state, metrics = step(state, frozen, batch, 42)
    unchanged = {key for key in first if np.array_equal(state.params[key], first[key])}
    assert unchanged == ({"embed_VD"} if spec.own_embedding else set())
    assert evaluate(state.params, frozen, batch).objective < before.objective
    assert metrics.vloss == 0


def test_planted_bug_streams_of_other_layers(tiny_params):
    batch = three_rows(0, 3, 3)
    values = []
    for layers in ((0, 1, 2), (0, 1, 1)):
        joined_BLI = states_in_memory(tiny_params, TINY, batch.tokens_BL, batch.length_BC, layers)
        stored = batch._replace(inputs_BLI=joined_BLI[..., :-D], targets_BLD=joined_BLI[..., -D:])
        values.append(float(ours(PLAIN, STAGE, batch=stored)[0][0]))
    assert abs(values[0] / values[1] - 1) > 1e-3

"""One optimizer step of each stage: loss by hand, noise, metrics, clipping, golden numbers."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE
from step_cases import CLEAN, EARLY, LATE, NOISY, SPEC, B, L, quick_jit, three_rows

from beagle_jax.config import StageConfig, TestTimeStage, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.kinds import objective_of
from beagle_jax.training.objective import Inputs
from beagle_jax.training.step import (
    AGREE_WITHIN,
    add_noise,
    make_steps,
    stage_loss,
)

EARLY_ONE, LATE_ONE = (
    EARLY.changed(window=1),
    LATE.changed(window=1, simulation_steps=1, detach=False),
)
BOTH = pytest.mark.parametrize("stage", [EARLY, LATE], ids=["early", "late"])


@pytest.fixture(scope="module")
def batch() -> Batch:
    return three_rows(3, 3, 3)


@pytest.fixture(scope="module")
def frozen(tiny_params) -> FrozenTarget:
    """A target whose head is reduced to four hot tokens, so that the draft sometimes agrees."""
    return FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"][:4])


_noisy = quick_jit(add_noise, static_argnums=2)


@lru_cache
def loss_of(config: TrainConfig, stage: StageConfig):
    """Returns a jitted function (params, frozen, batch, key) -> (loss, metrics)."""
    return quick_jit(
        lambda params, *rest: stage_loss(
            params, SPEC, config, stage, objective_of(SPEC, stage), *rest, ONE_DEVICE
        )
    )


@lru_cache
def gradient_of(config: TrainConfig, stage: StageConfig):
    """Returns a jitted function like `loss_of` that gives ((loss, metrics), gradient)."""

    def loss(params, *rest):
        return stage_loss(params, SPEC, config, stage, objective_of(SPEC, stage), *rest, ONE_DEVICE)

    return quick_jit(jax.value_and_grad(loss, has_aux=True))


@lru_cache
def predicted_by(stage: StageConfig):
    """Returns a jitted function for predicted states, with a query at every position.

    Its arguments: params, embeddings [V, D], batch, states, offset.
    """

    def predicted(params, embed_VD, batch, h_BLD, offset):
        inputs = Inputs(
            batch.tokens_BL,
            h_BLD,
            batch.length_BC,
            batch.first_BC,
            jnp.tile(jnp.arange(L), (B, 1)),
            lambda tokens: embed_VD[tokens],
        )
        return objective_of(SPEC, stage).predict(params, SPEC, stage, inputs, offset).state_BYD

    return quick_jit(predicted)


def queries(stage: StageConfig, offset: int) -> list[tuple[int, int, int, float]]:
    """Lists the queries by hand.

    Each is (place among the predictions, row position, window offset or draft step, weight).
    """
    if stage.simulation_steps == 1:
        return [(i, i, (i - offset) % stage.window if i >= offset else 0, 1.0) for i in range(L)]
    steps, beta = stage.simulation_steps, stage.step_weights or range(stage.simulation_steps, 0, -1)
    scored = [
        (j, r) for j in range(steps) for r in range(j, stage.window if stage.multi_token else j + 1)
    ]
    listed = [
        (u * len(scored) + n, offset + u * stage.window + r, j, beta[j])
        for u in range(L)
        for n, (j, r) in enumerate(scored)
    ]
    return [query for query in listed if query[1] < L]


def metrics_by_hand(
    stage, offset, state_BTD, true_BLD, head_VD, counted_BL, vloss_weight=10.0, within=AGREE_WITHIN
) -> dict:
    """Computes the sums of method.md 3.2 and 4.2 in float64, position by position."""
    groups = stage.window if stage.simulation_steps == 1 else stage.simulation_steps
    out = {
        "ploss": 0.0,
        "vloss": 0.0,
        "objective": 0.0,
        "count_J": np.zeros(groups),
        "agree_JK": np.zeros((groups, 3)),
    }
    state_BTD, true_BLD, head_VD = (
        np.asarray(x, np.float64) for x in (state_BTD, true_BLD, head_VD)
    )
    for row in range(B):
        for place, position, group, weight in queries(stage, offset):
            if not counted_BL[row, position]:
                continue
            draft, true = head_VD @ state_BTD[row, place], head_VD @ true_BLD[row, position]
            p = np.exp(true - true.max()) / np.exp(true - true.max()).sum()
            log_q = draft - draft.max() - np.log(np.exp(draft - draft.max()).sum())
            z = np.abs(state_BTD[row, place] - true_BLD[row, position])
            ce, l1 = -(p * log_q).sum(), np.where(z < 1, 0.5 * z**2, z - 0.5).mean()
            out["ploss"] += ce
            out["vloss"] += l1
            out["objective"] += weight * (ce + vloss_weight * l1)
            out["count_J"][group] += 1
            out["agree_JK"][group] += [
                true.argmax() in np.argsort(-draft)[:count] for count in within
            ]
    return out | {"supervised": counted_BL.sum()}


def check_metrics(metrics, expected: dict) -> None:
    for name, value in expected.items():
        # 1e-4: float32 sums over a block, a head and some thirty rows
        np.testing.assert_allclose(getattr(metrics, name), value, rtol=1e-4, err_msg=name)


def both_ways(draft, frozen, batch, stage, seed: int, bug: str = ""):
    """Returns (loss, metrics) of the library, and the sums by hand with a planted bug."""
    noise_key, offset_key = jax.random.split(jax.random.key(seed))
    offset = int(jax.random.randint(offset_key, (), 0, stage.window))
    h_BLD = _noisy(batch.inputs_BLI, batch.length_BC, NOISY, noise_key)
    state_BTD = predicted_by(stage)(draft, frozen.embed_VD, batch, h_BLD, jnp.int32(offset))
    by_hand = metrics_by_hand(
        stage,
        offset + (bug == "offset"),
        state_BTD,
        h_BLD if bug == "noisy targets" else batch.inputs_BLI,
        frozen.head_VD,
        np.roll(batch.counted_BT, -1, axis=1) if bug == "shifted mask" else batch.counted_BT,
        1.0 if bug == "vloss weight" else 10.0,
    )
    return loss_of(NOISY, stage)(draft, frozen, batch, jax.random.key(seed)), by_hand


@BOTH
def test_loss_and_metrics_by_hand_with_clean_targets(tiny_draft, frozen, batch, stage):
    agree = []
    for seed in range(4):
        (loss, metrics), by_hand = both_ways(tiny_draft, frozen, batch, stage, seed)
        check_metrics(metrics, by_hand)
        # As in check_metrics.
        np.testing.assert_allclose(loss, by_hand["objective"] / batch.counted_BT.sum(), rtol=1e-4)
        agree += [by_hand["agree_JK"][:, 0].sum() / by_hand["count_J"].sum()]
    assert 0 < np.mean(agree) < 1 and len(set(agree)) > 1


@BOTH
@pytest.mark.parametrize("bug", ["noisy targets", "offset", "vloss weight", "shifted mask"])
def test_a_wrong_loss_is_seen(tiny_draft, frozen, batch, stage, bug):
    (_, metrics), wrong = both_ways(tiny_draft, frozen, batch, stage, 1, bug)
    with pytest.raises(AssertionError):
        check_metrics(metrics, wrong)


def test_noise_reaches_keys_and_values_only(tiny_draft, frozen, batch):
    """With o_proj = 0 the block ignores its memory.

    Noise then changes nothing, so the targets are clean.
    """
    drafts = {
        "whole": tiny_draft,
        "deaf": tiny_draft | {"o_proj": jnp.zeros_like(tiny_draft["o_proj"])},
    }
    loss = {
        (config.noise, name): float(
            loss_of(config, EARLY)(draft, frozen, batch, jax.random.key(1))[0]
        )
        for config in (NOISY, CLEAN)
        for name, draft in drafts.items()
    }
    assert loss["none", "deaf"] == loss["uniform", "deaf"]
    assert abs(loss["none", "whole"] - loss["uniform", "whole"]) > 1e-3


def test_uniform_noise_shrinks_with_the_row_length():
    """Down to the shortest length that counts; 64 is shorter (method.md 3.3)."""
    length_B1 = jnp.array([[64], [256], [512], [2048]])
    config = TrainConfig()
    noise = np.asarray(_noisy(jnp.zeros((4, 4000, 8)), length_B1, config, jax.random.key(2)))
    for row, width in zip(noise, 0.2 * 512 / np.array([128, 256, 512, 2048]), strict=True):
        assert -width / 2 <= row.min() < -0.499 * width and 0.499 * width < row.max() <= width / 2
        share, _ = np.histogram(row, bins=8, range=(-width / 2, width / 2))
        # 0.01: five standard errors of 32,000 draws.
        np.testing.assert_allclose(share / row.size, 1 / 8, atol=0.01)
    assert not np.allclose(
        noise[0, :, 0] / noise[0].std(), noise[1, :, 0] / noise[1].std(), atol=0.1
    )


def test_gaussian_noise_and_none():
    states_BLD, length_B1, key = (
        jnp.ones((2, 4000, 8)),
        jnp.array([[64], [2048]]),
        jax.random.key(2),
    )
    noise = (
        np.asarray(
            _noisy(states_BLD, length_B1, TrainConfig(noise="gaussian", noise_scale=0.3), key)
        )
        - 1
    )
    for row in noise:
        # 0.01: five standard errors of 32,000 draws
        np.testing.assert_allclose(
            [row.mean(), row.std(), (row**4).mean() / row.var() ** 2 / 3], [0, 0.3, 1], atol=0.06
        )
        np.testing.assert_allclose([row.mean(), row.std()], [0, 0.3], atol=0.01)
    assert add_noise(states_BLD, length_B1, CLEAN, key) is states_BLD


@BOTH
def test_the_loss_is_per_supervised_token(tiny_draft, frozen, batch, stage):
    """A row three times, or once next to unsupervised rows, gives the same loss."""
    thrice = jax.tree.map(lambda field: np.repeat(field[:1], B, axis=0), batch)
    once = batch._replace(counted_BT=batch.counted_BT * np.array([[True], [False], [False]]))
    loss_thrice, metrics_thrice = loss_of(CLEAN, stage)(
        tiny_draft, frozen, thrice, jax.random.key(1)
    )
    loss_once, metrics_once = loss_of(CLEAN, stage)(tiny_draft, frozen, once, jax.random.key(1))
    np.testing.assert_allclose(loss_thrice, loss_once, rtol=1e-5)
    np.testing.assert_allclose(metrics_thrice.objective, 3 * metrics_once.objective, rtol=1e-5)
    assert metrics_once.supervised == batch.counted_BT[0].sum() and metrics_once.objective > 1
    loss_all, _ = loss_of(CLEAN, stage)(tiny_draft, frozen, batch, jax.random.key(1))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(loss_all, loss_once, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"step_weights": (0.5, 0.0, 4.0)}, {"multi_token": True}],
    ids=["step_weights", "multi_token"],
)
def test_another_late_loss_is_the_one_by_hand(tiny_draft, frozen, batch, change):
    changed = LATE.changed(**change)
    (_, metrics), by_hand = both_ways(tiny_draft, frozen, batch, changed, 1)
    check_metrics(metrics, by_hand)
    (_, default), _ = both_ways(tiny_draft, frozen, batch, LATE, 1)
    with pytest.raises(AssertionError):
        check_metrics(default, by_hand)


def test_dense_begins_a_window_at_every_position(tiny_draft, frozen, batch):
    """Step j scores every position that has j positions before it, whatever the offset.

    Windows score about one in k.
    """
    dense = TestTimeStage(steps=10, learning_rate=1e-3, warmup=0, simulation_steps=3)
    _, metrics = loss_of(NOISY, dense)(tiny_draft, frozen, batch, jax.random.key(1))
    assert metrics.count_J.tolist() == [batch.counted_BT[:, step:].sum() for step in range(3)]
    _, windows = loss_of(NOISY, LATE)(tiny_draft, frozen, batch, jax.random.key(1))
    assert windows.count_J.sum() < 0.5 * metrics.count_J.sum()


def test_agreement_within_more_choices_than_one(tiny_draft, frozen, batch, monkeypatch):
    """There are four hot tokens, so agreement is within one, two and three."""
    monkeypatch.setattr("beagle_jax.training.step.AGREE_WITHIN", (1, 2, 3))
    _, metrics = loss_of.__wrapped__(CLEAN, EARLY)(tiny_draft, frozen, batch, jax.random.key(1))
    offset = int(jax.random.randint(jax.random.split(jax.random.key(1))[1], (), 0, EARLY.window))
    state_BTD = predicted_by(EARLY)(
        tiny_draft, frozen.embed_VD, batch, batch.inputs_BLI, jnp.int32(offset)
    )

    def hand(within):
        return metrics_by_hand(
            EARLY,
            offset,
            state_BTD,
            batch.inputs_BLI,
            frozen.head_VD,
            batch.counted_BT,
            within=within,
        )["agree_JK"]

    np.testing.assert_array_equal(metrics.agree_JK, hand((1, 2, 3)))
    assert not np.array_equal(hand((1, 2, 3)), hand((1, 3, 2))) and not np.array_equal(
        hand((1, 2, 3)), hand((2, 3, 4))
    )


def test_vloss_weighs_ten_by_default(tiny_draft, frozen, batch):
    _, metrics = loss_of(NOISY, EARLY)(tiny_draft, frozen, batch, jax.random.key(1))
    np.testing.assert_allclose(metrics.objective - metrics.ploss, 10 * metrics.vloss, rtol=1e-5)


def same_loss_and_gradient(draft, frozen, batch, late_batch) -> None:
    """Compares windows of one position: early on `batch`, late on `late_batch`.

    method.md 13.3.
    """
    (early, _), early_gradient = gradient_of(CLEAN, EARLY_ONE)(
        draft, frozen, batch, jax.random.key(1)
    )
    (late, _), late_gradient = gradient_of(CLEAN, LATE_ONE)(
        draft, frozen, late_batch, jax.random.key(1)
    )
    np.testing.assert_allclose(late, early, rtol=1e-5)
    for name, gradient in early_gradient.items():
        # 1e-4: a whole block and its loss, summed in another order
        np.testing.assert_allclose(
            late_gradient[name], gradient, rtol=1e-4, atol=1e-4, err_msg=name
        )
        assert np.abs(gradient).max() > 1e-2


def test_late_with_one_step_in_windows_of_one_is_early(tiny_draft, frozen, batch):
    same_loss_and_gradient(tiny_draft, frozen, batch, batch)


@pytest.mark.parametrize("field", ["inputs_BLI", "tokens_BL", "counted_BT"])
def test_late_with_anything_shifted_is_not_early(tiny_draft, frozen, batch, field):
    shifted = batch._replace(**{field: np.roll(getattr(batch, field), 1, axis=1)})
    with pytest.raises(AssertionError):
        same_loss_and_gradient(tiny_draft, frozen, batch, shifted)


# The step itself


@lru_cache
def steps_of(config: TrainConfig, stage: StageConfig):
    return make_steps(SPEC, config, stage, ONE_DEVICE)


def copy_of(draft: dict) -> dict:
    return {name: array.copy() for name, array in draft.items()}


def rms(tree) -> float:
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return float(
        np.sqrt(sum((leaf**2).sum() for leaf in leaves) / sum(leaf.size for leaf in leaves))
    )


GOLDEN = {
    "early": {
        "loss": 36.14479,
        "grad_norm": 41.20863,
        "update_rms": 0.000999964,
        "param_rms": 0.3114579,
        "third_loss": 37.61875,
    },
    "late": {
        "loss": 86.60296,
        "grad_norm": 205.5154,
        "update_rms": 0.000999893,
        "param_rms": 0.3114922,
        "third_loss": 101.98403,
    },
}


@pytest.mark.parametrize(("name", "stage"), [("early", EARLY), ("late", LATE)])
def test_golden_step(tiny_draft, frozen, batch, name, stage):
    train_step, _, init = steps_of(NOISY, stage)
    state, metrics = train_step(init(copy_of(tiny_draft)), frozen, batch, 42)
    figures = {
        "loss": float(metrics.objective / metrics.supervised),
        "grad_norm": float(metrics.grad_norm),
        "update_rms": rms({key: state.params[key] - tiny_draft[key] for key in tiny_draft}),
        "param_rms": rms(state.params),
    }
    for _ in range(2):
        state, metrics = train_step(state, frozen, batch, 42)
    figures["third_loss"] = float(metrics.objective / metrics.supervised)
    assert figures == pytest.approx(GOLDEN[name], rel=1e-4), (
        f"the first {name} steps changed. If that was meant (loss, noise, masks, optimizer, "
        "first weights, or another JAX version's random numbers), put the new numbers into "
        f"GOLDEN; if not, something broke: {figures}"
    )


def test_a_step_is_a_function_of_state_seed_and_step(tiny_draft, frozen, batch):
    train_step, _, init = steps_of(NOISY, EARLY)

    def run(seed, step):
        return train_step(
            init(copy_of(tiny_draft))._replace(step=jnp.int32(step)), frozen, batch, seed
        )[1].objective

    assert run(3, 5) == run(3, 5)
    assert len({float(run(seed, step)) for seed, step in ((3, 5), (3, 6), (4, 5))}) == 3


def test_the_state_holds_the_draft_only_and_the_frozen_parts_stay(tiny_draft, frozen, batch):
    train_step, _, init = steps_of(NOISY, EARLY)
    before = jax.tree.map(np.array, frozen)
    state = init(copy_of(tiny_draft))
    for _ in range(2):
        state, _ = train_step(state, frozen, batch, 42)
    assert set(state.params) == set(SPEC.param_shapes())
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 1)
    # Parameters, mean, variance.
    assert sizes == sorted(3 * [int(np.prod(shape)) for shape in SPEC.param_shapes().values()])
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    for name, array in state.params.items():
        assert not np.array_equal(array, tiny_draft[name]), f"{name} was not trained"
    assert int(state.step) == 2


def test_the_state_is_donated(tiny_draft, frozen, batch):
    train_step, _, init = steps_of(NOISY, EARLY)
    old = init(copy_of(tiny_draft))
    train_step(old, frozen, batch, 42)
    assert all(
        leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)) if leaf.size > 1
    )
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_evaluation_step_measures_without_noise(tiny_draft, frozen, batch):
    _, eval_step, _ = steps_of(NOISY, EARLY)
    _, expected = loss_of(CLEAN, EARLY)(tiny_draft, frozen, batch, jax.random.key(0))
    check_metrics(eval_step(tiny_draft, frozen, batch), expected._asdict())


def test_reported_gradient_norm_is_before_clipping(tiny_draft, frozen, batch):
    train_step, _, init = steps_of(NOISY, EARLY)
    _, metrics = train_step(init(copy_of(tiny_draft)), frozen, batch, 42)
    _, gradient = gradient_of(NOISY, EARLY)(
        tiny_draft, frozen, batch, jax.random.fold_in(jax.random.key(42), 0)
    )
    norm = np.sqrt(
        sum(
            (np.asarray(gradient_array, np.float64) ** 2).sum()
            for gradient_array in gradient.values()
        )
    )
    # 1e-4: a whole backward pass, fused differently.
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)
    assert norm > NOISY.clip_norm

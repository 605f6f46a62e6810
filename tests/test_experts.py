"""Routed experts against the definition, token by token, in every platform's form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beagle_jax.model import experts as experts_module
from beagle_jax.model.experts import Experts, choose, grouped, routed
from beagle_jax.model.quantised import arranged, dense, quantise

D, F, M, COUNT = 8, 4, 8, 5
EXPERTS = Experts(COUNT, 2, F, True, (), ("", "", "", ""))
FORMS = {
    "one_by_one": experts_module._one_by_one,
    "few": experts_module._few,
    "every": experts_module._every,
    "grouped": lambda choice, stacks, *rest: grouped(
        choice, [x.swapaxes(1, 2) for x in stacks], *rest
    ),
}
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = (COUNT, F, D), (COUNT, F, D), (COUNT, D, F)
    return (
        rng.standard_normal((COUNT, D), np.float32),
        [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes],
        rng.standard_normal((D, M), np.float32),
    )


def _output(form, router_ED, stacks, y_DM, experts=EXPERTS, count=M):
    def run(stacks, y_DM):
        choice = choose(router_ED, experts, y_DM, count)
        return FORMS[form](choice, stacks, jax.nn.silu, y_DM)

    return np.asarray(jax.jit(run)(stacks, y_DM))


def _by_hand(router_ED, stacks, y_DM, experts):
    """Computes one token at a time."""
    out_DM, (gate, up, down) = np.zeros_like(y_DM), map(np.asarray, stacks)
    for m, y_D in enumerate(y_DM.T):
        raw_E = router_ED @ y_D
        share_E = np.exp(raw_E) / np.exp(raw_E).sum()
        chosen = np.argsort(-share_E)[: experts.per_token]
        total = share_E[chosen].sum() if experts.renormalised else 1.0
        for e in chosen:
            raw_F = gate[e] @ y_D
            inner_F = raw_F / (1 + np.exp(-raw_F)) * (up[e] @ y_D)
            out_DM[:, m] += share_E[e] / total * (down[e] @ inner_F)
    return out_DM


def _differs(actual, expected) -> bool:
    return not np.allclose(actual, expected, atol=1e-4)


@each_form
@pytest.mark.parametrize("renormalised", [True, False])
def test_experts_equal_their_definition(arrays, form, renormalised):
    router_ED, stacks, y_DM = arrays
    experts = dataclasses.replace(EXPERTS, renormalised=renormalised)
    actual_DM = _output(form, router_ED, stacks, y_DM, experts)
    assert not _differs(actual_DM, _by_hand(router_ED, stacks, y_DM, experts))
    # planted: the other rule, and the weights of another expert
    other = dataclasses.replace(experts, renormalised=not renormalised)
    assert _differs(actual_DM, _by_hand(router_ED, stacks, y_DM, other))
    turned = [jnp.roll(stack, 1, axis=0) for stack in stacks]
    assert _differs(_output(form, router_ED, turned, y_DM, experts), actual_DM)


def test_planted_bug_outputs_in_the_order_of_the_experts(arrays, monkeypatch):
    """Outputs of `grouped` that are not sorted back belong to other columns."""
    router_ED, stacks, y_DM = arrays
    right = _output("grouped", router_ED, stacks, y_DM)
    real = jnp.argsort
    orders = iter((real, lambda order_R: jnp.arange(len(order_R))))
    monkeypatch.setattr(experts_module.jnp, "argsort", lambda x: next(orders)(x))
    assert _differs(_output("grouped", router_ED, stacks, y_DM), right)


@each_form
def test_padding_columns_ask_for_nothing(arrays, form):
    router_ED, stacks, y_DM = arrays
    choice = choose(router_ED, EXPERTS, y_DM, 3)
    share_EM = np.array(choice.share_EM)
    assert not share_EM[:, 3:].any()
    np.testing.assert_allclose(share_EM[:, :3].sum(axis=0), 1, atol=1e-6)
    assert ((share_EM[:, :3] > 0).sum(axis=0) == EXPERTS.per_token).all()
    assert set(np.asarray(choice.expert_Mk[3:]).flat) == set(np.asarray(choice.expert_Mk[0]))
    actual_DM = _output(form, router_ED, stacks, y_DM, count=3)
    assert not actual_DM[:, 3:].any()
    assert not _differs(actual_DM[:, :3], _by_hand(router_ED, stacks, y_DM[:, :3], EXPERTS))


@pytest.mark.parametrize("form", ["one_by_one", "few"])
def test_an_expert_that_nobody_chose_is_not_read(arrays, form):
    """That expert's weights are NaN: only skipping keeps them out of the sum.

    Planted: a column that chooses it lets them in.
    """
    router_ED, stacks, y_DM = arrays
    first_D1 = y_DM[:, :1]
    chosen = set(np.asarray(choose(router_ED, EXPERTS, first_D1, 1).expert_Mk[0]).tolist())
    other = min(set(range(COUNT)) - chosen)

    def finite(expert):
        poisoned = [stack.at[expert].set(jnp.nan) for stack in stacks]
        return np.isfinite(_output(form, router_ED, poisoned, first_D1, count=1)).all()

    assert finite(other) and not finite(min(chosen))


@each_form
def test_a_column_that_is_not_finite_stays_alone(arrays, form):
    router_ED, stacks, y_DM = arrays
    poisoned_DM = y_DM.copy()
    poisoned_DM[:, 2] = np.inf
    clean_DM, actual_DM = (_output(form, router_ED, stacks, x) for x in (y_DM, poisoned_DM))
    others = [m for m in range(M) if m != 2]
    np.testing.assert_allclose(actual_DM[:, others], clean_DM[:, others], atol=1e-5)
    assert np.isnan(actual_DM[:, 2]).any()


def test_an_overflow_of_an_expert_that_was_not_chosen_does_not_count(arrays):
    """Planted: with every expert's share, the same overflow counts."""
    router_ED, stacks, y_DM = arrays
    router_ED = 0.001 * router_ED  # shares far from 0
    choice = choose(router_ED, EXPERTS, y_DM[:, :1], 1)
    other = min(set(range(COUNT)) - set(np.asarray(choice.expert_Mk[0]).tolist()))
    large = [stacks[0], stacks[1].at[other].multiply(3e38), stacks[2]]
    assert np.isfinite(_output("every", router_ED, large, 100 * y_DM[:, :1], count=1)).all()
    every = dataclasses.replace(EXPERTS, per_token=COUNT)
    assert not np.isfinite(_output("every", router_ED, large, 100 * y_DM[:, :1], every, 1)).all()


@pytest.mark.parametrize(
    ("columns", "expected"), [(1, "few"), (2, "few"), (3, "every"), (M, "every"), (9, "one")]
)
def test_a_gpu_has_a_form_for_each_number_of_columns(arrays, monkeypatch, columns, expected):
    router_ED, stacks, y_DM = arrays
    ran = []
    for name in ("_few", "_every", "_one_by_one"):
        monkeypatch.setattr(experts_module, name, lambda *_, name=name: ran.append(name))
    monkeypatch.setattr(experts_module, "by_platform", lambda on_gpu, elsewhere: on_gpu())
    monkeypatch.setattr(experts_module, "_COLUMNS", M)
    y_DM = np.concatenate([y_DM, y_DM], axis=1)[:, :columns]
    routed(choose(router_ED, EXPERTS, y_DM, columns), stacks, jax.nn.silu, y_DM)
    assert [name.startswith(f"_{expected}") for name in ran] == [True]


def test_this_platform_has_the_loop(arrays):
    router_ED, stacks, y_DM = arrays
    choice = choose(router_ED, EXPERTS, y_DM, M)
    text = str(jax.jit(lambda: routed(choice, stacks, jax.nn.silu, y_DM)).lower().as_text())
    assert "stablehlo.while" in text and "ragged_dot" not in text
    assert "stablehlo.while" not in (
        jax.jit(lambda: FORMS["few"](choice, stacks, jax.nn.silu, y_DM)).lower().as_text()
    )


@pytest.mark.parametrize("form", ["few", "one_by_one"])
def test_experts_in_a_gpus_quantised_form_are_the_dequantised_ones(arrays, form):
    router_ED, stacks, y_DM = arrays
    small = [arranged(quantise(stack, "int4", 4), "rows") for stack in stacks]
    expected = _output(form, router_ED, [dense(stack, y_DM) for stack in small], y_DM)
    assert not _differs(_output(form, router_ED, small, y_DM), expected)
    assert _differs(_output(form, router_ED, stacks, y_DM), expected)

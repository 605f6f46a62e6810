"""Routed experts against the definition, token by token, and which experts are skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beagle_jax.model import experts as experts_module
from beagle_jax.model.experts import Experts, routed, shares

D, M, COUNT = 6, 8, 5
EXPERTS = Experts(COUNT, 2, 4, True, (), ("", "", "", ""))


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((COUNT, D), np.float32),
        rng.standard_normal((COUNT, D, D), np.float32),
        rng.standard_normal((D, M), np.float32),
    )


def _by_hand(router_ED, map_EDD, y_DM, experts):
    """Computes one token at a time."""
    out_DM = np.zeros_like(y_DM)
    for m in range(y_DM.shape[1]):
        raw_E = router_ED @ y_DM[:, m]
        share_E = np.exp(raw_E) / np.exp(raw_E).sum()
        chosen = np.argsort(-share_E)[: experts.per_token]
        total = share_E[chosen].sum() if experts.renormalised else 1.0
        for e in chosen:
            out_DM[:, m] += share_E[e] / total * (map_EDD[e] @ y_DM[:, m])
    return out_DM


@pytest.mark.parametrize("renormalised", [True, False])
def test_experts_equal_their_definition(arrays, renormalised):
    router_ED, map_EDD, y_DM = arrays
    experts = dataclasses.replace(EXPERTS, renormalised=renormalised)
    found_DM = routed(
        shares(router_ED, experts, y_DM, M),
        lambda e: jnp.asarray(map_EDD)[e] @ y_DM,
        jnp.asarray(y_DM),
    )
    np.testing.assert_allclose(found_DM, _by_hand(router_ED, map_EDD, y_DM, experts), atol=1e-5)
    with pytest.raises(AssertionError):  # planted: the other rule
        np.testing.assert_allclose(
            found_DM,
            _by_hand(
                router_ED,
                map_EDD,
                y_DM,
                dataclasses.replace(experts, renormalised=not renormalised),
            ),
            atol=1e-5,
        )


def test_padding_columns_ask_for_nothing(arrays):
    router_ED, _, y_DM = arrays
    share_EM = np.array(shares(router_ED, EXPERTS, y_DM, 3))
    assert not share_EM[:, 3:].any()
    np.testing.assert_allclose(share_EM[:, :3].sum(axis=0), 1, atol=1e-6)
    assert ((share_EM[:, :3] > 0).sum(axis=0) == EXPERTS.per_token).all()


def test_an_expert_that_nobody_chose_is_not_run(arrays):
    """That expert's output is NaN: only skipping keeps it out of the sum.

    Planted: running all experts lets it in.
    """
    _, map_EDD, y_DM = arrays
    poisoned = jnp.asarray(map_EDD).at[1].set(jnp.nan)
    share_EM = jnp.zeros((COUNT, M)).at[0].set(0.25).at[3].set(0.75)

    def run(e):
        return poisoned[e] @ y_DM

    assert bool(jnp.isfinite(jax.jit(lambda s: routed(s, run, jnp.asarray(y_DM)))(share_EM)).all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_module.jax.lax, "cond", lambda _, then, otherwise: then())
        assert not bool(jnp.isfinite(routed(share_EM, run, jnp.asarray(y_DM))).all())

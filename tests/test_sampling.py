"""Sampling is lossless: filters, seeds, the joint distribution of four tokens.

The distribution is compared with the exact one (method.md 13.9).
"""

import dataclasses
import itertools
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY
from decode_cases import run, target_of
from transformers import TopKLogitsWarper, TopPLogitsWarper

from beagle_jax.decoding import decoder as decoder_module
from beagle_jax.decoding import session as session_module
from beagle_jax.decoding.accept import accept_by_ratio
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.nodes import Nodes
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.rules import Ratio
from beagle_jax.decoding.sampling import (
    Filters,
    Sampling,
    choose,
    filter_logits,
    filtered,
    filters_of,
    gumbel,
    knobs_of,
)
from beagle_jax.decoding.tree import ROOT_ONLY, chain, dynamic_tree, static_tree
from beagle_jax.evaluation.measure import CompileCounter
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.model.eagle import EagleSpec, init_eagle
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward, logits
from beagle_jax.weights.draft import Draft

VOCABULARY, TOKENS, PROMPT = 16, 4, [3, 1, 4]
SMALL = dataclasses.replace(  # thousands of texts: here running is what takes long
    TINY,
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
)
BATCH, BATCHES = 2048, 10
pytestmark = pytest.mark.usefixtures("short_bucket")
TREES = {
    "chain": chain(3),
    "static": static_tree([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)]),
    "dynamic": dynamic_tree(3, 3, 8),
}
SAMPLINGS = {
    "all": Sampling(1.0),
    "top-p": Sampling(1.3, top_p=0.8),
    "top-k": Sampling(0.7, top_k=5, top_p=0.95),
}


@pytest.fixture
def short_bucket(monkeypatch):
    """Pads prompts to three tokens: with the usual 64, padding would be most of the work."""
    monkeypatch.setattr(session_module, "PROMPT_BUCKET", 4)
    monkeypatch.setattr(session_module, "ADMIT_ROWS", BATCH)
    monkeypatch.setattr(decoder_module, "CAPACITY_BUCKET", 16)


def small_target():
    """Makes a target whose distributions are neither flat nor decided."""
    target = target_of(SMALL)
    return dataclasses.replace(
        target, params={**target.params, "norm_D": 0.5 * target.params["norm_D"]}
    )


def small_draft() -> Draft:
    spec = BeagleSpec.from_target(SMALL, init_std=0.1)
    return Draft(spec, init_draft(spec, jax.random.key(1)), None, {})


@partial(jax.jit, static_argnums=1)
def last_logits(params, spec, text_BL):
    """Returns the logits [B, 4, V] after each of the last four tokens."""
    B, L = text_BL.shape
    positions, mask = jnp.broadcast_to(jnp.arange(L), (B, L)), causal_mask(jnp.full(B, L), L)
    return logits(
        params, spec, forward(params, spec, text_BL, positions, mask).states_BTD[:, -TOKENS:]
    )


@lru_cache
def exact_joint(sampling: Sampling) -> np.ndarray:
    """Computes P(x1..x4

     prompt), [16, 16, 16, 16], by running every text of three tokens.|Filters are written again in
    numpy.
    """
    texts = list(itertools.product(range(VOCABULARY), repeat=TOKENS - 1))
    text_BL = jnp.asarray(
        np.concatenate([np.tile(PROMPT, (len(texts), 1)), texts], axis=1), jnp.int32
    )
    raw_B4V = np.asarray(last_logits(small_target().params, SMALL, text_BL), np.float64)
    raw, joint = raw_B4V.reshape(*(VOCABULARY,) * (TOKENS - 1), TOKENS, VOCABULARY), np.ones(())
    for place in range(TOKENS):  # what comes later changes nothing
        after = raw[(..., *(0,) * (TOKENS - 1 - place), place, slice(None))]
        joint = joint[..., None] * np.apply_along_axis(filter_by_hand, -1, after, sampling)
    return joint


def filter_by_hand(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    p = np.exp((logits_V - logits_V.max()) / sampling.temperature)
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    in_nucleus = np.cumsum(p[order]) - p[order] < sampling.top_p
    p[order[~in_nucleus]] = 0
    return p / p.sum()


def sampled_joint(
    target, draft, tree, sampling: Sampling, rule="match", batches=BATCHES, **parts
) -> np.ndarray:
    """Samples as arrays: an Answer for each draw would take longer than the draw."""
    decoder = SpeculativeDecoder(target, draft, tree, rule=rule).with_(**parts)
    counts = np.zeros((VOCABULARY,) * TOKENS)
    for number in range(batches):
        now, state = decoder.prefilled(
            [PROMPT] * BATCH, sampling, max_new_tokens=TOKENS, seed=number * BATCH
        )
        drawn = jax.device_get(run(now, state, TOKENS)[1])
        assert (drawn.count_B == TOKENS).all()
        np.add.at(counts, tuple(drawn.out_BS[:, :TOKENS].T), 1)
    return counts / counts.sum()


def check_distribution(
    tree,
    sampling: Sampling,
    rule="match",
    draft: Draft | None = None,
    batches: int = BATCHES,
    **parts,
) -> None:
    """Checks the total variation distance from the exact distribution.

    It must be below the average of an honest sample of this size, plus a fifth.
    """
    exact, sampled = (
        exact_joint(sampling),
        sampled_joint(
            small_target(), draft or small_draft(), tree, sampling, rule, batches, **parts
        ),
    )
    # An empirical share of N draws is off by sqrt(2 p (1 - p) / (pi N)) on average where N p is
    # large, and never by more than 2 p where it is small. 20,480 draws; the spread of the sum over
    # all outcomes is some percent of it.
    honest = (
        0.5
        * np.minimum(np.sqrt(2 * exact * (1 - exact) / (np.pi * BATCH * batches)), 2 * exact).sum()
    )
    assert 0.5 * np.abs(sampled - exact).sum() < 1.2 * honest
    # Margins of the first and the last place are far sharper.
    for places in ((1, 2, 3), (0, 1, 2)):
        assert 0.5 * np.abs(sampled.sum(axis=places) - exact.sum(axis=places)).sum() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["dynamic"])
def test_joint_distribution_of_four_tokens(tree):
    """Filters act on the target's logits before any tree, so each is tested with one tree."""
    check_distribution(TREES[tree], SAMPLINGS["top-p"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tree", "sampling"),
    [
        *itertools.product(TREES, ["all"]),
        ("static", "top-k"),
        ("chain", "top-p"),
        ("static", "top-p"),
    ],
)
def test_joint_distribution_of_the_other_trees_and_filters(tree, sampling):
    check_distribution(TREES[tree], SAMPLINGS[sampling])


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["all", "top-k"])
def test_joint_distribution_under_the_ratio_rule(sampling):
    """This rule filters the draft's logits too; the case called top-k has a top-p as well."""
    check_distribution(TREES["chain"], SAMPLINGS[sampling], "ratio")


# Two tokens at each place are so few outcomes that a fifth of the draws shows a fault.
TWO = Sampling(0.7, top_k=2, top_p=0.95)


def test_joint_distribution_of_two_tokens_under_the_ratio_rule():
    check_distribution(TREES["chain"], TWO, "ratio", batches=2)


def test_planted_bug_in_the_distribution_of_two_tokens():
    def wrong(now, *rest):
        return AboveOnly().accept(now, *rest)

    with pytest.raises(AssertionError):
        check_distribution(TREES["chain"], TWO, "ratio", batches=2, accept=wrong)


@pytest.mark.slow
def test_joint_distribution_of_drafts_that_an_eagle_draft_drew():
    spec = EagleSpec.from_target(SMALL, init_std=0.1)
    check_distribution(
        TREES["chain"],
        SAMPLINGS["all"],
        "ratio",
        draft=Draft(spec, init_eagle(spec, jax.random.key(1)), None, {}),
    )


class AboveOnly(Ratio):
    """Planted: accepts only where p exceeds q."""

    def uniform(self, key_BP):
        return jnp.ones_like(super().uniform(key_BP))


def test_planted_bug_accepts_where_p_exceeds_q_only():
    def wrong(now, *rest):
        return AboveOnly().accept(now, *rest)

    with pytest.raises(AssertionError):
        check_distribution(TREES["chain"], SAMPLINGS["all"], "ratio", accept=wrong)


def test_planted_bug_every_place_draws_with_the_same_noise():
    def wrong(now, key_B, place_BT, purpose):
        return Round.keys(now, key_B, jnp.zeros_like(place_BT), purpose)

    with pytest.raises(AssertionError):
        check_distribution(TREES["dynamic"], SAMPLINGS["all"], keys=wrong)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_seed_writes_the_same_text_with_any_tree_and_with_none(tree):
    target, sampling = small_target(), Sampling(0.9, top_p=0.9)

    def ask(decoder, seed):
        return [
            answer.tokens
            for answer in decoder.generate(
                [[5], [6, 7], [5]], sampling, max_new_tokens=40, seed=seed
            )
        ]

    plain, fast = (
        SpeculativeDecoder(target, None, ROOT_ONLY),
        SpeculativeDecoder(target, small_draft(), tree),
    )
    first, other = ask(plain, 1), ask(plain, 2)
    assert ask(fast, 1) == ask(fast, 1) == first != other
    assert first[0] != first[2]  # the same prompt, another seed


def test_a_seed_repeats_under_the_ratio_rule():
    decoder = SpeculativeDecoder(small_target(), small_draft(), chain(3), rule="ratio")

    def ask(seed):
        return [
            a.tokens
            for a in decoder.generate([[5], [6, 7]], Sampling(1.0), max_new_tokens=40, seed=seed)
        ]

    assert ask(1) == ask(1) == ask(1 + 2**32) != ask(2)  # any whole number will do
    assert ask(-1) == ask(-1)


def test_another_setting_compiles_nothing():
    """Seeds, temperatures and filters are data, also per prompt.

    Only whether there are filters is static.
    """
    decoder = SpeculativeDecoder(small_target(), small_draft(), TREES["static"])

    def ask(sampling, seed):
        return decoder.generate([[5], [6, 7]], sampling, max_new_tokens=8, seed=seed)

    ask(Sampling(0.7, 5, 0.95), 1)
    with CompileCounter() as counter:
        written = [
            ask(Sampling(temperature, top_k, top_p), seed)[0].tokens
            for temperature, top_k, top_p, seed in (
                (0.7, 5, 0.95, 2),
                (1.9, 5, 0.95, 1),
                (0.7, 9, 0.95, 1),
                (0.7, 5, 0.3, 1),
            )
        ]
    assert counter.count == 0 and len(set(map(tuple, written))) == 4
    with CompileCounter() as counter:
        ask(Sampling(0.7), 1)
    assert counter.count > 0


def test_each_row_is_filtered_by_its_own_settings():
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 100)).astype(np.float32) * 3)
    settings = [
        Sampling(0.7, 5, 0.9),
        Sampling(1.0),
        Sampling(0.3, top_p=0.5),
        Sampling(2.0, 70),
        Sampling(0.0),
    ]
    logits = filter_logits(raw, knobs_of(settings), filters_of(settings))
    for row, sampling in enumerate(settings[:4]):
        alone = filtered(raw[row], sampling)
        np.testing.assert_allclose(logits[row], alone, rtol=1e-6)
    key_BT = jax.random.split(jax.random.key(0), (5, 2))
    chosen = choose(raw, key_BT, knobs_of(settings), filters_of(settings))
    assert chosen[4].tolist() == raw[4].argmax(axis=-1).tolist()  # a greedy row draws nothing
    assert chosen[1].tolist() == (raw[1] + gumbel(key_BT, 100)[1]).argmax(axis=-1).tolist()


def test_ratio_rule_rejects_what_the_target_never_writes():
    """A uniform draw of exactly 0 must not accept a token of probability 0."""
    nodes = Nodes(
        jnp.array([[0, 2]]),
        jnp.zeros((1, 2), jnp.int32),
        jnp.array([[0, 1]]),
        jnp.tril(jnp.ones((1, 2, 2), bool)),
        jnp.zeros((1, 2)),
    )
    target_BWV = jnp.log(jnp.array([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]))
    draft_BPV = jnp.log(jnp.array([[[0.1, 0.1, 0.8]]]))
    accepted = accept_by_ratio(
        nodes, target_BWV, draft_BPV, jnp.zeros((1, 1)), jnp.zeros((1, 2, 3))
    )
    assert accepted.count_B[0] == 0 and accepted.bonus_B[0] in (0, 1)


@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_filters_are_those_of_transformers(top_k, top_p):
    raw = np.random.default_rng(0).normal(size=(6, 100)).astype(np.float32) * 3
    probabilities = np.asarray(filtered(jnp.asarray(raw), Sampling(0.7, top_k, top_p)))
    np.testing.assert_allclose(probabilities, _by_transformers(raw, top_k, top_p), rtol=1e-6)


def test_planted_bug_top_p_before_top_k():
    raw = np.random.default_rng(0).normal(size=(6, 100)).astype(np.float32)
    probabilities = np.asarray(
        filtered(filtered(jnp.asarray(raw), Sampling(0.7, top_p=0.3)) * 0.7, Sampling(0.7, top_k=5))
    )
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(probabilities, _by_transformers(raw, 5, 0.3), rtol=1e-6)


def _by_transformers(raw: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    expected = torch.from_numpy(raw) / 0.7
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    return expected.numpy()


@pytest.mark.parametrize("unset", [True, False])
def test_filters_that_no_request_sets_change_nothing(unset):
    """A server's one program for all filters gives what the program without them gives."""
    logits_BTV = 3 * jax.random.normal(jax.random.key(0), (3, 2, 500))
    key_BT = jax.random.split(jax.random.key(1), (3, 2))
    settings = [Sampling(0.8), Sampling(), Sampling(1.3, 0 if unset else 2)]
    knobs, needed = knobs_of(settings), filters_of(settings)
    every = Filters(drawn=True, top_k=True, top_p=True, min_p=True)
    for filters in (needed, every):
        kept_BTV = filter_logits(logits_BTV, knobs, filters)
        assert bool(jnp.isfinite(kept_BTV[:2]).all())
        assert int(jnp.isfinite(kept_BTV[2]).sum()) == (1000 if unset else 4)
    np.testing.assert_array_equal(
        choose(logits_BTV, key_BT, knobs, needed), choose(logits_BTV, key_BT, knobs, every)
    )

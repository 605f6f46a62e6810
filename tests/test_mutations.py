"""Bugs that decoding engines have shipped, planted one by one.

The equality tests or the cache tests must see each of them.
"""

import dataclasses
from functools import lru_cache

import jax.numpy as jnp
import pytest
from conftest import TINY
from decode_cases import (
    MARKOV,
    cache_one_row_too_long,
    naive_greedy,
    random_draft,
    right_draft,
    target_of,
)
from test_draft_cache import compare_caches

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.tree import chain, dynamic_tree, static_tree

TREES = {
    "chain": chain(3),
    "static": static_tree([(0,), (1,), (0, 0), (0, 1), (1, 0)]),
    "dynamic": dynamic_tree(3, 3, 9),
}
PROMPTS = [[5], [7, 8, 9], list(range(40))]


@lru_cache
def _expected(spec) -> list[list[int]]:
    return [naive_greedy(target_of(spec), prompt, 24) for prompt in PROMPTS]


def _check_lossless(tree, specs=(TINY, MARKOV), **parts) -> None:
    """specs: TINY with drafts that are mostly wrong, MARKOV with mostly right ones.

    parts: planted parts of a round.
    """
    for spec in specs:
        draft = random_draft() if spec == TINY else right_draft(0.02)
        decoder = SpeculativeDecoder(target_of(spec), draft, tree).with_(**parts)
        answers = decoder.generate(PROMPTS, max_new_tokens=24)
        assert [answer.tokens for answer in answers] == _expected(spec)


def _bonus_of_the_root(now, state, proposal, states_BWD):
    accepted, finite_BW = Round.accept(now, state, proposal, states_BWD)
    wanted_B1, _ = now.choose(state.requests, states_BWD[:, :1], state.transcript.count_B[:, None])
    last_BP = jnp.arange(now.tree.depth + 1)[None] == accepted.count_B[:, None]
    token_BP1 = jnp.where(last_BP, wanted_B1, accepted.token_BP1)
    return accepted._replace(bonus_B=wanted_B1[:, 0], token_BP1=token_BP1), finite_BW


def _one_path_too_long(now, state, proposal, states_BWD):
    accepted, finite_BW = Round.accept(now, state, proposal, states_BWD)
    count_B = jnp.minimum(accepted.count_B + 1, now.tree.depth)
    return accepted._replace(count_B=count_B), finite_BW


def on(*names: str):
    """Runs a check with these kinds of tree.

    All kinds for what must hold; for a bug one or two that can show it.
    """
    return pytest.mark.parametrize("tree", [TREES[name] for name in names], ids=names)


@on(*TREES)
def test_no_bug_planted(tree):
    _check_lossless(tree)


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("static", _bonus_of_the_root),
        ("dynamic", _bonus_of_the_root),
        ("chain", _one_path_too_long),
    ],
)
def test_wrong_acceptance(name, bug):
    with pytest.raises(AssertionError):
        _check_lossless(TREES[name], [MARKOV], accept=bug)


def _reading(change):
    """Makes a round that reads other nodes than were drafted."""
    return lambda now, state, nodes: Round.read(now, state, change(nodes))


@on("chain", "dynamic")
def test_verify_mask_sees_siblings(tree):
    """Every node sees all nodes: the later ones in a chain, in a tree its siblings too."""
    everything = _reading(lambda nodes: nodes._replace(above_BWW=jnp.ones_like(nodes.above_BWW)))
    with pytest.raises(AssertionError):
        _check_lossless(tree, read=everything)


@on("static")
def test_verify_positions_off_by_one(tree):
    late = _reading(lambda nodes: nodes._replace(depth_BW=nodes.depth_BW + 1))
    with pytest.raises(AssertionError):
        _check_lossless(tree, read=late)


@on("chain")
def test_cache_kept_one_row_too_long(tree):
    with pytest.raises(AssertionError):
        _check_lossless(tree, emit=cache_one_row_too_long)


@on("dynamic")
def test_predicted_states_left_in_the_draft_cache(tree):
    """The output stays right and acceptance falls: only the cache test shows it."""

    def wrong(now, state, accepted, output):
        output = dataclasses.replace(output, states_BTD=1.1 * output.states_BTD)
        return Round.append(now, state, accepted, output)

    _check_lossless(tree, [TINY], append=wrong)
    with pytest.raises(AssertionError):
        compare_caches(TINY, random_draft(), tree, append=wrong)


@on("static")
def test_verify_mask_without_the_diagonal(tree):
    """The draft's mask (strict ancestors) replaces the target's (ancestors or self)."""
    itself_WW = jnp.eye(tree.size, dtype=bool)
    strict = _reading(lambda nodes: nodes._replace(above_BWW=nodes.above_BWW & ~itself_WW[None]))
    with pytest.raises(AssertionError):
        _check_lossless(tree, read=strict)

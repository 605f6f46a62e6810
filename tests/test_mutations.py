"""Bugs that decoding engines have shipped, planted one by one: the equality and cache tests must
see each of them.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY
from decode_cases import (
    MARKOV,
    NEVER,
    naive_greedy,
    next_stop,
    random_draft,
    right_draft,
    target_of,
)
from test_draft_cache import compare_caches

from beagle_jax.decoding import loop
from beagle_jax.decoding.decoder import SpeculativeDecoder
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


def _check_lossless(tree, eos_ids=NEVER, specs=(TINY, MARKOV)) -> None:
    """specs: with drafts that are mostly wrong for TINY, and mostly right for MARKOV."""
    for spec in specs:
        draft = random_draft() if spec == TINY else right_draft(0.02)
        answers = SpeculativeDecoder(target_of(spec, eos_ids), draft, tree).generate(
            PROMPTS, max_new_tokens=24
        )
        assert [answer.tokens for answer in answers] == _expected(spec)


def _bonus_of_the_root(nodes, wanted_BW, depth, right):
    found = right(nodes, wanted_BW, depth)
    bonus_B = wanted_BW[:, 0]
    last_BP = jnp.arange(depth + 1)[None] == found.count_B[:, None]
    return found._replace(
        bonus_B=bonus_B, token_BP1=jnp.where(last_BP, bonus_B[:, None], found.token_BP1)
    )


def _one_path_too_long(nodes, wanted_BW, depth, right):
    found = right(nodes, wanted_BW, depth)
    return found._replace(count_B=jnp.minimum(found.count_B + 1, depth))


def on(*names: str):
    """The kinds of tree that a check runs with: all for what must hold, and for a bug one or two
    where it can show.
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
def test_wrong_acceptance(name, bug, monkeypatch):
    right = loop.accept_matching
    monkeypatch.setattr(loop, "accept_matching", lambda *arguments: bug(*arguments, right))
    with pytest.raises(AssertionError):
        _check_lossless(TREES[name], next_stop(), [MARKOV])


@on("chain", "dynamic")
def test_verify_mask_sees_siblings(tree, monkeypatch):
    """Every node sees all nodes of the tree: in a chain the later ones, in a tree its siblings
    too.
    """
    right = loop.forward

    def everything(*a):
        return (
            right(*a[:4], jnp.ones_like(a[4]), *a[5:]) if a[2].shape[1] == tree.size else right(*a)
        )

    monkeypatch.setattr(loop, "forward", everything)
    with pytest.raises(AssertionError):
        _check_lossless(tree, next_stop())


@on("static")
def test_verify_positions_off_by_one(tree, monkeypatch):
    right = loop.forward
    monkeypatch.setattr(
        loop, "forward", lambda *a: right(*a[:3], a[3] + (a[2].shape[1] == tree.size), *a[4:])
    )
    with pytest.raises(AssertionError):
        _check_lossless(tree, next_stop())


@on("chain")
def test_cache_kept_one_row_too_long(tree, monkeypatch):
    right = loop._emit
    monkeypatch.setattr(
        loop,
        "_emit",
        lambda now, *rest: (after := right(now, *rest))._replace(
            length_B=after.length_B + (after.rounds_B == 1)
        ),
    )
    with pytest.raises(AssertionError):
        _check_lossless(tree, next_stop())


@on("dynamic")
def test_predicted_states_left_in_the_draft_cache(tree, monkeypatch):
    """The output stays right, acceptance decays: only the cache test can see it."""
    right = loop.write_rows

    def wrong(cache, rows, start_B):
        return right(cache, jax.tree.map(lambda x: 1.1 * x, rows), start_B)

    monkeypatch.setattr(loop, "write_rows", wrong)
    _check_lossless(tree, next_stop(), [TINY])
    with pytest.raises(AssertionError):
        compare_caches(TINY, random_draft(), tree, eos_ids=next_stop())


@on("static")
def test_verify_mask_without_the_diagonal(tree, monkeypatch):
    """The draft's mask (strict ancestors) in the place of the target's (ancestors or self)."""
    right = loop.forward

    def strict(*a):
        return (
            right(*a[:4], a[4] & ~jnp.eye(tree.size, dtype=bool)[None], *a[5:])
            if a[2].shape[1] == tree.size
            else right(*a)
        )

    monkeypatch.setattr(loop, "forward", strict)
    with pytest.raises(AssertionError):
        _check_lossless(tree, next_stop())

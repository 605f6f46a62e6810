"""Looked-up nodes beside a draft's tree: the same text in fewer rounds, by the same rule."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import (
    MARKOV,
    naive_greedy,
    next_stop,
    random_draft,
    random_eagle,
    right_draft,
    target_of,
)

from beagle_jax.config import DecodeConfig
from beagle_jax.decoding import lookup
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.lookup import Lookup, beside
from beagle_jax.decoding.nodes import chain_nodes
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.tree import (
    ROOT_ONLY,
    LookupTree,
    chain,
    dynamic_tree,
    static_tree,
    tree_of,
)
from beagle_jax.errors import UserError
from beagle_jax.evaluation.forced import forced_states
from beagle_jax.evaluation.replay import replayed

DRAWN = Sampling(0.5, top_k=10, repetition_penalty=1.1)
RAGGED = static_tree([(0,), (1,), (0, 0)])
# The next token depends on the last one alone, so a greedy answer soon repeats itself.
PROMPTS = [[5], [7, 8, 9], [3, 1, 4, 1, 5, 9, 2, 6]]


def answers(draft, tree, sampling=GREEDY, **target):
    decoder = SpeculativeDecoder(target_of(MARKOV, **target), draft, tree, context=128)
    return decoder.generate(PROMPTS, sampling, max_new_tokens=40, batch=2)


@pytest.mark.parametrize(
    ("draft", "grown", "sampling"),
    [
        (random_draft, dynamic_tree(2, 2, 5), GREEDY),
        (random_eagle, RAGGED, GREEDY),
        (random_draft, chain(2), DRAWN),
        (None, ROOT_ONLY, GREEDY),
    ],
    ids=["dynamic", "eagle static", "chain drawn", "alone"],
)
def test_the_text_is_that_of_plain_decoding_in_fewer_rounds(draft, grown, sampling):
    made = draft and draft()
    plain = answers(None, ROOT_ONLY, sampling)
    without, with_them = (
        answers(made, tree, sampling) for tree in (grown, LookupTree(grown, 3, 3))
    )
    for made in (without, with_them):
        assert [answer.tokens for answer in made] == [answer.tokens for answer in plain]
    rounds = [sum(answer.rounds for answer in made) for made in (without, with_them)]
    assert rounds[1] < rounds[0] - 5


def check_rounds(eos_ids) -> None:
    """The rounds that were run are those that follow from the text, by independent code."""
    target, draft = target_of(MARKOV, eos_ids), right_draft(0.05)
    tree = LookupTree(RAGGED, 4, 2)
    decoder = SpeculativeDecoder(target, draft, tree, context=128)
    prompt = [5, 7, 5, 7, 5]
    [answer] = decoder.generate([prompt], max_new_tokens=40)
    assert answer.tokens == naive_greedy(target, prompt, 40)
    states_LD = forced_states(target, [*prompt, *answer.tokens])
    accepted = replayed(target, draft, tree, prompt, answer.tokens, states_LD, True)
    assert np.bincount(accepted, minlength=tree.depth + 1).tolist() == answer.accepted
    assert answer.accepted[4] and sum(answer.accepted[:4])


def test_its_rounds_are_those_that_independent_code_finds():
    check_rounds(next_stop())


def test_planted_bug_the_chain_begins_one_token_early(monkeypatch):
    right = lookup.lookup_chain
    monkeypatch.setattr(
        lookup,
        "lookup_chain",
        lambda text_BS, length_B, ngram, depth: right(text_BS, length_B - 1, ngram, depth),
    )
    with pytest.raises(AssertionError):
        check_rounds(next_stop())


def test_planted_bug_the_chain_begins_with_a_token_that_nobody_checks(monkeypatch):
    right = lookup.beside

    def wrong(tree, chain):
        nodes = right(tree, chain)
        W = tree.token_BW.shape[1]
        return nodes._replace(above_BWW=nodes.above_BWW.at[:, W, W].set(False))

    monkeypatch.setattr(lookup, "beside", wrong)
    with pytest.raises(AssertionError):
        check_rounds(next_stop())


def test_the_chain_is_a_branch_of_the_root():
    tree, looked_up = chain_nodes(jnp.array([[9, 1, 2]])), chain_nodes(jnp.array([[9, 1, 3]]))
    nodes = beside(tree, looked_up)
    assert nodes.token_BW.tolist() == [[9, 1, 2, 1, 3]]
    assert nodes.parent_BW.tolist() == [[0, 0, 1, 0, 3]]
    assert nodes.depth_BW.tolist() == [[0, 1, 2, 1, 2]]
    assert nodes.above_BWW[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 1, 1],
    ]


def test_where_it_is_set_and_where_it_means_nothing():
    tree = tree_of(DecodeConfig(lookup_nodes=3, ngram=2))
    assert tree == LookupTree(chain(5), 3, 2) and str(tree) == "chain of 5, 3 looked up"
    assert (tree.size, tree.depth) == (9, 5)
    with pytest.raises(UserError, match="looked-up tokens have no probabilities, which rule 'rat"):
        SpeculativeDecoder(target_of(), random_draft(), tree, rule="ratio")
    with pytest.raises(UserError, match="without probabilities, but got a chain of 5, 3 looked up"):
        SpeculativeDecoder(target_of(), Lookup(), tree)
    wide = dataclasses.replace(TINY, hidden_size=64, head_dim=16)
    with pytest.raises(UserError, match="this draft belongs to another target"):
        SpeculativeDecoder(target_of(wide), random_draft(), tree)

"""Pieces say how their tokens came: accepted drafts of each round, and the last drafted tree."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from decode_cases import MARKOV, random_draft, right_draft, target_of

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.programs import filters_for
from beagle_jax.decoding.requests import Request
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.tree import chain, dynamic_tree

SAMPLED = Sampling(0.9)


def pieces_of(decoder, requests, rounds_per_look=1) -> list[list]:
    """The pieces of each request, in two rows, with trees."""
    filters = filters_for(requests, ())._replace(drafted=decoder.tree.size)
    source = iter([decoder.checked(request) for request in requests])
    session = decoder.live(source, 2, filters, rounds_per_look=rounds_per_look)
    pieces: list[list] = [[] for _ in requests]
    for piece in session:
        pieces[piece.index].append(piece)
    return pieces


def check_trees(pieces) -> int:
    """Checks each tree against the tokens of its round; returns the number of trees."""
    trees, last = 0, None  # the token before the piece
    for piece in pieces:
        if piece.drafted is not None:
            tree = piece.drafted
            path = [node for node, accepted in enumerate(tree.accepted) if accepted]
            assert tree.parents[0] == 0 and path[0] == 0 and tree.tokens[0] == last
            assert [tree.parents[node] for node in path[1:]] == path[:-1]
            written = [tree.tokens[node] for node in path[1:]]
            assert piece.tokens[: len(written)] == written[: len(piece.tokens)]
            trees += 1
        last = piece.tokens[-1] if piece.tokens else last
    return trees


@pytest.mark.parametrize(
    ("tree", "rule", "sampling"),
    [
        (chain(3), "match", Sampling()),
        (dynamic_tree(2, 2, 5), "match", Sampling()),
        (dynamic_tree(2, 2, 5), "match", SAMPLED),
        (chain(2), "ratio", SAMPLED),
    ],
)
def test_pieces_hold_the_rounds_of_their_answer(tree, rule, sampling):
    decoder = SpeculativeDecoder(target_of(MARKOV), right_draft(0.02), tree, context=128, rule=rule)
    requests = [Request([5 + n], 20 + n, sampling, seed=n) for n in range(4)]
    for pieces in pieces_of(decoder, requests):
        answer = pieces[-1].answer
        accepted = [drafts for piece in pieces for drafts in piece.accepted]
        assert np.bincount(accepted, minlength=tree.depth + 1).tolist() == answer.accepted
        assert len(accepted) == answer.rounds and sum(accepted) > 0
        assert check_trees(pieces) == answer.rounds
    plain = pieces_of(decoder, requests, rounds_per_look=8)
    assert [pieces[-1].answer for pieces in plain] == [
        pieces[-1].answer for pieces in pieces_of(decoder, requests)
    ]


def test_a_tree_of_another_round_is_seen():
    """Planted: each piece holds the tree of the piece before."""
    decoder = SpeculativeDecoder(target_of(MARKOV), right_draft(0.02), chain(2), context=128)
    [pieces] = pieces_of(decoder, [Request([5], 20)])
    shifted = [
        replace(piece, drafted=before.drafted) for before, piece in itertools.pairwise(pieces)
    ]
    with pytest.raises(AssertionError):
        check_trees(shifted)


def test_without_drafts_or_trees_pieces_hold_neither():
    decoder = SpeculativeDecoder(target_of(), random_draft(), chain(2), context=128)
    for plain, most in ((True, 0), (False, 2)):
        request = Request([5], 8, draft=not plain)
        filters = filters_for([request], ())
        pieces = list(decoder.live(iter([request]), 1, filters))
        assert all(piece.drafted is None for piece in pieces)
        assert max(max(piece.accepted, default=0) for piece in pieces) <= most

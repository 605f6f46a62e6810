"""Trees as constants: sizes, masks, paths and error messages."""

import numpy as np
import pytest

from beagle_jax.config import DecodeConfig
from beagle_jax.decoding.tree import EAGLE_PATHS, ROOT_ONLY, Tree, chain, static_tree, tree_of
from beagle_jax.errors import UserError

RAGGED = [(0,), (3,), (3, 1), (3, 1, 0), (3, 1, 2), (1,)]


def test_worked_example_of_the_docstring():
    tree = static_tree([(0,), (1,), (0, 0)])
    assert (tree.size, tree.depth) == (4, 2)
    assert tree.parent_W.tolist() == [0, 0, 0, 1]
    assert tree.depth_W.tolist() == [0, 1, 1, 2]
    assert tree.rank_W.tolist() == [0, 0, 1, 0]
    verify = tree.ancestors_or_self_WW
    assert verify.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert (verify & ~np.eye(4, dtype=bool)).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert tree.path_WP1.tolist() == [[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 1, 3]]
    assert [tree.inner_nodes(depth).tolist() for depth in (0, 1)] == [[0], [1]]
    assert [tree.children(depth).tolist() for depth in (0, 1)] == [[1, 2], [3]]


def test_eagle_tree_has_the_published_sizes():
    tree = static_tree(EAGLE_PATHS)
    assert (tree.size, tree.depth) == (26, 5)
    assert np.bincount(tree.depth_W).tolist() == [1, 4, 8, 8, 3, 2]


def _check_against_walking_up(tree: Tree) -> None:
    """Masks and paths equal those found by following parents to the root."""
    for node in range(tree.size):
        upward = [node]
        while upward[-1]:
            assert tree.parent_W[upward[-1]] < upward[-1]
            upward.append(int(tree.parent_W[upward[-1]]))
        path = upward[::-1]
        assert tree.depth_W[node] == len(path) - 1
        assert np.flatnonzero(tree.ancestors_or_self_WW[node]).tolist() == sorted(path)
        assert tree.path_WP1[node].tolist() == path + [node] * (tree.depth + 1 - len(path))
    parents = [tree.inner_nodes(depth).tolist() for depth in range(tree.depth)]
    assert sum(parents, []) == sorted(set(tree.parent_W[1:].tolist()))


@pytest.mark.parametrize("tree", [ROOT_ONLY, chain(1), chain(5), static_tree(EAGLE_PATHS), static_tree(RAGGED)])
def test_ancestors_and_paths_of_every_node(tree):
    _check_against_walking_up(tree)


def test_planted_bug_a_node_hangs_under_its_uncle():
    tree = static_tree(RAGGED)
    wrong = tree.parent_W.copy()
    wrong[tree.depth_W == 2] -= 1
    tree.__dict__["parent_W"] = wrong
    with pytest.raises(AssertionError):
        _check_against_walking_up(tree)


def test_siblings_have_different_ranks():
    tree = static_tree(EAGLE_PATHS)
    assert len({(parent, rank) for parent, rank in zip(tree.parent_W[1:], tree.rank_W[1:])}) == tree.size - 1


def test_order_of_the_given_paths_does_not_matter():
    assert static_tree(RAGGED) == static_tree(RAGGED[::-1])
    assert hash(static_tree(RAGGED)) == hash(static_tree([list(path) for path in RAGGED]))


def test_chain_and_root():
    assert chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert chain(3).parent_W.tolist() == [0, 0, 1, 2]
    assert (chain(0), ROOT_ONLY.size, ROOT_ONLY.depth) == (ROOT_ONLY, 1, 0)


def test_tree_of_config():
    assert tree_of(DecodeConfig(levels=4)) == chain(4)
    assert tree_of(DecodeConfig(tree="static")) == static_tree(EAGLE_PATHS)
    assert tree_of(DecodeConfig(tree="static", paths=((0,), (0, 1)))).size == 3


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (0,)], "repeated or an empty path"),
        ([()], "repeated or an empty path"),
        ([(0,), (1, 0)], r"\[1, 0\] hangs in the air; its parent \[1\] is not in the list"),
        ([(-1,)], "negative rank"),
    ],
)
def test_bad_paths(paths, message):
    with pytest.raises(UserError, match=message):
        static_tree(paths)

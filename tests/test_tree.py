"""Trees as constants: sizes, masks, paths and error messages."""

import numpy as np
import pytest

from beagle_jax.config import DecodeConfig
from beagle_jax.decoding.tree import EAGLE_PATHS, ROOT_ONLY, chain, static_tree, tree_of
from beagle_jax.errors import UserError


def test_worked_example_of_the_docstring():
    tree = static_tree([(0,), (1,), (0, 0)])
    assert (tree.size, tree.depth) == (4, 2)
    assert tree.parent_W.tolist() == [0, 0, 0, 1]
    assert tree.depth_W.tolist() == [0, 1, 1, 2]
    assert tree.rank_W.tolist() == [0, 0, 1, 0]
    assert tree.ancestors_or_self_WW.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert tree.path_WP1.tolist() == [[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 1, 3]]
    assert [tree.inner_nodes(depth).tolist() for depth in (0, 1)] == [[0], [1]]


def test_eagle_tree():
    tree = static_tree(EAGLE_PATHS)
    assert (tree.size, tree.depth) == (26, 5)
    assert np.bincount(tree.depth_W).tolist() == [1, 4, 8, 8, 3, 2]
    mask = tree.ancestors_or_self_WW
    for node in range(1, tree.size):
        assert tree.parent_W[node] < node
        expected = mask[tree.parent_W[node]].copy()
        expected[node] = True
        np.testing.assert_array_equal(mask[node], expected)


def test_chain_and_root():
    assert chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert (ROOT_ONLY.size, ROOT_ONLY.depth) == (1, 0)


def test_tree_of_config():
    assert tree_of(DecodeConfig(levels=4)) == chain(4)
    assert tree_of(DecodeConfig(tree="static")) == static_tree(EAGLE_PATHS)
    assert tree_of(DecodeConfig(tree="static", paths=((0,), (0, 1)))) .size == 3


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

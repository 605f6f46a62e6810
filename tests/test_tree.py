"""Trees: shapes, drafted trees against slow oracles, masks, error messages (method.md 13.8)."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import random_draft, target_of
from tree_oracle import PathOracle, eagle2_paths, static_paths

from beagle_jax.config import DecodeConfig
from beagle_jax.decoding import draft as drafting
from beagle_jax.decoding.draft import grow
from beagle_jax.decoding.drafter import Known
from beagle_jax.decoding.trained import BeagleDrafter, DraftHead
from beagle_jax.decoding.tree import (
    EAGLE_PATHS,
    ROOT_ONLY,
    chain,
    dynamic_tree,
    static_tree,
    tree_of,
)
from beagle_jax.errors import UserError
from beagle_jax.model.beagle import BeagleBlock
from beagle_jax.model.cache import empty_rows, write_rows

RAGGED = [(0,), (3,), (3, 1), (3, 1, 0), (3, 1, 2), (1,)]
TREES = {
    "chain": chain(4),
    "eagle": static_tree(EAGLE_PATHS),
    "ragged": static_tree(RAGGED),
    "small": dynamic_tree(2, 2, 4),
    "deep": dynamic_tree(5, 3, 12),
    "all": dynamic_tree(3, 4, 37),
}
ROOT, LENGTHS = 7, (5, 9)


@partial(jax.jit, static_argnums=0)
def _cached(spec, params, states_BLD):
    rows = (
        BeagleBlock(spec)
        .bind({"params": params})
        .keys_values(states_BLD, jnp.broadcast_to(jnp.arange(10), (2, 10)))
    )
    return write_rows(
        empty_rows(2, spec.num_kv_heads, 16, spec.head_dim, jnp.float32),
        rows,
        jnp.zeros(2, jnp.int32),
    )


def _grown(tree):
    """Returns the tree drafted for two sequences at once, and what the oracle needs for each."""
    target, draft = target_of(), random_draft()
    embed_VD = target.params["embed_VD"]
    states_BLD = jax.random.normal(jax.random.key(3), (2, 10, TINY.hidden_size))
    cache = _cached(draft.spec, draft.params, states_BLD)
    drafter = BeagleDrafter(draft.spec, draft.params, embed_VD, DraftHead(embed_VD, None))
    known = Known(jnp.array([ROOT, ROOT]), jnp.array(LENGTHS))
    # A function of its own for each call, so that a plant in the module is traced and not taken
    # from jit's memory.
    grown = jax.jit(lambda *rest: grow(*rest, tree))
    nodes = jax.device_get(grown(drafter, cache, known).nodes)
    oracles = [
        PathOracle(draft, embed_VD, embed_VD, states_BLD[line], length, ROOT, tree.depth)
        for line, length in enumerate(LENGTHS)
    ]
    return nodes, oracles


def _check_nodes(tree) -> None:
    """Checks the nodes against the oracle's paths: parents come first, the mask follows them."""
    nodes, oracles = _grown(tree)
    for line, oracle in enumerate(oracles):
        token_W, parent_W, depth_W = (np.asarray(x[line]) for x in nodes[:3])
        paths = [()]
        for node in range(1, tree.size):
            assert parent_W[node] < node
            paths.append((*paths[parent_W[node]], int(token_W[node])))
            upward = [node]
            while upward[-1]:
                upward.append(int(parent_W[upward[-1]]))
            assert depth_W[node] == len(paths[node]) == len(upward) - 1
            assert np.flatnonzero(nodes.above_BWW[line, node]).tolist() == sorted(upward)
        assert parent_W[0] == depth_W[0] == 0 and np.flatnonzero(
            nodes.above_BWW[line, 0]
        ).tolist() == [0]
        assert len(set(paths)) == tree.size
        wanted = (
            static_paths(oracle, tree.paths)
            if not tree.scored
            else eagle2_paths(oracle, tree.levels, tree.topk, tree.nodes)
        )
        assert set(paths[1:]) == wanted


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_drafting_grows_the_tree_of_the_oracle(tree):
    _check_nodes(tree)


@pytest.mark.parametrize("name", ["ragged", "deep"])
def test_planted_bug_siblings_in_another_order(name, monkeypatch):
    right = drafting._best_children

    def swapped(tree, level, *rest):
        index_BA, score_BA = right(tree, level, *rest)

        def per_query(x_BA):
            return x_BA.reshape(*level.score_BT.shape, -1)[..., ::-1].reshape(x_BA.shape)

        return per_query(index_BA), score_BA

    monkeypatch.setattr(drafting, "_best_children", swapped)
    with pytest.raises(AssertionError):
        _check_nodes(TREES[name])


@pytest.mark.parametrize("name", ["eagle", "deep"])
def test_planted_bug_mask_with_the_diagonal_of_siblings(name, monkeypatch):
    """Each child sees all queries of the level above, not its parent's alone."""
    right = drafting._next_level

    def wrong(*arguments):
        following = right(*arguments)
        frontier = following.frontier
        frontier = frontier._replace(sees_BTQ=jnp.ones_like(frontier.sees_BTQ))
        return replace(following, frontier=frontier)

    monkeypatch.setattr(drafting, "_next_level", wrong)
    with pytest.raises(AssertionError):
        _check_nodes(TREES[name])


def test_worked_example_of_the_docstring():
    tree = static_tree([(0,), (1,), (0, 0)])
    assert (tree.size, tree.depth) == (4, 2)
    assert tree.parent_W.tolist() == [0, 0, 0, 1]
    assert tree.depth_W.tolist() == [0, 1, 1, 2]
    assert tree.rank_W.tolist() == [0, 0, 1, 0]
    verify = np.asarray(_grown(tree)[0].above_BWW[0])
    assert verify.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]


def test_eagle_tree_has_the_published_sizes():
    tree = static_tree(EAGLE_PATHS)
    assert (tree.size, tree.depth) == (26, 5)
    assert np.bincount(tree.depth_W).tolist() == [1, 4, 8, 8, 3, 2]


def test_siblings_have_different_ranks():
    tree = static_tree(EAGLE_PATHS)
    assert (
        len(
            {
                (parent, rank)
                for parent, rank in zip(tree.parent_W[1:], tree.rank_W[1:], strict=True)
            }
        )
        == tree.size - 1
    )


def test_order_of_the_given_paths_does_not_matter():
    assert static_tree(RAGGED) == static_tree(RAGGED[::-1])
    assert hash(static_tree(RAGGED)) == hash(static_tree([list(path) for path in RAGGED]))


def test_chain_and_root():
    assert chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert chain(3).parent_W.tolist() == [0, 0, 1, 2]
    assert (chain(0), ROOT_ONLY.size, ROOT_ONLY.depth) == (ROOT_ONLY, 1, 0)


def test_names_of_trees():
    names = [
        "no draft",
        "chain of 3",
        "static tree, 5 levels, 26 nodes",
        "dynamic tree, 2 levels, topk 3, 5 nodes",
    ]
    assert [
        str(tree) for tree in (ROOT_ONLY, chain(3), static_tree(EAGLE_PATHS), dynamic_tree(2, 3, 5))
    ] == names


def test_tree_of_config():
    assert tree_of(DecodeConfig(levels=4)) == chain(4)
    assert tree_of(DecodeConfig(tree="static")) == static_tree(EAGLE_PATHS)
    assert tree_of(DecodeConfig(tree="static", paths=((0,), (0, 1)))).size == 3
    assert tree_of(DecodeConfig(tree="dynamic", levels=3, topk=2, nodes=6)) == dynamic_tree(3, 2, 6)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (0,)], "repeated or an empty path"),
        ([()], "repeated or an empty path"),
        ([(0,), (1, 0)], r"the parent \[1\] of \[1, 0\] is not in the list"),
        ([(-1,)], "negative rank"),
    ],
)
def test_bad_paths(paths, message):
    with pytest.raises(UserError, match=message):
        static_tree(paths)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (3, 2, 12),
            "3 levels of topk 2 make 10 candidates, so nodes .root included. must be 2 to 11",
        ),
        ((3, 2, 1), "decode.nodes is 1"),
        ((0, 2, 3), "drafts nothing"),
        ((2, 0, 3), "drafts nothing"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(UserError, match=message):
        dynamic_tree(*sizes)

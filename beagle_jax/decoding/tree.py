"""Draft trees: which drafts are continued, and which are verified (method.md 6.4, 6.5).

A node is a drafted token; node 0 is the root, the last known token. Every tree grows level by level
in the same way (`draft.grow`). Each query of a level keeps its best children as candidates. Some
candidates become the queries of the next level. At the end, some of all candidates become nodes. A
static tree selects them by fixed indices, a dynamic tree by score.

A static tree is given by paths of child ranks: (0, 2) is the third-best continuation of the best
first token. A chain is the tree (0,), (0, 0), (0, 0, 0), ..
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.config import DecodeConfig
from beagle_jax.decoding.arguments import whole_number
from beagle_jax.errors import UserError

# EAGLE-1's tree: 25 nodes and the root (method.md 6.5).
EAGLE_PATHS: tuple[tuple[int, ...], ...] = (
    (0,),
    (1,),
    (2,),
    (3,),
    (0, 0),
    (0, 1),
    (0, 2),
    (1, 0),
    (1, 1),
    (2, 0),
    (2, 1),
    (3, 0),
    (0, 0, 0),
    (0, 0, 1),
    (0, 0, 2),
    (0, 1, 0),
    (0, 1, 1),
    (0, 2, 0),
    (0, 2, 1),
    (1, 0, 0),
    (0, 0, 0, 0),
    (0, 0, 0, 1),
    (0, 0, 0, 2),
    (0, 0, 0, 0, 0),
    (0, 0, 0, 0, 1),
)


@dataclass(frozen=True)
class StaticTree:
    """A tree of fixed shape. Hashable by its paths, for use as a static argument of jit.

    Nodes are ordered by depth, then by path, so that parents precede children. Example with the
    paths (0,), (1,), (0, 0):

        root            node      0  1  2  3     draft mask            verify mask
        |- a  (0,)      parent    0  0  0  1     (strict ancestors)    (ancestors and itself)
        |  '- c (0, 0)  depth     0  1  1  2     root: -               root: root
        '- b  (1,)      rank      0  0  1  0     a: root               a: root a
                                                 b: root               b: root b
                                                 c: root a             c: root a c
    """

    paths: tuple[tuple[int, ...], ...]

    scored = False  # the shape does not depend on scores, so they are not computed

    def __str__(self) -> str:
        if not self.depth:
            return "no draft"
        return (
            f"chain of {self.depth}"
            if self.size == self.depth + 1
            else f"static tree, {self.depth} levels, {self.size} nodes"
        )

    @property
    def grown(self) -> "StaticTree":
        """What the draft grows: all of it."""
        return self

    @property
    def size(self) -> int:
        """W: tokens verified per round, the root included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """P: draft steps per round; 0 for the tree of the root alone (plain decoding)."""
        return max((len(path) for path in self.paths), default=0)

    @cached_property
    def _ordered(self) -> tuple[tuple[int, ...], ...]:
        return ((), *sorted(self.paths, key=lambda path: (len(path), path)))

    @cached_property
    def parent_W(self) -> np.ndarray:
        """Parent of each node; the root is its own parent."""
        index = {path: node for node, path in enumerate(self._ordered)}
        return np.array([index[path[:-1]] for path in self._ordered], np.int32)

    @cached_property
    def depth_W(self) -> np.ndarray:
        """Distance from the root."""
        return np.array([len(path) for path in self._ordered], np.int32)

    @cached_property
    def rank_W(self) -> np.ndarray:
        """Rank of each node among the best continuations of its parent, 0 for the best."""
        return np.array([path[-1] if path else 0 for path in self._ordered], np.int32)

    @cached_property
    def _queries(self) -> list[np.ndarray]:
        """The nodes with children, for each level."""
        inner = set(self.parent_W[1:].tolist())
        return [
            np.array([node for node in np.flatnonzero(self.depth_W == level) if node in inner])
            for level in range(self.depth)
        ]

    def kept_children(self, level: int) -> int:
        """Returns how many children each query of a level keeps. Level 0 is that of the root."""
        return int(self.rank_W[self.depth_W == level + 1].max()) + 1

    def next_queries(self, level: int, score_BA: jax.Array) -> jax.Array:
        """Returns which candidates of a level are the queries of the next level.

        Returns their indices [B, T], in (query, rank) order.
        """
        return jnp.broadcast_to(
            self._places(level, self._queries[level + 1])[None],
            (score_BA.shape[0], len(self._queries[level + 1])),
        )

    def chosen(self, score_BZ: jax.Array) -> jax.Array:
        """Returns which of all candidates become nodes 1, 2, .. of the tree.

        Candidates are numbered level after level; returns ascending indices [B, W - 1].
        """
        start = np.cumsum(
            [
                0,
                *(
                    len(self._queries[level]) * self.kept_children(level)
                    for level in range(self.depth)
                ),
            ]
        )
        below = [
            start[level] + self._places(level, np.flatnonzero(self.depth_W == level + 1))
            for level in range(self.depth)
        ]
        return jnp.broadcast_to(np.concatenate(below)[None], (score_BZ.shape[0], self.size - 1))

    def _places(self, level: int, nodes: np.ndarray) -> np.ndarray:
        """Returns the indices of nodes one level below `level` among its candidates."""
        column = np.searchsorted(self._queries[level], self.parent_W[nodes])
        return (column * self.kept_children(level) + self.rank_W[nodes]).astype(np.int32)


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2's tree (method.md 6.4), which grows where the draft is confident. Hashable.

    Every level keeps the `topk` best children of each query, and continues the `topk` best of these
    by cumulative log-probability. At the end, the `nodes` - 1 best of all candidates are verified.
    A node's score is at most its parent's, and among equal scores the shallower node is chosen, so
    the ancestors of a chosen node are chosen too.
    """

    levels: int  # draft forwards per round
    topk: int  # children kept per query, and queries per level after the first
    nodes: int  # W: tokens verified per round, the root included

    scored = True

    def __str__(self) -> str:
        return f"dynamic tree, {self.levels} levels, topk {self.topk}, {self.nodes} nodes"

    @property
    def grown(self) -> "DynamicTree":
        """What the draft grows: all of it."""
        return self

    @property
    def size(self) -> int:
        """W."""
        return self.nodes

    @property
    def depth(self) -> int:
        """P: draft steps per round."""
        return self.levels

    def kept_children(self, level: int) -> int:
        """Returns how many children each query of a level keeps as candidates."""
        return self.topk

    def next_queries(self, level: int, score_BA: jax.Array) -> jax.Array:
        """Returns indices of the best candidates of a level [B, topk]."""
        return jax.lax.top_k(score_BA, self.topk)[1]

    def chosen(self, score_BZ: jax.Array) -> jax.Array:
        """Returns indices of the best candidates of all levels [B, W - 1].

        They are in order of creation, so that parents precede children.
        """
        return jnp.sort(jax.lax.top_k(score_BZ, self.nodes - 1)[1], axis=-1)


@dataclass(frozen=True)
class LookupTree:
    """A tree, and beside it a chain that continues the root as earlier text did. Hashable.

    The chain is looked up (decoding/lookup.py), so it costs the draft nothing. Nodes of the tree
    come first. Where the chain begins as a path of the tree does, both are verified, and the longer
    match is accepted.
    """

    grown: StaticTree | DynamicTree  # what the draft grows
    looked_up: int  # tokens of the chain
    ngram: int  # the longest run of last tokens to search for

    @property
    def scored(self) -> bool:
        """True when the shape depends on the draft's scores."""
        return self.grown.scored

    def __str__(self) -> str:
        return f"{self.grown}, {self.looked_up} looked up"

    @property
    def size(self) -> int:
        """W, with the chain."""
        return self.grown.size + self.looked_up

    @property
    def depth(self) -> int:
        """P: the deepest node, of the tree or the chain."""
        return max(self.grown.depth, self.looked_up)


GrownTree = StaticTree | DynamicTree  # a tree that a draft grows
Tree = GrownTree | LookupTree

ROOT_ONLY = StaticTree(())


def chain(levels: int) -> StaticTree:
    """Returns a chain: one draft token per level. Raises UserError for a negative number."""
    levels = whole_number("levels", levels, 0)
    return StaticTree(tuple((0,) * depth for depth in range(1, levels + 1)))


def static_tree(paths: Sequence[Sequence[int]]) -> StaticTree:
    """Returns the tree with these paths.

    Raises:
        UserError: The parent of a path is missing, or a path is empty or repeated.
    """
    known = {tuple(path) for path in paths}
    if len(known) < len(paths) or () in known:
        raise UserError(f"decode.paths: {list(map(list, paths))} has a repeated or an empty path")
    for path in sorted(known):
        if any(rank < 0 for rank in path):
            raise UserError(
                f"decode.paths: {list(path)} has a negative rank; ranks count from 0, the best"
            )
        if len(path) > 1 and path[:-1] not in known:
            raise UserError(
                f"decode.paths: the parent {list(path[:-1])} of {list(path)} is not in the list; "
                "add it"
            )
    return StaticTree(tuple(sorted(known, key=lambda path: (len(path), path))))


def candidates(levels: int, topk: int) -> int:
    """Returns how many candidates a dynamic tree keeps over all levels.

    These are the children of the root, then those of `topk` queries per level.
    """
    return topk + (levels - 1) * topk**2


def dynamic_tree(levels: int, topk: int, nodes: int) -> DynamicTree:
    """Returns EAGLE-2's tree. Raises UserError if there are fewer candidates than nodes."""
    levels, topk, nodes = (
        whole_number(name, value)
        for name, value in (("levels", levels), ("topk", topk), ("nodes", nodes))
    )
    if levels < 1 or topk < 1:
        raise UserError(
            f"decode: a dynamic tree of levels {levels} and topk {topk} drafts nothing; both "
            "must be at least 1"
        )
    most = candidates(levels, topk) + 1
    if not 2 <= nodes <= most:
        raise UserError(
            f"decode.nodes is {nodes}; {levels} levels of topk {topk} make {most - 1} candidates, "
            f"so nodes (root included) must be 2 to {most}"
        )
    return DynamicTree(levels, topk, nodes)


def tree_of(config: DecodeConfig) -> Tree:
    """Returns the tree of a config, with its looked-up nodes.

    For `auto` it is the dynamic tree that is used until one is tuned.
    """
    if config.tree == "chain":
        return with_lookup(chain(config.levels), config)
    if config.tree in ("dynamic", "auto"):
        return with_lookup(dynamic_tree(config.levels, config.topk, config.nodes), config)
    paths = config.paths if config.paths is not None else EAGLE_PATHS
    return with_lookup(static_tree(paths), config)


def with_lookup(tree: GrownTree, config: DecodeConfig) -> Tree:
    """Returns the tree with `decode.lookup_nodes` beside it."""
    if not config.lookup_nodes:
        return tree
    return LookupTree(tree, config.lookup_nodes, config.ngram)


def lookup_tree(config: DecodeConfig) -> StaticTree:
    """Returns the chain that prompt lookup drafts: as many tokens as the config's tree verifies.

    A round then costs the target the same. For `auto` it is `levels`, beside the looked-up nodes.
    """
    if config.tree == "auto":
        return chain(config.levels + config.lookup_nodes)
    return chain(tree_of(config).size - 1)

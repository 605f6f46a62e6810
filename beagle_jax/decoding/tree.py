"""Draft trees of fixed shape: chains and static trees, as constants made once on the host (method.md 6.5).

A node is a drafted token; node 0 is the root, the last known token. A tree is given by paths of child ranks: (0, 2)
is the third-best continuation of the best first token. A chain is the tree (0,), (0, 0), (0, 0, 0), ..
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from beagle_jax.config import DecodeConfig
from beagle_jax.errors import UserError

# EAGLE-1's tree: 25 nodes and the root (method.md 6.5).
EAGLE_PATHS: tuple[tuple[int, ...], ...] = (
    (0,), (1,), (2,), (3,),
    (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0),
    (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0),
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2),
    (0, 0, 0, 0, 0), (0, 0, 0, 0, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Tree:
    """A static tree. Hashable by its paths, so that it can be a static argument of jit.

    The node order is by depth, then by path: parents precede children. Example, paths (0,), (1,), (0, 0):

        root            node      0  1  2  3        draft mask (strict ancestors)   verify mask (or self)
        |- a  (0,)      parent    0  0  0  1        root sees -                     root: root
        |  '- c (0, 0)  depth     0  1  1  2        a: root    c: root a            a: root a   c: root a c
        '- b  (1,)      rank      0  0  1  0        b: root                         b: root b
    """

    paths: tuple[tuple[int, ...], ...]

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
        """Parent of each node; the root is its own."""
        index = {path: node for node, path in enumerate(self._ordered)}
        return np.array([index[path[:-1]] for path in self._ordered], np.int32)

    @cached_property
    def depth_W(self) -> np.ndarray:
        """Distance from the root."""
        return np.array([len(path) for path in self._ordered], np.int32)

    @cached_property
    def rank_W(self) -> np.ndarray:
        """Which of its parent's best continuations a node is, 0 the best."""
        return np.array([path[-1] if path else 0 for path in self._ordered], np.int32)

    @cached_property
    def ancestors_or_self_WW(self) -> np.ndarray:
        """Verify mask: True where the column's node is the row's node or above it."""
        return np.array([[row[: len(column)] == column for column in self._ordered] for row in self._ordered])

    @cached_property
    def path_WP1(self) -> np.ndarray:
        """Nodes from the root to each node, then the node itself repeated."""
        index = {path: node for node, path in enumerate(self._ordered)}
        return np.array(
            [[index[path[: min(step, len(path))]] for step in range(self.depth + 1)] for path in self._ordered], np.int32
        )

    def inner_nodes(self, depth: int) -> np.ndarray:
        """Nodes at a depth that have children: the queries of draft step depth + 1."""
        parents = {path[:-1] for path in self.paths}
        return np.array([n for n, path in enumerate(self._ordered) if len(path) == depth and path in parents], np.int32)

    def children(self, depth: int) -> np.ndarray:
        """Nodes one level below `depth`."""
        return np.flatnonzero(self.depth_W == depth + 1)


ROOT_ONLY = Tree(())


def chain(levels: int) -> Tree:
    """One draft token per level."""
    return Tree(tuple((0,) * depth for depth in range(1, levels + 1)))


def static_tree(paths: Sequence[Sequence[int]]) -> Tree:
    """A tree of given paths. Raises UserError when a path's parent is missing, or a path is empty or repeated."""
    known = {tuple(path) for path in paths}
    if len(known) < len(paths) or () in known:
        raise UserError(f"decode.paths: {list(map(list, paths))} has a repeated or an empty path")
    for path in sorted(known):
        if any(rank < 0 for rank in path):
            raise UserError(f"decode.paths: {list(path)} has a negative rank; ranks count from 0, the best")
        if len(path) > 1 and path[:-1] not in known:
            raise UserError(f"decode.paths: {list(path)} hangs in the air; its parent {list(path[:-1])} is not in the list")
    return Tree(tuple(sorted(known, key=lambda path: (len(path), path))))


def tree_of(config: DecodeConfig) -> Tree:
    """The tree that a config asks for."""
    if config.tree == "chain":
        return chain(config.levels)
    return static_tree(config.paths if config.paths is not None else EAGLE_PATHS)

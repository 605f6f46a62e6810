"""Draft trees, for drafts in PyTorch.

A tree grows level by level: each query of a level keeps its best children as candidates, some of
them are the queries of the next level, and at the end some of all candidates become nodes. Node 0
is the root, the last known token; parents precede their children.

Array names end in their axes: B rows, A candidates of a level, T queries of a level, Z candidates
of all levels, W nodes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Nodes(NamedTuple):
    """The drafted tree of each row."""

    token_BW: torch.Tensor
    parent_BW: torch.Tensor  # the root is its own parent
    depth_BW: torch.Tensor
    above_BWW: torch.Tensor  # whether the column's node is the row's node or one of its ancestors

    def accepted(self, row: int, choice_W: Sequence[int]) -> list[int]:
        """Returns the accepted nodes of a row, from the root on.

        A node is accepted if its token is the target's choice (`choice_W`) at its parent.
        """
        tokens, parents = self.token_BW[row].tolist(), self.parent_BW[row].tolist()
        path = [0]
        while matching := [
            node
            for node in range(1, len(tokens))
            if parents[node] == path[-1] and tokens[node] == choice_W[path[-1]]
        ]:
            path.append(matching[0])
        return path


class Tree:
    """A static tree, given as paths of child ranks.

    The path (0, 2) is the third-best continuation of the best first token. Nodes are ordered by
    depth, then by path.
    """

    scored = False  # the shape does not depend on scores

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        ordered = [(), *sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))]
        node_of = {path: node for node, path in enumerate(ordered)}
        if len(ordered) != len(paths) + 1 or len(node_of) != len(ordered):
            raise ValueError(f"paths {list(paths)} has a repeated or an empty path")
        for path in ordered[1:]:
            if path[:-1] not in node_of or min(path) < 0:
                raise ValueError(
                    f"paths: the parent of {list(path)} is not in the list, or a rank is negative"
                )
        self.size, self.depth = len(ordered), len(ordered[-1])
        self.is_chain = self.size == self.depth + 1
        inner = {path[:-1] for path in ordered[1:]}
        # The nodes of each depth, and those of them that have children: the queries.
        self._levels = [[path for path in ordered if len(path) == d] for d in range(self.depth + 1)]
        self._queries = [[path for path in level if path in inner] for level in self._levels]

    def children(self, level: int) -> int:
        """Returns how many children each query of a level keeps. Level 0 is that of the root."""
        return 1 + max(path[-1] for path in self._levels[level + 1])

    def continued(self, level: int, score_BA: torch.Tensor) -> torch.Tensor:
        """Returns which candidates of a level are the queries of the next one [B, T]."""
        places = self._places(level, self._queries[level + 1])
        return torch.tensor(places, device=score_BA.device).expand(len(score_BA), -1)

    def chosen(self, score_BZ: torch.Tensor) -> torch.Tensor:
        """Returns which of all candidates become nodes 1, 2, .. [B, W - 1]."""
        first, places = 0, []
        for level in range(self.depth):
            places += [first + at for at in self._places(level, self._levels[level + 1])]
            first += len(self._queries[level]) * self.children(level)
        return torch.tensor(places, device=score_BZ.device).expand(len(score_BZ), -1)

    def _places(self, level: int, paths: list[tuple[int, ...]]) -> list[int]:
        columns = {path: column for column, path in enumerate(self._queries[level])}
        return [columns[path[:-1]] * self.children(level) + path[-1] for path in paths]


class DynamicTree:
    """EAGLE-2's tree, which grows where the draft is confident.

    Every level keeps the `topk` best children of each query and continues the `topk` best of these
    by the product of probabilities. At the end the `nodes` - 1 best of all candidates are verified.
    """

    scored = True
    is_chain = False

    def __init__(self, levels: int, topk: int, nodes: int) -> None:
        if levels < 1 or topk < 1:
            raise ValueError(f"dynamic: levels {levels} and topk {topk} must be at least 1")
        most = topk + (levels - 1) * topk**2 + 1
        if not 2 <= nodes <= most:
            raise ValueError(
                f"dynamic: {nodes} nodes; {levels} levels of topk {topk} make 2 to {most}, the "
                "root included"
            )
        self.depth, self.topk, self.size = levels, topk, nodes

    def children(self, level: int) -> int:
        """Returns how many children each query of a level keeps."""
        return self.topk

    def continued(self, level: int, score_BA: torch.Tensor) -> torch.Tensor:
        """Returns the best candidates of a level [B, topk]."""
        return _best(score_BA, self.topk)

    def chosen(self, score_BZ: torch.Tensor) -> torch.Tensor:
        """Returns the best of all candidates [B, W - 1], in the order of their creation."""
        return _best(score_BZ, self.size - 1).sort(dim=-1).values


def _best(score_BA: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the places of the largest scores.

    Of equal scores the first is taken: a parent, whose score no child exceeds, before its children.
    """
    return score_BA.sort(dim=-1, descending=True, stable=True).indices[:, :count]


class Growth:
    """A tree while it grows: the queries of the current level, and all candidates so far."""

    def __init__(self, root_B: torch.Tensor) -> None:
        zero_B1 = torch.zeros_like(root_B)[:, None]
        self.token_BT = root_B[:, None]
        self.score_BT = torch.zeros_like(zero_B1, dtype=torch.float32)
        self._number_BT = zero_B1  # of each query among all candidates; the root is the first
        self._candidates = [(self.token_BT, zero_B1, zero_B1, self.score_BT)]

    @property
    def last_scores(self) -> torch.Tensor:
        """The scores of the last level's candidates [B, A]."""
        return self._candidates[-1][3]

    def add(self, level: int, token_BA: torch.Tensor, score_BA: torch.Tensor) -> None:
        """Notes the children of the current queries, in (query, rank) order."""
        each = token_BA.shape[1] // self._number_BT.shape[1]
        parent_BA = self._number_BT.repeat_interleave(each, dim=1)
        depth_BA = torch.full_like(parent_BA, level + 1)
        self._candidates.append((token_BA, parent_BA, depth_BA, score_BA))

    def go_on(self, at_BT: torch.Tensor) -> torch.Tensor:
        """Makes these candidates of the last level the queries; returns their parents' places."""
        token_BA, *_, score_BA = self._candidates[-1]
        first = sum(token.shape[1] for token, *_ in self._candidates[:-1])
        each = token_BA.shape[1] // self._number_BT.shape[1]
        self.token_BT, self.score_BT = token_BA.gather(1, at_BT), score_BA.gather(1, at_BT)
        self._number_BT = at_BT + first
        return at_BT // each

    def nodes(self, tree: Tree | DynamicTree) -> Nodes:
        """Returns the tree of the chosen candidates."""
        parts = zip(*self._candidates, strict=True)
        token_BZ, parent_BZ, depth_BZ, score_BZ = (torch.cat(part, dim=1) for part in parts)
        chosen_BW = tree.chosen(score_BZ[:, 1:]) + 1
        chosen_BW = torch.cat([torch.zeros_like(chosen_BW[:, :1]), chosen_BW], dim=1)
        B, W = chosen_BW.shape
        node_W = torch.arange(W, device=chosen_BW.device)
        node_BZ = torch.zeros_like(parent_BZ).scatter(1, chosen_BW, node_W.expand(B, W))
        parent_BW = node_BZ.gather(1, parent_BZ.gather(1, chosen_BW))
        walk_BW, above_BWW = node_W.expand(B, W), node_W[:, None] == node_W
        for _ in range(tree.depth):
            walk_BW = parent_BW.gather(1, walk_BW)
            above_BWW = above_BWW | (walk_BW[..., None] == node_W)
        token_BW, depth_BW = (x_BZ.gather(1, chosen_BW) for x_BZ in (token_BZ, depth_BZ))
        return Nodes(token_BW, parent_BW, depth_BW, above_BWW)

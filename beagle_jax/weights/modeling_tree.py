"""Static draft trees, for drafts in PyTorch."""

from collections.abc import Sequence


class Tree:
    """A static draft tree, given as paths of child ranks.

    The path (0, 2) is the third-best continuation of the best first token. Node 0 is the root, the
    last known token. Nodes are ordered by depth, then by path, so parents precede their children.
    """

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
        self.size = len(ordered)
        self.rank = [path[-1] if path else 0 for path in ordered]
        self.depth = [len(path) for path in ordered]
        self.parent = [node_of[path[:-1]] for path in ordered]  # the root is its own parent
        self.children = [
            [node_of[path] for path in ordered[1:] if path[:-1] == parent] for parent in ordered
        ]
        self.ancestors = [
            {node_of[path[:end]] for end in range(len(path))} for path in ordered
        ]  # strict
        inner = [node for node in range(self.size) if self.children[node]]
        # The nodes queried in each draft step: those of one depth that have children.
        self.levels = [
            [node for node in inner if self.depth[node] == depth]
            for depth in range(max(self.depth))
        ]
        self.is_chain = self.depth == list(range(self.size))

    def accepted(self, tokens: Sequence[int], best: Sequence[int]) -> list[int]:
        """Returns the accepted nodes, from the root on.

        A node is accepted if its token is the target's choice (`best`) at its parent.
        """
        path = [0]
        while matching := [
            node for node in self.children[path[-1]] if tokens[node] == best[path[-1]]
        ]:
            path.append(matching[0])
        return path

"""An answer in HTML: its text coloured by origin, and the tree of a round.

A notebook shows what `draw` returns. The server's page (serving/page.html) draws the same in the
browser, from the same spans and trees.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.origin import Origins, Span, token_text
from beagle_jax.decoding.requests import Answer, DraftedTree, Options, Prompt
from beagle_jax.decoding.sampling import GREEDY, Sampling

_DRAFTED = "#c8ead2"  # behind text that was drafted
_BOX, _STEP, _LINE = 100, 124, 34  # pixels: width of a node, from level to level, line to line
_LONGEST = 12  # characters of a node's text


@dataclass(frozen=True)
class Drawing:
    """One answer and how it came; a notebook shows it."""

    answer: Answer
    spans: list[Span]
    tree: DraftedTree | None  # of the round that accepted most; None if no round drafted
    texts: list[str]  # of the tree's tokens

    def _repr_html_(self) -> str:
        tokens = f"{len(self.answer.tokens)} tokens in {self.answer.rounds} rounds"
        key = f'<span style="background:{_DRAFTED}">drafted and accepted</span>; the rest is the '
        parts = [
            f'<p style="white-space:pre-wrap">{answer_html(self.spans)}</p>',
            f"<p><small>{key}target's own; {tokens}, tau {self.answer.tau:.2f}</small></p>",
        ]
        if self.tree is not None:
            parts.append(tree_svg(self.texts, self.tree.parents, self.tree.accepted))
        return "\n".join(parts)


def draw(
    decoder: SpeculativeDecoder,
    prompt: Prompt,
    sampling: Sampling = GREEDY,
    **options: Unpack[Options],
) -> Drawing:
    """Answers a prompt and returns its text by origin, with the tree of its best round.

    Sampling and options are those of `SpeculativeDecoder.generate`.

    Raises:
        UserError: as `generate`.
    """
    request = decoder.request(prompt, sampling, options)
    made = Origins(decoder.codec, request.stop_token_ids)
    spans: list[Span] = []
    tree, answer = None, None
    session = decoder.resumed(request, None, drafted=bool(decoder.tree.depth))
    for piece in session:
        spans += made.add(piece)
        answer = piece.answer
        if piece.drafted and (tree is None or sum(piece.drafted.accepted) > sum(tree.accepted)):
            tree = piece.drafted
    assert answer is not None
    texts = [token_text(decoder.codec, token) for token in tree.tokens] if tree else []
    return Drawing(answer, spans, tree, texts)


def answer_html(spans: Sequence[Span]) -> str:
    """Returns the text as HTML, with the drafted part on a coloured ground."""
    return "".join(
        f'<span style="background:{_DRAFTED}">{html.escape(text)}</span>'
        if drafted
        else html.escape(text)
        for text, drafted in spans
    )


def tree_svg(texts: Sequence[str], parents: Sequence[int], accepted: Sequence[bool]) -> str:
    """Returns the tree of a round as SVG, levels from left to right, the accepted path coloured.

    texts: of the nodes, the root first. parents: of each node; the root is its own.
    """
    place = _places(parents)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(x for x, _ in place) + _STEP}" '
        f'height="{max(y for _, y in place) + _LINE}" font-family="monospace" font-size="12">'
    ]
    for node, (x, y) in enumerate(place):
        if node:
            from_x, from_y = place[parents[node]]
            middle = (from_x + _BOX + x) / 2
            colour = "#2a7d46" if accepted[node] else "#bbbbbb"
            lines.append(
                f'<path fill="none" stroke="{colour}" d="M{from_x + _BOX} {from_y + 13}C{middle} '
                f'{from_y + 13} {middle} {y + 13} {x} {y + 13}"/>'
            )
    for node, (x, y) in enumerate(place):
        shown = json.dumps(texts[node], ensure_ascii=False)[1:-1].replace(" ", "␣")
        shown = shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
        fill = _DRAFTED if accepted[node] else "#ffffff"
        lines.append(
            f'<rect x="{x}" y="{y}" width="{_BOX}" height="26" rx="6" fill="{fill}" '
            f'stroke="#888888"/><text x="{x + 8}" y="{y + 17}" fill="#222222">'
            f"{html.escape(shown)}</text>"
        )
    return "".join([*lines, "</svg>"])


def _places(parents: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the pixels of each node: a line for each leaf, a column for each level."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if node:
            children[parent].append(node)
    place: list[tuple[int, int]] = [(0, 0)] * len(parents)
    lines = 0

    def put(node: int, level: int) -> int:
        nonlocal lines
        below = [put(child, level + 1) for child in children[node]]
        if not below:
            lines += 1
        line = below[0] if below else lines - 1
        place[node] = (8 + level * _STEP, 8 + line * _LINE)
        return line

    put(0, 0)
    return place

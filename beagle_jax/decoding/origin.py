"""Which text of an answer was drafted and accepted, and which is the target's own."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from beagle_jax.data.template import decoded
from beagle_jax.decoding.requests import Codec, Piece


class Span(NamedTuple):
    """Text of one origin."""

    text: str
    drafted: bool  # drafted and accepted; otherwise the target's own


class Origins:
    """Splits the text of one answer's pieces by its origin."""

    def __init__(self, codec: Codec, end_tokens: tuple[int, ...] = ()) -> None:
        """end_tokens: tokens that are not shown, beside the target's own end tokens."""
        self._text = codec.stream((), end_tokens)
        self._begins = True
        self._pending: deque[Span] = deque()  # text that no piece showed yet

    def add(self, piece: Piece) -> list[Span]:
        """Returns the text of the answer's next piece as spans; joined, they are `piece.text`."""
        if self._text is None:
            return []
        drafted = origins(self._begins, piece.accepted, len(piece.tokens))
        self._begins &= not piece.tokens
        for token, is_drafted in zip(piece.tokens, drafted, strict=True):
            if text := self._text.add([token]):
                self._pending.append(Span(text, is_drafted))
        if piece.answer is not None and (text := self._text.close()):
            self._pending.append(Span(text, False))
        return self._take(len(piece.text))

    def _take(self, length: int) -> list[Span]:
        """The next characters of the text."""
        spans = []
        while length and self._pending:
            text, is_drafted = self._pending.popleft()
            if len(text) > length:
                self._pending.appendleft(Span(text[length:], is_drafted))
                text = text[:length]
            spans.append(Span(text, is_drafted))
            length -= len(text)
        return spans


def origins(begins: bool, accepted: Sequence[int], count: int) -> list[bool]:
    """Which of a piece's tokens were drafted. begins: the first token is that of the prefill.

    A round writes its accepted drafts and then a token of the target, which may be cut off.
    """
    drafted = [False] if begins and count else []
    for drafts in accepted:
        drafted += [True] * drafts + [False]
    return drafted[:count]


def token_text(codec: Codec, token: int) -> str:
    """A token as text; its number without a tokenizer."""
    return str(token) if codec.tokenizer is None else decoded(codec.tokenizer, [token])

"""One answer as it is decoded."""

from collections.abc import Iterator

from beagle_jax.decoding.origin import Origins, Span
from beagle_jax.decoding.requests import Answer, Answers, Piece
from beagle_jax.decoding.session import Session


class Stream:
    """Iterator over the text of one answer; `answer` is the whole answer."""

    def __init__(self, pieces: Iterator[Piece], session: Session) -> None:
        self._pieces, self._session = pieces, session
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            piece = next(self._pieces)
            self._answer = piece.answer
            if piece.text:
                return piece.text

    def spans(self) -> Iterator[Span]:
        """Yields the rest of the text by its origin, in place of the text alone."""
        origins = Origins(self._session.codec)
        for piece in self._pieces:
            self._answer = piece.answer
            yield from origins.add(piece)

    @property
    def answer(self) -> Answer:
        """The whole answer; reads the rest of the stream first."""
        for _ in self:
            pass
        assert self._answer is not None
        return self._answer

    @property
    def answers(self) -> Answers:
        """The whole answer, with the time that it took."""
        answer, session = self.answer, self._session
        return Answers((answer,), session.prefill_seconds, session.decode_seconds)

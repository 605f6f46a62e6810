"""One choice of a response, as it grows: its text, tokens, log-probabilities and their origin."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from beagle_jax.decoding.logprobs import TokenLogProb
from beagle_jax.decoding.origin import Origins, token_text
from beagle_jax.decoding.requests import Answer, Codec, DraftedTree, Piece, Request
from beagle_jax.serving.refusal import Refusal

_REASONS = {
    "token": "stop",
    "string": "stop",
    "length": "length",
    "context": "length",
    "time": "length",
    "cancelled": "length",
}
_LOWEST = -9999.0  # in place of log-probabilities that JSON cannot hold


@dataclass
class Choice:
    """What came of one answer so far. `add` returns what is new."""

    codec: Codec
    request: Request
    spans: bool  # say which text was drafted
    text: str = field(default="", init=False)
    logprobs: list[TokenLogProb] = field(default_factory=list, init=False)
    accepted: list[int] = field(default_factory=list, init=False)  # of each round
    answer: Answer | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._tokens = 0
        self._offset = 0  # characters of the tokens with log-probabilities so far
        self._origins = Origins(self.codec, self.request.stop_token_ids) if self.spans else None

    def add(self, piece: Piece) -> "New":
        """What a piece adds. Raises Refusal if the answer failed."""
        if piece.answer is not None and piece.answer.finish == "error":
            raise Refusal(500, f"the answer failed: {piece.answer.error}")
        self.answer = piece.answer
        self.text += piece.text
        new = New(piece.text, self._shown_logprobs(piece), self._offset)
        self.logprobs += new.logprobs
        self._offset += sum(len(token_text(self.codec, entry.token)) for entry in new.logprobs)
        if self._origins is not None:
            new.extension = self._extension(piece, self._origins)
        self.accepted += piece.accepted
        self._tokens += len(piece.tokens)
        return new

    @property
    def reason(self) -> str | None:
        """OpenAI's `finish_reason`."""
        return None if self.answer is None else _REASONS[self.answer.finish]

    def usage(self) -> tuple[int, int, int]:
        """Tokens, accepted drafts among them, and rounds of the answer so far."""
        if self.answer is None:
            return self._tokens, sum(self.accepted), len(self.accepted)
        accepted = sum(depth * count for depth, count in enumerate(self.answer.accepted))
        return len(self.answer.tokens), accepted, self.answer.rounds

    def extension(self) -> dict[str, Any]:
        """The field `beagle` of a whole response."""
        assert self.answer is not None
        return {"finish": self.answer.finish, "accepted": self.accepted}

    def _shown_logprobs(self, piece: Piece) -> list[TokenLogProb]:
        """Those of tokens that belong to the text: no end token, nothing after a stop string."""
        entries = piece.logprobs or []
        if piece.answer is None:
            return entries
        last = len(piece.answer.tokens) - (piece.answer.finish == "token")
        return entries[: max(0, last - self._tokens)]

    def _extension(self, piece: Piece, spans: Origins) -> dict[str, Any]:
        extension: dict[str, Any] = {
            "spans": list(map(tuple, spans.add(piece))),
            "accepted": list(piece.accepted),
            "tokens": len(piece.tokens),
        }
        if piece.drafted is not None:
            extension["tree"] = self._tree(piece.drafted)
        if piece.answer is not None:
            extension["finish"] = piece.answer.finish
        return extension

    def _tree(self, tree: DraftedTree) -> dict[str, Any]:
        texts = [token_text(self.codec, token) for token in tree.tokens]
        return {"tokens": texts, "parents": tree.parents, "accepted": tree.accepted}


@dataclass
class New:
    """What a piece added to a choice."""

    text: str
    logprobs: list[TokenLogProb]
    offset: int  # characters of the tokens before those of `logprobs`
    extension: dict[str, Any] | None = None


def chat_logprobs(codec: Codec, entries: Sequence[TokenLogProb]) -> dict[str, Any]:
    """Field `logprobs` of a chat choice."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(codec, token)
        whole = "\ufffd" not in text  # else the bytes of a part of a character are not known
        raw = list(text.encode()) if whole else None
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": raw}

    content = [
        {
            **shown(entry.token, entry.logprob),
            "top_logprobs": [shown(token, logprob) for token, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    codec: Codec, entries: Sequence[TokenLogProb], offset: int
) -> dict[str, Any]:
    """Field `logprobs` of a text completion. offset: characters before the first token.

    The most likely tokens of each place, and the chosen one if it is none of them.
    """
    texts = [token_text(codec, entry.token) for entry in entries]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(entry.logprob, _LOWEST) for entry in entries],
        "top_logprobs": [
            {
                token_text(codec, token): max(logprob, _LOWEST)
                # Tokens may have the same text: the chosen one is shown, else the most likely.
                for token, logprob in (*reversed(entry.top), (entry.token, entry.logprob))
            }
            for entry in entries
        ],
        "text_offset": offsets,
    }

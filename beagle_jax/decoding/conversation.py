"""A chat whose caches stay between turns, so that a turn reads only what is new.

The next prompt is compared token by token with the text that the caches hold. What both begin with
is not read again. Where the chat template rewrites earlier turns, more is read, and a warning says
so once.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, Unpack

import jax

from beagle_jax.decoding.requests import Options, Piece
from beagle_jax.decoding.sampling import GREEDY, Sampling
from beagle_jax.decoding.session import Earlier, Session
from beagle_jax.decoding.state import DecodeState
from beagle_jax.decoding.stream import Stream
from beagle_jax.errors import PromptError

if TYPE_CHECKING:
    from beagle_jax.decoding.decoder import SpeculativeDecoder

_log = logging.getLogger(__name__)

# The end of a prompt may become other tokens together with the answer after it.
_MERGED = 4


class Turn(NamedTuple):
    """What the last turn read of its prompt."""

    prompt_tokens: int
    new_tokens: int  # of these, tokens that were read; the others were in the caches


class _Held(NamedTuple):
    """Caches of one row, and the text that they hold."""

    state: DecodeState
    tokens: list[int]


@dataclass
class _Running:
    """A turn whose answer is not in the messages yet."""

    session: Session
    prompt: list[int]
    pieces: Iterator[Piece]
    shown: str = ""


class Conversation:
    """A chat with a decoder: `SpeculativeDecoder.conversation` begins one.

        chat = decoder.conversation([{"role": "system", "content": "Be brief."}])
        for piece in chat.stream("Why is the sky blue?"):
            print(piece, end="")
        print(chat.ask("And at night?"), chat.turn.new_tokens)

    Conversations of one decoder that begin alike, with a long system text for example, read the
    common beginning once: the first turn of one goes on from the caches of another.
    """

    def __init__(
        self,
        decoder: "SpeculativeDecoder",
        messages: Sequence[Mapping[str, str]] = (),
        others: Iterable["Conversation"] = (),
    ) -> None:
        """messages: what was said before, such as a system text. others: conversations of the same
        decoder, whose caches may hold a common beginning.
        """
        self._decoder, self._others = decoder, others
        self._messages = [dict(message) for message in messages]
        self._held: _Held | None = None
        self._running: _Running | None = None
        self._said = 0  # tokens of the last prompt, whose beginning the next one should have
        self._warned = False
        self.turn = Turn(0, 0)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages so far, with the last answer as far as it was decoded."""
        self._settle()
        return [dict(message) for message in self._messages]

    def clear(self) -> None:
        """Forgets all messages. The caches stay, for what the next prompt has in common."""
        self._settle()
        self._messages, self._said = [], 0

    def ask(self, message: str, sampling: Sampling = GREEDY, **options: Unpack[Options]) -> str:
        """Returns the text of the answer. See `stream`."""
        text = self.stream(message, sampling, **options).answer.text
        self._settle()
        return text

    def stream(
        self, message: str, sampling: Sampling = GREEDY, **options: Unpack[Options]
    ) -> Stream:
        """Adds a user's message and yields the answer's text as it is decoded.

        A stream that is left early ends the answer there; what it yielded becomes the answer.
        Sampling and options are those of `SpeculativeDecoder.generate`.

        Raises:
            PromptError: The message is empty, or the context is full. The conversation stays as it
                was.
        """
        self._settle()
        if not isinstance(message, str) or not message.strip():
            raise PromptError(f"the message is {message!r:.80}; expected text that is not empty")
        messages = [*self._messages, {"role": "user", "content": message}]
        request = self._decoder.request(messages, sampling, options)
        prompt = list(request.tokens)
        earlier = self._earlier(prompt)
        session = self._decoder.resumed(request, earlier)
        self._messages, self._said = messages, len(prompt)
        self.turn = Turn(len(prompt), len(prompt) - (earlier.start if earlier else 0))
        self._running = _Running(session, prompt, iter(session))
        return Stream(_recorded(self._running), session)

    def _settle(self) -> None:
        """Ends the turn that runs: its text becomes a message, and its caches are kept."""
        running, self._running = self._running, None
        if running is None:
            return
        running.pieces.close()  # type: ignore[attr-defined]  # a generator
        if running.shown:
            self._messages.append({"role": "assistant", "content": running.shown})
        else:  # templates refuse an empty answer
            self._messages.pop()
        self._held = _held(running)

    def _earlier(self, prompt: list[int]) -> Earlier | None:
        """The caches that hold most of a prompt's beginning: its own, or another chat's."""
        best, most = None, 0
        for held in (self._held, *(chat._held for chat in self._others)):
            if held is not None and (common := _common(prompt, held.tokens)) > most:
                best, most = held, common
        if self._held is not None and most < self._said - _MERGED and not self._warned:
            self._warned = True
            _log.warning(
                "the chat template rewrites earlier turns: of the %d tokens of the turn before, "
                "all after the first %d are read again",
                self._said,
                most,
            )
        # The last common token is read again: a draft's entry for it depends on the token after it,
        # and so does the next token of the answer.
        start = min(most, len(prompt)) - 1
        return Earlier(best.state, start) if best is not None and start > 0 else None


def _recorded(running: _Running) -> Iterator[Piece]:
    for piece in running.pieces:
        running.shown += piece.text
        yield piece


def _held(running: _Running) -> _Held | None:
    """The caches after a turn; None if it was interrupted inside a program that changes them."""
    state = running.session.state
    if state is None:
        return None
    now = jax.device_get((state.transcript, state.cache.length_B))
    transcript, [length] = now
    if transcript.broken_B[0]:
        return None
    text = [*running.prompt, *transcript.out_BS[0, : transcript.count_B[0]].tolist()]
    return _Held(state, text[:length])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning of two texts."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

"""From tokens that arrive a few at a time to text: no half characters, nothing of a stop string or
after it.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from beagle_jax.data.template import decoded

# What a decoder puts in place of bytes that are not a whole character yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns token runs into text; holds back a tail that may still change or turn out to be a stop
    string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        """stop: the text ends before the first of these strings, wherever it begins in a token or a
        round.
        """
        self._tokenizer, self._eos_ids, self._stop = tokenizer, set(eos_ids), tuple(stop)
        self._tokens: list[int] = []
        self._text = ""  # all of it, the held back tail included
        self._shown = 0  # characters already returned
        self.tokens_at_stop: int | None = None  # tokens up to the one that completed a stop string

    def add(self, tokens: Sequence[int]) -> str:
        """Text that these tokens complete; stop tokens are silent, and so is everything after a
        stop string.
        """
        before = self._shown
        # Without stop strings all at once; with them one by one, to know the token that completed
        # one.
        for run in [[token] for token in tokens] if self._stop else [list(tokens)]:
            if self.tokens_at_stop is None:
                self._grow(run)
        return self._text[before : self._shown]

    def close(self) -> str:
        """What was held back, as the tokenizer shows it; nothing after a stop string."""
        if self.tokens_at_stop is not None:
            return ""
        rest, self._shown = self._text[self._shown :], len(self._text)
        return rest

    def whole(self) -> str:
        """All text so far, shown or not."""
        return self._text

    def _grow(self, run: list[int]) -> None:
        self._tokens += run
        self._text = decoded(
            self._tokenizer, [token for token in self._tokens if token not in self._eos_ids]
        )
        stops = [place for place in (self._text.find(stop) for stop in self._stop) if place >= 0]
        if stops:
            self.tokens_at_stop = len(self._tokens)
            self._text = self._text[: min(stops)]
            self._shown = max(self._shown, len(self._text))
            return
        safe = (
            len(self._text.rstrip(_INCOMPLETE))
            if self._text.endswith(_INCOMPLETE)
            else len(self._text)
        )
        self._shown = max(self._shown, min(safe, len(self._text) - self._may_begin_a_stop()))

    def _may_begin_a_stop(self) -> int:
        """Length of the longest tail that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        tails = (length for length in range(min(longest, len(self._text)), 0, -1))
        return next(
            (n for n in tails if any(stop.startswith(self._text[-n:]) for stop in self._stop)), 0
        )

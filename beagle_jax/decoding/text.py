"""From tokens that arrive a few at a time to text that never shows half a character."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# What a decoder puts in place of bytes that are not a whole character yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns token runs into text; holds back a tail that may still be part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]):
        self._tokenizer, self._eos_ids = tokenizer, set(eos_ids)
        self._tokens: list[int] = []
        self._shown = 0  # characters already returned

    def add(self, tokens: Sequence[int]) -> str:
        """Text that these tokens complete; stop tokens are silent."""
        self._tokens += [token for token in tokens if token not in self._eos_ids]
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(_INCOMPLETE):
            text = text.rstrip(_INCOMPLETE)
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def close(self) -> str:
        """What was held back, as the tokenizer shows it."""
        return self._tokenizer.decode(self._tokens)[self._shown :]

"""Turns tokens that arrive a few at a time into text, and ends it before a stop string.

A tokenizer decodes whole sequences: what a token shows can depend on its neighbours. Here a window
of the last tokens is decoded, so that the work per token does not grow with the answer. Where the
window is cut is verified by decoding both sides, and depends on the tokens alone, so that an answer
has the same text however it arrives.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from beagle_jax.data.template import decoded

# What a decoder puts in place of bytes that are not a whole character yet.
_INCOMPLETE = "\ufffd"
_BLOCK = 32  # tokens between two cuts of the window
_CONTEXT = 8  # tokens before a cut that stay in the window
# A tail that stays unsettled for so many tokens, such as bytes that are no text, is cut as it is.
_PATIENCE = 128
# `clean_up_tokenization` removes spaces before these letters. Its replacements together can change
# at most so many letters at the end of a text (the sum of their lengths, each less one).
_CLEANED, _CLEANED_REACH = " .?!,'ntmsver", 19


class _Traits(NamedTuple):
    """How the text of a tokenizer's tokens depends on what follows."""

    # Tokens of one byte ("<0x41>"). A run of them is decoded as a whole: one wrong byte makes all
    # of it U+FFFD.
    byte_ids: frozenset[int]
    cleans_up: bool  # spaces before punctuation are removed


@lru_cache(maxsize=8)
def _traits(tokenizer: PreTrainedTokenizerBase) -> _Traits:
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    byte_ids = {
        token
        for name, token in zip(names, ids, strict=True)
        if isinstance(token, int) and tokenizer.convert_ids_to_tokens(token) == name
    }
    if any(decoded(tokenizer, [token]).startswith("<0x") for token in byte_ids):
        byte_ids = set()  # the names are shown as they are
    cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    # transformers ignores that setting for BPE, unless another one overrules it.
    spaced = tokenizer.convert_tokens_to_ids("Ġ.")
    if cleans_up and isinstance(spaced, int) and decoded(tokenizer, [spaced]) == " .":
        cleans_up = False
    return _Traits(frozenset(byte_ids), cleans_up)


class TextStream:
    """Turns runs of tokens into text.

    It holds back a tail that later tokens may change, and one that may be the beginning of a stop
    string. The returned pieces, joined, are `whole()`: the tokenizer's text of all tokens but the
    silent ones, ended before the first stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], stop: Sequence[str] = ()
    ):
        """eos_ids: tokens without text. stop: the text ends before the first of these strings,
        wherever it begins in a token or a round.
        """
        self._tokenizer, self._eos_ids, self._stop = tokenizer, set(eos_ids), tuple(stop)
        self._traits = _traits(tokenizer)
        self._count = 0  # tokens added, the silent ones included
        # Tokens decoded together: first those before the last cut, with their text.
        self._window: list[int] = []
        self._known, self._context = 0, ""
        self._tail = ""  # text after the last cut
        self._shown: list[str] = []  # pieces already returned
        self._shown_of_tail = 0  # characters of the tail in them
        self._held = ""  # text before the last cut that is not shown yet
        self._next_cut = _BLOCK  # tokens after the last cut at which the next one is tried
        self.tokens_at_stop: int | None = None  # tokens up to the one that completed a stop string

    def add(self, tokens: Sequence[int]) -> str:
        """Returns the text that these tokens complete: empty after a stop string."""
        first = len(self._shown)
        start = 0
        while start < len(tokens) and self.tokens_at_stop is None:
            # With stop strings one by one, to know the token that completes one.
            size = 1 if self._stop else self._until_cut()
            self._grow(tokens[start : start + size])
            start += size
        return "".join(self._shown[first:])

    def close(self) -> str:
        """Returns what was held back, as the tokenizer shows it; nothing after a stop string."""
        if self.tokens_at_stop is not None:
            return ""
        rest = self._rest()
        if not self._ended(rest):  # for a stop string that ends in U+FFFD
            self._show(len(rest))
            return rest
        return self._shown[-1]

    def whole(self) -> str:
        """Returns all text so far, shown or not."""
        rest = self._rest() if self.tokens_at_stop is None else ""
        return "".join(self._shown) + rest

    def _until_cut(self) -> int:
        return max(1, self._next_cut - (len(self._window) - self._known))

    def _rest(self) -> str:
        """Text that is not shown yet."""
        return self._held + self._tail[self._shown_of_tail :]

    def _grow(self, run: Sequence[int]) -> None:
        self._count += len(run)
        self._window += [token for token in run if token not in self._eos_ids]
        text = self._decode(self._window)
        if not text.startswith(
            self._context
        ):  # a byte undid text that was cut for lack of patience
            self._window, self._known, self._context = self._window[self._known :], 0, ""
            text = self._decode(self._window)
        self._tail = text[len(self._context) :]
        rest = self._rest()
        # A tail of U+FFFD may become another character, so no stop string ends in it.
        if self._ended(rest.rstrip(_INCOMPLETE)):
            return
        safe = len(self._held) + max(0, self._settled() - self._shown_of_tail)
        self._show(safe - self._may_begin_a_stop(rest[:safe]))
        if len(self._window) - self._known >= self._next_cut:
            self._cut()

    def _ended(self, text: str) -> bool:
        """Ends the text before the first stop string of `text`, the text not shown, if any."""
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if not places:
            return False
        self.tokens_at_stop = self._count
        self._show(min(places))
        return True

    def _show(self, count: int) -> None:
        """Moves so many characters to the pieces that are shown."""
        self._shown.append(self._rest()[:count])
        held = min(count, len(self._held))
        self._held = self._held[held:]
        self._shown_of_tail += count - held

    def _settled(self) -> int:
        """Characters of the tail that no later token changes."""
        settled = len(self._tail.rstrip(_INCOMPLETE))
        if run := self._byte_run():
            before = len(self._decode(self._window[: len(self._window) - run]))
            settled = min(settled, max(0, before - len(self._context)))
        if self._traits.cleans_up:
            end = self._tail[max(0, settled - _CLEANED_REACH) : settled]
            settled -= len(end) - len(end.rstrip(_CLEANED))
        return settled

    def _byte_run(self) -> int:
        """Tokens of one byte at the end of the window."""
        run = 0
        while run < len(self._window) - self._known and self._is_byte(len(self._window) - 1 - run):
            run += 1
        return run

    def _is_byte(self, index: int) -> bool:
        return self._window[index] in self._traits.byte_ids

    def _may_begin_a_stop(self, text: str) -> int:
        """Length of the longest tail of `text` that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        tails = (length for length in range(min(longest, len(text)), 0, -1))
        return next((n for n in tails if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)

    def _cut(self) -> None:
        """Moves the cut to the last place whose two sides decode to the whole, if there is one.

        Without one the window grows until the next try.
        """
        window, new = self._window, len(self._window) - self._known
        text, last = self._context + self._tail, len(self._window) - self._byte_run()
        limit = len(self._context) + self._settled()
        if new > _PATIENCE:
            if self._byte_run() == new:
                self._cut_run()
                return
            limit, last = len(text), min(last, len(window) - 4)  # a character has four bytes
        for end in range(last, max(self._known, last - _BLOCK), -1):
            head = self._decode(window[:end])
            if not text.startswith(head) or not len(self._context) <= len(head) <= limit:
                continue
            for begin in range(end - _CONTEXT, end - _CONTEXT - 4, -1):
                begin = self._outside_run(begin)
                if self._fits(begin, end, text, head):
                    self._cut_at(begin, end, len(head), text)
                    return
        self._next_cut = new + _BLOCK if new <= _PATIENCE else 2 * new

    def _outside_run(self, index: int) -> int:
        """`index`, or where the run of bytes begins that it lies in; 0 for a negative one."""
        index = max(index, 0)
        while index > 0 and self._is_byte(index) and self._is_byte(index - 1):
            index -= 1
        return index

    def _cut_run(self) -> None:
        """Cuts a long run of bytes after its last whole character, or where it is broken."""
        window, text = self._window, self._context + self._tail
        for end in range(len(window), len(window) - 4, -1):
            head = self._decode(window[:end])
            if not head.endswith(_INCOMPLETE):
                self._tail = head[len(self._context) :]
                self._cut_at(end, end, len(head), head)
                self._tail = self._decode(self._window)
                return
        self._cut_at(len(window), len(window), len(text), text)
        # A broken byte before the cut, so that the rest of the run stays broken.
        broken = self._tokenizer.convert_tokens_to_ids("<0xFF>")
        assert isinstance(broken, int)
        self._window, self._known, self._context = [broken], 1, self._decode([broken])

    def _fits(self, begin: int, end: int, text: str, head: str) -> bool:
        """Whether the window may begin at `begin` with a cut at `end`, after the text `head`.

        Decoders treat the first text of a sequence in their own way (sentencepiece strips a space),
        so the context must show some.
        """
        context = self._decode(self._window[begin:end])
        rest = text[len(head) :]
        return (
            bool(context)
            and head.endswith(context)
            and self._decode(self._window[begin:]) == context + rest
        )

    def _cut_at(self, begin: int, end: int, length: int, text: str) -> None:
        passed = length - len(self._context)  # characters of the tail before the new cut
        self._held += self._tail[self._shown_of_tail : passed]
        self._shown_of_tail = max(0, self._shown_of_tail - passed)
        self._context = self._decode(self._window[begin:end])
        self._known, self._tail = end - begin, text[length:]
        self._window = self._window[begin:]
        self._next_cut = _BLOCK

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens))
        assert isinstance(text, str)  # of one sequence; transformers also types several
        return text

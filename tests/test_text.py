"""Streaming text: no half characters, nothing of a stop string, the tokenizer's own text."""

from functools import lru_cache

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beagle_jax.decoding.text import TextStream

STOP, OTHER_STOP = 256, 257
HALF = "\ufffd"


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Makes a tokenizer with one token per byte: other characters than ASCII arrive in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)} | {
        "<stop>": STOP,
        "<other>": OTHER_STOP,
    }
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


class _Careless(TextStream):
    """Planted: shows whatever the tokens decode to."""

    def add(self, tokens):
        return self._tokenizer.decode(list(tokens))


def _check_whole(stream, tokenizer, text, run):
    """Feeds `run` tokens at a time and checks the shown text, which has no broken character."""
    tokens, shown = tokenizer.encode(text), ""
    for start in range(0, len(tokens), run):
        new = stream.add(tokens[start : start + run])
        assert HALF not in new
        shown += new
        assert text.startswith(shown)
    assert shown + stream.close() == text


@pytest.mark.parametrize("run", [1, 2, 3, 100])
@pytest.mark.parametrize("text", ["plain", "café", "a 🐶 b", "日本語", "👩‍👩‍👧!", ""])
def test_characters_arrive_whole(byte_tokenizer, text, run):
    _check_whole(TextStream(byte_tokenizer, [STOP]), byte_tokenizer, text, run)


def test_planted_bug_shows_half_a_character(byte_tokenizer):
    with pytest.raises(AssertionError):
        _check_whole(_Careless(byte_tokenizer, [STOP]), byte_tokenizer, "a 🐶 b", 1)


def test_an_emoji_appears_with_its_last_byte(byte_tokenizer):
    stream = TextStream(byte_tokenizer, [STOP])
    assert [stream.add([token]) for token in byte_tokenizer.encode("🐶!")] == [
        "",
        "",
        "",
        "🐶",
        "!",
    ]
    assert stream.close() == ""


def test_stop_tokens_are_silent(byte_tokenizer):
    stream = TextStream(byte_tokenizer, [STOP, OTHER_STOP])
    assert stream.add([*byte_tokenizer.encode("ok"), OTHER_STOP]) == "ok"
    assert stream.add([STOP]) + stream.close() == ""


def test_a_character_that_never_ends_is_shown_at_the_end(byte_tokenizer):
    stream = TextStream(byte_tokenizer, [STOP])
    assert stream.add(byte_tokenizer.encode("é")[:1]) == ""
    assert stream.close() == HALF


def test_a_broken_character_inside_is_shown_once_text_follows(byte_tokenizer):
    stream, broken = TextStream(byte_tokenizer, [STOP]), byte_tokenizer.encode("é")[:1]
    assert stream.add(broken) == ""
    assert stream.add(byte_tokenizer.encode("x")) == HALF + "x"
    assert stream.close() == ""


# Every kind of tokenizer, random tokens

MARKS = [".", ",", "?", "!", "'", "n't", "'s", "'ve", "'re", "'m", "n", "t", "s", "re", "ve"]
WORDS = ["the", "dog", "say", "it", "用户", "café"]
KINDS = ["bytes", "sentencepiece", "wordpiece", "cleaned", "suffixes", "metaspace", "letters"]


def _fast(model, decoder, clean: bool) -> PreTrainedTokenizerFast:
    made = Tokenizer(model)
    made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=clean)


def _numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


@lru_cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that decodes as the large ones of its kind do."""
    if kind == "bytes":  # Llama 3, Qwen: parts of characters, and of several at once
        byte_of = dict(zip(range(256), _byte_letters(), strict=True))
        texts = [word.encode() for word in (" the", "x🐶"[:1], "\n", "### 用")]
        texts += ["x🐶".encode()[:3], "🐶".encode()[2:], "用户".encode()[:4], "\n€".encode()[:2]]
        pieces = list(byte_of.values()) + ["".join(byte_of[b] for b in text) for text in texts]
        return _fast(models.BPE(_numbered(pieces), []), decoders.ByteLevel(), clean=False)
    if kind == "sentencepiece":  # Llama 2, Mistral
        named = [f"<0x{byte:02X}>" for byte in range(256)]
        words = ["▁", "▁▁", *WORDS, *("▁" + word for word in WORDS), "###"] * 8
        pieces = [*named, *words]
        decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        return _fast(models.BPE(_numbered(pieces), [], byte_fallback=True), decoder, clean=False)
    if kind == "wordpiece":  # BERT
        pieces = [*MARKS, *WORDS, *("##" + word for word in [*WORDS, *MARKS])]
        return _fast(models.WordPiece(_numbered(pieces)), decoders.WordPiece(), clean=True)
    if kind == "cleaned":  # spaces in front of anything
        pieces = [" ", "  ", *MARKS, *(" " + mark for mark in MARKS), *WORDS]
        return _fast(
            models.WordLevel(_numbered(pieces), unk_token="."), decoders.Fuse(), clean=True
        )
    if kind == "suffixes":  # GPT-1
        pieces = [*WORDS, *(word + "</w>" for word in [*WORDS, *MARKS])]
        return _fast(models.BPE(_numbered(pieces), []), decoders.BPEDecoder(), clean=False)
    if kind == "metaspace":  # T5
        pieces = ["▁", *WORDS, *("▁" + word for word in WORDS), *MARKS]
        return _fast(models.BPE(_numbered(pieces), []), decoders.Metaspace(), clean=False)
    pieces = [chr(33 + number) for number in range(90)]
    return _fast(models.WordLevel(_numbered(pieces), unk_token="!"), decoders.Fuse(), clean=False)


def _byte_letters() -> list[str]:
    """The letter of each byte in byte-level tokenizers (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    letter = {byte: chr(byte) for byte in shown}
    letter |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    assert sorted(letter.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return [letter[byte] for byte in range(256)]


def expected_text(tokenizer, tokens, stop=()) -> tuple[str, int | None]:
    """The text of an answer, decoded as a whole for each token, and the tokens up to its stop."""

    def decode(tokens) -> str:
        return tokenizer.decode([token for token in tokens if token != STOP])

    for count in range(1, len(tokens) + 1) if stop else ():
        text = decode(tokens[:count])
        places = [place for s in stop if (place := text.rstrip(HALF).find(s)) >= 0]
        if places:
            return text[: min(places)], count
    return decode(tokens), None


def _streamed(kind: type, tokenizer, tokens, run: int, stop=()) -> tuple[str, int | None]:
    """What a stream shows; all its ways to the text agree."""
    stream = kind(tokenizer, [STOP], stop)
    pieces = [stream.add(tokens[start : start + run]) for start in range(0, len(tokens), run)]
    text = "".join([*pieces, stream.close()])
    assert stream.whole() == text
    assert stream.tokens_at_stop is None or stream.add(tokens[:1]) == ""
    return text, stream.tokens_at_stop


def _random_tokens(tokenizer, rng, count: int) -> list[int]:
    """Random tokens, with stretches of real text between them."""
    tokens: list[int] = []
    while len(tokens) < count:
        # Bytes are the first tokens of the larger ones; half of the time there are none.
        first = 257 if len(tokenizer) > 257 and rng.integers(2) else 0
        tokens += rng.integers(first, len(tokenizer), rng.integers(1, 20)).tolist()
        if len(tokenizer) > 257:
            tokens += "x🐶\n€ ### 用户 é👩‍👧"[rng.integers(0, 12) :].encode()
    return tokens[:count]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_text_of_the_tokenizer(kind):
    _check_random(TextStream, kind)


class _ShowsAll(TextStream):
    """The planted bug: nothing is held back."""

    def _settled(self) -> int:
        return len(self._tail)


class _CutsAnywhere(TextStream):
    """The planted bug: a cut is not verified, and nothing stays before it."""

    def _cut(self) -> None:
        end = len(self._window)
        self._cut_at(end, end, len(self._context + self._tail), self._context + self._tail)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "cleaned"])
def test_planted_bug_a_tail_that_changes_is_shown(kind):
    with pytest.raises(AssertionError):
        _check_random(_ShowsAll, kind)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "wordpiece", "cleaned", "metaspace"])
def test_planted_bug_the_window_is_cut_anywhere(kind):
    with pytest.raises(AssertionError):
        _check_random(_CutsAnywhere, kind)


def _check_random(stream: type, kind: str) -> None:
    tokenizer, rng = tokenizer_of(kind), np.random.default_rng(7)
    for _ in range(12):
        tokens = _random_tokens(tokenizer, rng, int(rng.integers(1, 300)))
        for run in (1, 3, 500):
            assert _streamed(stream, tokenizer, tokens, run) == expected_text(tokenizer, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_end_the_text_where_they_begin(kind):
    _check_stops(TextStream, kind)


class _HoldsLate(TextStream):
    """The planted bug: the beginning of a stop string is looked for at the very end alone."""

    def _may_begin_a_stop(self, text: str) -> int:
        return 0 if self._rest().endswith(HALF) else super()._may_begin_a_stop(text)


def test_planted_bug_a_half_character_hides_the_beginning_of_a_stop():
    with pytest.raises(AssertionError):
        _check_stops(_HoldsLate, "bytes")


def _check_stops(stream: type, kind: str) -> None:
    tokenizer, rng = tokenizer_of(kind), np.random.default_rng(8)
    stopped = 0
    for _ in range(60):
        tokens = _random_tokens(tokenizer, rng, int(rng.integers(2, 90)))
        text = tokenizer.decode(tokens)
        stops = ["never there"]
        for _ in range(rng.integers(1, 4)):  # most of them are in the text
            begin = int(rng.integers(0, len(text) + 1))
            part = text[begin : begin + int(rng.integers(1, 12))].strip(HALF)
            stops += [part] if part else []
        expected = expected_text(tokenizer, tokens, stops)
        for run in (1, 4, 100):
            streamed = _streamed(stream, tokenizer, tokens, run, stops)
            assert streamed == expected, (tokens, stops, run)
        stopped += expected[1] is not None
    assert stopped > 20


@pytest.mark.parametrize("stop", ["x🐶", "\n€", "### 用户", "🐶", "é👩‍👧", "🐶🐶"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_nothing_of_a_stop_inside_characters_is_shown(kind, stop):
    tokenizer = tokenizer_of(kind)
    for before, after in (("Hi ", " more"), ("", ""), ("€ 用", "€"), ("x" * 40, "y" * 40)):
        tokens = list((before + stop + after).encode())
        stream = TextStream(tokenizer, [STOP], [stop])
        shown = "".join(stream.add([token]) for token in tokens) + stream.close()
        # Sentencepiece strips a space from the beginning of a text only.
        assert shown == before and stream.tokens_at_stop == len((before + stop).encode())


@pytest.mark.parametrize("stop", ["x🐶", "\n€", "### 用户"])
def test_the_beginning_of_a_stop_that_does_not_come_is_shown(stop):
    tokenizer = tokenizer_of("bytes")
    for text in (stop[:-1], stop[:-1] + "é!", stop[:-1] + stop[0]):
        stream = TextStream(tokenizer, [STOP], [stop])
        shown = [stream.add([token]) for token in text.encode()]
        assert "".join(shown) + stream.close() == text and stream.tokens_at_stop is None


def test_the_first_of_several_stops_counts_though_another_ends_first():
    tokenizer = tokenizer_of("letters")
    tokens = tokenizer.convert_tokens_to_ids(list("abcdef"))
    for stops, text, count in (
        (["bcd", "c"], "ab", 3),
        (["cd", "bcde"], "ab", 4),
        (["bcx", "cde"], "ab", 5),
        (["f", "abcdefg"], "abcde", 6),
    ):
        assert _streamed(TextStream, tokenizer, tokens, 6, stops) == (text, count)


def test_a_stop_of_broken_bytes_is_found_once_they_stay_broken():
    tokenizer = tokenizer_of("bytes")
    broken = [*b"ab", 0xF0, 0x9F]
    assert _streamed(TextStream, tokenizer, [*broken, *b"c"], 1, ["b" + HALF]) == ("a", 5)
    assert _streamed(TextStream, tokenizer, broken, 1, ["b" + HALF]) == ("a", 4)
    assert _streamed(TextStream, tokenizer, [*broken, 0x90, 0xB6], 1, ["b" + HALF])[0] == "ab🐶"


def test_bytes_that_are_no_text_are_not_held_for_ever():
    tokenizer = tokenizer_of("sentencepiece")
    for tokens in ([0xFF] * 1000, list("日本語".encode()) * 200):
        stream = TextStream(tokenizer, [STOP])
        early = "".join(stream.add([token]) for token in tokens[:600])
        assert len(early) > 100 and tokenizer.decode(tokens).startswith(early)
        rest = "".join(stream.add([token]) for token in tokens[600:]) + stream.close()
        assert early + rest == tokenizer.decode(tokens) == stream.whole()


class _Counting:
    """Counts the tokens that a tokenizer decodes."""

    def __init__(self, tokenizer):
        self._tokenizer, self.count = tokenizer, 0

    def decode(self, tokens):
        self.count += len(tokens)
        return self._tokenizer.decode(tokens)

    def __len__(self):
        return len(self._tokenizer)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("stop", [(), ("never there",)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_work_per_token_does_not_grow_with_the_answer(kind, stop):
    assert _decoded(TextStream, kind, stop) < 1024 * 200


def test_planted_bug_the_whole_answer_is_decoded_again():
    class Again(TextStream):
        def _cut(self) -> None:
            pass

    with pytest.raises(AssertionError):
        assert _decoded(Again, "bytes", ()) < 1024 * 200


def _decoded(stream: type, kind: str, stop) -> int:
    """Tokens decoded to stream 1,024 random ones, one at a time."""
    counting = _Counting(tokenizer_of(kind))
    tokens = _random_tokens(counting, np.random.default_rng(9), 1024)
    _streamed(stream, counting, tokens, 1, stop)
    return counting.count

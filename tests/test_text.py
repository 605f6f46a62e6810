"""Streaming text never shows half a character."""

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

"""Streaming text never shows half a character."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beagle_jax.decoding.text import TextStream

STOP = 256


@pytest.fixture(scope="module")
def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)} | {"<stop>": STOP}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", ["plain", "café", "a 🐶 b", "日本語"])
def test_characters_arrive_whole(byte_tokenizer, text):
    stream, shown = TextStream(byte_tokenizer, [STOP]), ""
    for token in byte_tokenizer.encode(text):
        new = stream.add([token])
        assert "\ufffd" not in new
        shown += new
    assert shown + stream.close() == text


def test_stop_tokens_are_silent(byte_tokenizer):
    stream = TextStream(byte_tokenizer, [STOP])
    assert stream.add([*byte_tokenizer.encode("ok"), STOP]) + stream.close() == "ok"


def test_a_character_that_never_ends_is_shown_at_the_end(byte_tokenizer):
    stream = TextStream(byte_tokenizer, [STOP])
    assert stream.add(byte_tokenizer.encode("é")[:1]) == ""
    assert stream.close() == "\ufffd"

"""Tokenizers rebuilt from a GGUF file against transformers' with the same tokens and merges."""

import gguf
import pytest
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from beagle_jax.errors import UserError
from beagle_jax.weights import gguf_tokenizer
from beagle_jax.weights.gguf_header import read_header
from beagle_jax.weights.gguf_metadata import Metadata
from beagle_jax.weights.gguf_tokenizer import byte_level_tokenizer

SPECIALS = ["<|end|>", "<|im_start|>", "<|im_end|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["1 2", "12 3", "Ċ Ċ", "a b", "Ġ a", "Ġa b", "t h", "th e", "' s", "! Ċ", "Ã ©", "123 4"]
JOINED = [merge.replace(" ", "") for merge in MERGES]
# A word that no merges reach.
TOKENS = [*SPECIALS, *LETTERS, *JOINED, "abc"]
TEXTS = [
    "the ab's\n\n1. 12345 = 3",
    "  two  spaces,\ttab\r\n\r\nend  ",
    "cafe\u0301 caf\u00e9 \u4f60\u597d 한국어 🐶 x\u0301",
    "I'LL don't WE'VE!\n!!\n 's abc 1a2b 3.14159",
    "<|im_start|>user\nHi<|im_end|>\n",
]


def metadata(folder, pre, tokens=tuple(TOKENS), merges=tuple(MERGES), **more) -> Metadata:
    writer = gguf.GGUFWriter(folder / "tok.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    writer.add_token_merges(list(merges))
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in more.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Metadata(folder / "tok.gguf", read_header(folder / "tok.gguf").values)


def qwen2():
    """Makes transformers' own class, which knows its split and normal form."""
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    made = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(TOKENS)}, merges=merges)
    made.add_special_tokens({"additional_special_tokens": SPECIALS})
    return made


def check_qwen2(folder) -> None:
    expected, tokenizer = qwen2(), byte_level_tokenizer(metadata(folder, "qwen2"))
    for text in TEXTS:
        ids = expected.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == expected.decode(ids)


def test_qwen2_equals_transformers(tmp_path):
    check_qwen2(tmp_path)


@pytest.mark.parametrize("pattern", ["llama-bpe", "[a-z]+"])
def test_planted_bug_another_split(tmp_path, pattern, monkeypatch):
    patterns = gguf_tokenizer._PATTERNS
    other = patterns.get(pattern, pattern)
    monkeypatch.setattr(gguf_tokenizer, "_PATTERNS", {**patterns, "qwen2": other})
    with pytest.raises(AssertionError):
        check_qwen2(tmp_path)


def test_llama_3_splits_as_transformers_converter_does(tmp_path):
    """Its default pattern is that of Llama 3's own tokenizer.model."""
    tokenizer = byte_level_tokenizer(metadata(tmp_path, "llama-bpe", add_bos_token=False))
    expected = TikTokenConverter(vocab_file="unused").pattern
    assert gguf_tokenizer._PATTERNS["llama-bpe"] == expected
    digits = [tokenizer.convert_ids_to_tokens(i) for i in tokenizer.encode("12345")]
    assert digits == ["123", "4", "5"]
    # Whole, without merges.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abc")) == ["abc"]


@pytest.mark.parametrize(
    ("add_bos_token", "expected"), [(None, True), (True, True), (False, False)]
)
def test_llama_3_begins_with_its_first_token_unless_the_file_says_no(
    tmp_path, add_bos_token, expected
):
    more = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    tokenizer = byte_level_tokenizer(metadata(tmp_path, "llama-bpe", **more))
    assert (tokenizer.encode("ab")[0] == 1) is expected
    assert tokenizer.encode("ab", add_special_tokens=False)[0] != 1


def test_others_begin_with_no_token_unless_the_file_says_so(tmp_path):
    assert byte_level_tokenizer(metadata(tmp_path, "qwen2")).encode("ab") == [TOKENS.index("ab")]
    tokenizer = byte_level_tokenizer(metadata(tmp_path, "qwen2", add_bos_token=True))
    assert tokenizer.encode("ab") == [1, TOKENS.index("ab")]


def test_what_does_not_fit_together_is_damage(tmp_path):
    with pytest.raises(UserError, match="merge 'x yz' uses tokens that it lacks"):
        byte_level_tokenizer(metadata(tmp_path, "qwen2", merges=["x yz"]))
    with pytest.raises(UserError, match=r"tokens, .* types"):
        byte_level_tokenizer(metadata(tmp_path, "qwen2", tokens=[*TOKENS, "more"]))


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(UserError, match="tokenizer 'gpt2'/'olmo' cannot be built from GGUF"):
        byte_level_tokenizer(metadata(tmp_path, "olmo"))

"""Builds a byte-level BPE tokenizer from the metadata of a GGUF file.

The file holds tokens and merges, but only a name for the rule that splits text. A tokenizer can be
built if that name is known; other tokenizers are read from the model's own files.
"""

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from beagle_jax.errors import UserError
from beagle_jax.weights.gguf_metadata import Metadata

# GGUF token types, numbered as in the format.
_CONTROL, _USER_DEFINED = 3, 4
# The models' own patterns for splitting text, as in `tokenizer.json`.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"qwen2": _WORDS % "", "llama-bpe": _WORDS % "{1,3}"}
_KNOWN = ("smollm", *_PATTERNS)


def byte_level_tokenizer(metadata: Metadata) -> PreTrainedTokenizerBase:
    """Builds the file's tokenizer, with its chat template if it has one.

    Raises:
      UserError: the tokenizer cannot be built from the file.
    """
    model, pre = metadata.need("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _KNOWN:
        known = ", ".join(f"'gpt2'/{name!r}" for name in _KNOWN)
        raise UserError(
            f"{metadata.path}: tokenizer {model!r}/{pre!r} cannot be built from GGUF "
            f"(supported: {known}); put the model's tokenizer files (tokenizer.json, "
            "tokenizer_config.json, ..) beside it, or use its Hugging Face folder"
        )
    tokens = metadata.list("tokenizer.ggml.tokens")
    ids = {name: metadata.token_id(name, len(tokens)) for name in ("eos", "bos")}
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    tokenizer = _bpe(metadata, tokens, pre)
    if ids["bos"] is not None and metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A",
                    pair=f"{bos} $A {bos} $B",
                    special_tokens=[(bos, ids["bos"])],
                ),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _bpe(metadata: Metadata, tokens: list[str], pre: str) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    lines = metadata.list("tokenizer.ggml.merges") if metadata.get("tokenizer.ggml.merges") else []
    merges = [tuple(merge.split(" ", 1)) for merge in lines]
    unknown = [
        merge for merge in merges if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys()
    ]
    if unknown or len(vocab) != len(tokens):
        problem = (
            f"merge {' '.join(unknown[0])!r} uses tokens that it lacks"
            if unknown
            else "two of its tokens are equal"
        )
        raise UserError(
            f"{metadata.path}: the tokenizer is damaged ({problem}); download the file again"
        )
    # Llama 3 looks up the whole word before it applies merges.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_split(pre))
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.list("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise UserError(
            f"{metadata.path}: the tokenizer is damaged ({len(tokens)} tokens, {len(kinds)} "
            "types); download the file again"
        )
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def _split(pre: str) -> list[pre_tokenizers.PreTokenizer]:
    """Returns the steps that split text before merging."""
    if pre == "smollm":
        # Each digit is a token of its own. The GGUF loader of transformers omits this step and
        # splits "\n\n1." differently.
        return [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    return [
        pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]

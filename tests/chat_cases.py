"""A byte-level tokenizer with ChatML, and its tokens as readable text."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and one for each ChatML marker."""
    letters = {
        letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    model = Tokenizer(models.BPE(vocab=letters, merges=[]))
    model.pre_tokenizer, model.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHATML, **special)


def spell(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """Decodes tokens, with < and > for the markers of ChatML and / for the end of a line."""
    return (
        tokenizer.decode(tokens)
        .replace("<|im_start|>", "<")
        .replace("<|im_end|>", ">")
        .replace("\n", "/")
    )

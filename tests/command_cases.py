"""A tiny target in a Hugging Face folder and prompts, for tests of the commands."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = [f"What is {number}?" for number in range(12)]
EVAL_QUESTIONS = [
    "Why is it so?",
    "Who are you?",
    "And a much longer question, which takes more than sixty-four tokens of one byte?",
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and ChatML."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = Tokenizer(models.BPE(vocab=letters, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHATML, **special)


def make_target(folder: Path) -> None:
    """A random Llama of two layers with a byte-level tokenizer, as transformers writes it."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_lines(path: Path, questions: list[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    return str(path)

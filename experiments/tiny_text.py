"""Text and tokenizer of tiny targets: dialogues that SmolLM2 wrote, in a small byte-level BPE."""

import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.one_gpu.text_files import read_text

BEGIN, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}" + BEGIN + "{{ message['role'] + '\n' + message['content'] }}"
    f"{END}\n"
    "{% endfor %}{% if add_generation_prompt %}" + BEGIN + "assistant\n{% endif %}"
)
# The system turn that SmolLM2's template begins with.
_SYSTEM = re.compile(rf"^{re.escape(BEGIN)}system\n.*?{re.escape(END)}\n", re.S)
_PARTS = 32  # a prompt in one of these many parts is held out


class Dialogue(NamedTuple):
    """A user's turn and the answer, rendered."""

    text: str
    prompt: str  # the user's words
    held_out: bool  # by the prompt's name, so that a drawn and a greedy answer go together


def dialogues(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> Iterator[Dialogue]:
    """Reads parts of experiments/text as text, without the system turn.

    tokenizer: of the target that wrote them. Answers that were cut off end without an end token.

    Raises:
        UserError: a file has another format.
    """
    for file in files:
        for row in read_text(file):
            prompt, text = (
                _SYSTEM.sub("", tokenizer.decode(tokens, skip_special_tokens=False))
                for tokens in (row.prompt, row.prompt + row.answer)
            )
            words = prompt.removeprefix(f"{BEGIN}user\n").split(END)[0]
            part = zlib.crc32(row.prompt_id.encode()) % _PARTS
            yield Dialogue(text, words, part == 0)


def byte_level(texts: Iterator[str], size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of `size` tokens, with the chat template of SmolLM2 in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[BEGIN],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = TEMPLATE
    return made


def packed(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> np.ndarray:
    """Returns int32 [rows, length + 1]: all texts end to end; a row repeats the last token before.

    What does not fill a row is left out.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    stream = np.fromiter((token for ids in encoded for token in ids), np.int32)
    count = max((len(stream) - 1) // length, 0)
    return np.stack([stream[i * length : (i + 1) * length + 1] for i in range(count)])

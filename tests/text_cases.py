"""Writing text without a model: a writer that answers at once, and runs of several processes.

python tests/text_cases.py SOURCE FOLDER, with JAX_COORDINATOR_ADDRESS and so on set, is one of the
processes that fill a folder together.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from chat_cases import byte_tokenizer
from transformers import PreTrainedTokenizerFast

MADE_FOR = {"target": "a-target"}


class QuickWriter:
    """Answers a prompt by one to five tokens, the last row of a batch first."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch: int = 4):
        self._tokenizer, self._batch = tokenizer, batch
        self.prompts: list[str] = []

    def __call__(self, prompts, *, max_new, temperature, seed, on_tokens):
        self.prompts += [self._tokenizer.decode(prompt) for prompt in prompts]
        header = self._tokenizer.decode(prompts[0]).endswith("user\n")
        for begin in range(0, len(prompts), self._batch):
            for index in reversed(range(begin, min(begin + self._batch, len(prompts)))):
                words = f"Tell me of {seed + index}" if header else "x" * (index % 5)
                tokens = [*self._tokenizer.encode(words), self._tokenizer.eos_token_id]
                on_tokens(len(tokens))
                states_LD = np.zeros((len(prompts[index]) + len(tokens), 2), np.float32)
                yield SimpleNamespace(index=index, tokens=tokens, states_LD=states_LD)


def filled(
    folder: Path, source: str, share, batch: int = 4, vocab_size: int | None = None, **settings
) -> list:
    """Fills a folder as one of its processes; returns the rows to train on."""
    from beagle_jax.config import DataConfig
    from beagle_jax.corpus import waves
    from beagle_jax.corpus.text import training_rows

    waves.PART_ROWS = 4
    tokenizer = byte_tokenizer()
    given = {"answer_tokens": 60, "max_answer_tokens": 8, "states": "online"} | settings
    config = DataConfig(folder=str(folder), source=source, **given)
    writer = QuickWriter(tokenizer, batch)
    parts = training_rows(
        config,
        MADE_FOR,
        tokenizer,
        [tokenizer.eos_token_id],
        writer,
        share,
        vocab_size or len(tokenizer),
    )
    return [row for rows in parts.values() for row in rows]


def write_chats(path: Path, numbers, answered=lambda number: number % 3 == 0) -> str:
    """Writes questions, some of them with an answer."""
    records = []
    for number in numbers:
        messages = [{"role": "user", "content": f"Question {number}?"}]
        if answered(number):
            messages.append({"role": "assistant", "content": f"Answer {number}."})
        records.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(records))
    return str(path)


def main(source: str, folder: str) -> None:
    """Fills a folder together with the other processes, and prints its rows."""
    from beagle_jax.processes import join

    join(Namespace(distributed=False, quiet=False))
    from beagle_jax.data.share import this_process

    rows = filled(Path(folder), source, this_process())
    print("rows", json.dumps([row.tokens for row in rows]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

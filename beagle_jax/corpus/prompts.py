"""`data.source: self`: the package's own prompts, then prompts that the target generates."""

import random
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.corpus.writer import Writer
from beagle_jax.data.chats import own_prompts
from beagle_jax.data.share import Share
from beagle_jax.data.source import Lengths
from beagle_jax.data.template import Row, decoded, prompt_tokens, user_header
from beagle_jax.errors import UserError

# Generated prompts: sampled at high temperature for variety, kept only if they end in a stop token.
_MADE_UP_TEMPERATURE = 1.0
_MADE_UP_TOKENS = 48
_MADE_UP_WORDS = 3  # shorter ones are noise
_MADE_UP_AT_LEAST = 64  # prompts per call: of very few, none may be usable


def self_written_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    write: Writer,
    mine: Sequence[Sequence[Row]],
    share: Share,
    most: int,
    missing: Callable[[], int],
) -> Iterator[list[Row]]:
    """Yields groups of prompts: the package's own first, then generated ones; none twice.

    The target generates prompts by continuing its user header. mine: the rows that this process has
    written, by part. missing: returns the number of answer tokens still to be written. A group has
    as many prompts as these tokens need at half-length answers, at most `most`, because few large
    groups keep the writer's batch full.

    Raises: UserError if a group has no usable prompt.
    """
    chats = own_prompts("train")
    random.Random(config.seed).shuffle(chats)
    own = [prompt_tokens(tokenizer, chat.messages) for chat in chats[share.index :: share.count]]
    answered = {_prompt(row) for rows in mine for row in rows}
    known = answered | set(map(tuple, own))
    if fresh := [prompt for prompt in own if tuple(prompt) not in answered]:
        yield _fitting(config, fresh)
    header = user_header(tokenizer)
    # A part has prompts of at most one round, so a resumed run does not reuse an earlier seed.
    for round_number in range(max(len(mine), 1), 1_000_000):
        wanted = min(max(2 * missing() // config.max_answer_tokens, _MADE_UP_AT_LEAST), most)
        with tqdm(desc="writing prompts", unit="tok", leave=False) as bar:
            made = write(
                [header] * wanted,
                max_new=_MADE_UP_TOKENS,
                temperature=_MADE_UP_TEMPERATURE,
                seed=config.seed * 1_000_003 + round_number * share.count + share.index,
                on_tokens=bar.update,
            )
            texts = [
                decoded(tokenizer, answer.tokens[:-1]).strip()
                for answer in made
                if answer.tokens[-1] in eos_ids
            ]
        whole = sorted({text for text in texts if len(text.split()) >= _MADE_UP_WORDS})
        prompts = [prompt_tokens(tokenizer, [{"role": "user", "content": text}]) for text in whole]
        fresh = [prompt for prompt in prompts if tuple(prompt) not in known]
        if not fresh:
            raise UserError(
                "data.source: self: the target wrote no usable prompt; give prompts with "
                "data.source: file.jsonl"
            )
        known.update(map(tuple, fresh))
        yield _fitting(config, fresh)


def _fitting(config: DataConfig, prompts: list[list[int]]) -> list[Row]:
    lengths = Lengths(config)
    rows = list(lengths.fitting(Row(prompt, [False] * len(prompt)) for prompt in prompts))
    lengths.tell()
    return rows


def _prompt(row: Row) -> tuple[int, ...]:
    return tuple(row.tokens[: row.supervised.index(True)])

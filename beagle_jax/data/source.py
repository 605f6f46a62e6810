"""`data.source` as rows of tokens: chats with their answers, and prompts that wait for one."""

from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.config import DataConfig
from beagle_jax.data.chats import Chat, local_source, read_chats
from beagle_jax.data.folder import is_claimed
from beagle_jax.data.hub import hub_chats
from beagle_jax.data.template import Row, chat_row, prompt_tokens
from beagle_jax.errors import UserError


def source_chats(config: DataConfig) -> Iterable[Chat]:
    """The chats of `data.source`, whatever it is but the target itself. Raises UserError for one
    that cannot be read.
    """
    if config.source.startswith("hf:"):
        return hub_chats(config.source.removeprefix("hf:"), config.split, config.streaming)
    return read_chats(config.source)


def check_source(config: DataConfig) -> None:
    """Raises UserError for a text that is neither there nor written already: asked before a target
    is loaded for it, which takes long.
    """
    if (
        config.source != "self"
        and not config.source.startswith("hf:")
        and not is_claimed(config.folder)
    ):
        local_source(config.source)


def source_rows(
    config: DataConfig,
    chats: Iterable[Chat],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
) -> Iterator[Row]:
    """One row of each chat that can teach something; a row without supervised tokens waits for the
    target's answer.

    Says what it leaves out: prompts that are too long, and chats without an answer before the cut.
    """
    prompts = too_long = given = unanswered = 0
    for chat in chats:
        if chat.waits_for_answer or config.answers == "regenerate":
            prompts += 1
            messages = chat.messages if config.answers == "keep" else chat.question
            tokens = prompt_tokens(tokenizer, messages, chat.where)
            if len(tokens) <= config.max_prompt_tokens:
                yield Row(tokens, [False] * len(tokens))
            else:
                too_long += 1
        else:
            given += 1
            row = chat_row(tokenizer, chat, eos_ids)
            row = Row(
                row.tokens[: config.max_chat_tokens], row.supervised[: config.max_chat_tokens]
            )
            if any(row.supervised[:-1]):  # the last position predicts nothing
                yield row
            else:
                unanswered += 1
    if too_long:
        tqdm.write(
            f"left out {too_long} of {prompts} prompts longer than {config.max_prompt_tokens} "
            "tokens"
        )
    if unanswered:
        tqdm.write(
            f"left out {unanswered} of {given} chats without an answer in their first "
            f"{config.max_chat_tokens} tokens"
        )
    if prompts and too_long == prompts and not given:
        raise UserError(
            f"data.max_prompt_tokens is {config.max_prompt_tokens}, but every prompt is "
            "longer; raise it"
        )
    if given and unanswered == given and not prompts:
        raise UserError(
            f"data.max_chat_tokens is {config.max_chat_tokens}, but every answer begins later; "
            "raise it"
        )

"""From chats to tokens through the target's chat template, and which tokens are supervised
(method.md 5.2).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from beagle_jax.data.chats import Chat, Message, check_text
from beagle_jax.errors import UserError

# Stands in for a user's text while the template's header is cut out.
_MARK = "\u2603beagle\u2603"


class Row(NamedTuple):
    """One training sequence."""

    tokens: list[int]
    supervised: list[bool]  # the token is part of an assistant answer (its stop token included)


def supervised_tokens(rows: Iterable[Row]) -> int:
    """How many tokens of the rows are supervised."""
    return sum(sum(row.supervised) for row in rows)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str = "prompt"
) -> list[int]:
    """Tokens up to where the assistant's answer begins. `where` is named in the message of an
    error.
    """
    return _render(tokenizer, messages, True, where)


def chat_row(tokenizer: PreTrainedTokenizerBase, chat: Chat, eos_ids: Sequence[int]) -> Row:
    """Tokens and supervision of a chat with answers. Raises UserError naming file and line.

    An answer's span is what the template adds after the generation prompt, up to its last stop
    token. That needs each prefix of the chat to render as a prefix of the whole; a template that
    rewrites earlier turns is refused.
    """
    tokens = _render(tokenizer, chat.messages, False, chat.where)
    supervised = [False] * len(tokens)
    for index, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, chat.messages[:index], True, chat.where)
        through = _render(tokenizer, chat.messages[: index + 1], False, chat.where)
        if through[: len(before)] != before or tokens[: len(through)] != through:
            raise UserError(
                f"{chat.where}: the chat template renders message {index + 1} differently "
                "inside the whole chat than at its end, so the answer's tokens cannot be told "
                "apart; use a template without such rewriting"
            )
        span = range(len(before), len(through))
        stops = [position for position in span if through[position] in eos_ids]
        end = stops[-1] + 1 if stops else len(through)
        supervised[len(before) : end] = [True] * (end - len(before))
    if not any(supervised):
        raise UserError(
            f"{chat.where}: no token of this chat is supervised (no assistant text); the draft "
            "learns nothing from it"
        )
    return Row(tokens, supervised)


def user_header(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of the template up to where the user's text begins: what makes the target invent a
    prompt.
    """
    _render(
        tokenizer, [{"role": "user", "content": _MARK}], True, "data.source: self"
    )  # refuses an unusable template
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    head, found, _ = text.partition(_MARK)
    if not found:
        raise UserError(
            "the chat template does not contain the user's text unchanged; data.source: self "
            "needs that"
        )
    return tokenizer.encode(head, add_special_tokens=False)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    where: str,
) -> list[int]:
    if tokenizer.chat_template is None:
        raise UserError(
            "the target's tokenizer has no chat template; use an instruction-tuned model"
        )
    for message in messages:
        check_text(message.get("content"), where)
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
        )
    except TemplateError as error:
        raise UserError(
            f"{where}: the target's chat template refuses these messages ({error})"
        ) from error
    return list(encoded["input_ids"])

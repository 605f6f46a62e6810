"""Chats as tokens, by the target's chat template, with supervision flags (method.md 5.2)."""

import re
from bisect import bisect_right
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from transformers import PreTrainedTokenizerBase

from beagle_jax.data.chats import BadRecord, Chat, Message, check_text
from beagle_jax.errors import UserError

# A value that `weights/chat_template.py` gives a variable before the template; strings may hold %}.
_SET = re.compile(r'\{% set (\w+) = (?:"(?:[^"\\]|\\.)*"|[^"%]|%(?!\}))*? %\}')
# Placeholder for a user's text, to find the header that the template puts before it.
_MARK = "\u2603beagle\u2603"


class TemplateRefusal(UserError):
    """The target's chat template raised an error for these messages."""

    def __init__(self, where: str, error: str) -> None:
        self.reason = f"the target's chat template refuses these messages ({error})"
        super().__init__(f"{where}: {self.reason}")


class Row(NamedTuple):
    """One training sequence."""

    tokens: list[int]
    supervised: list[bool]  # the token belongs to an assistant answer, its stop token included
    # Of a prompt, if more than its next answer is to be written: the whole chat.
    chat: Chat | None = None

    @property
    def answers(self) -> int:
        """Number of answers that are to be written; of a row with answers, 0."""
        if any(self.supervised):
            return 0
        return len(self.chat.contexts) if self.chat else 1


def supervised_tokens(rows: Iterable[Row]) -> int:
    """Returns the number of supervised tokens of the rows."""
    return sum(sum(row.supervised) for row in rows)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str = "prompt",
    variables: Mapping[str, Any] | None = None,
    *,
    overrides: bool = False,
) -> list[int]:
    """Returns the tokens before the assistant's next answer, generation prompt included.

    where: place of the messages, for error messages. variables: other inputs of the template
    (tools, documents, enable_thinking, ..). overrides: they replace values that the settings of the
    target gave the template.

    Raises:
        UserError: as `render`.
    """
    text = render(tokenizer, messages, True, where, variables, overrides=overrides)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_rows(tokenizer: PreTrainedTokenizerBase, chat: Chat, eos_ids: Sequence[int]) -> list[Row]:
    """Returns tokens and supervision of a chat with answers: one row, or one row per answer.

    The span of an answer is the text that the template adds after the generation prompt, up to the
    answer's last stop token. A token that starts before the span and ends in it is supervised. Some
    templates render an answer differently once the chat continues (Qwen3 drops earlier thinking).
    Then each answer gets its own row, rendered as the last answer of its chat.

    Raises:
        BadRecord: no token is supervised, or an answer cannot be separated from its prompt.
        UserError: as `render`.
    """
    spans = [
        _span(tokenizer, chat, index)
        for index, message in enumerate(chat.messages)
        if message["role"] == "assistant" and index not in chat.untrained
    ]
    whole = render(tokenizer, chat.messages, False, chat.where, chat.variables)
    if all(whole.startswith(span.text) for span in spans):
        rows = [_row(tokenizer, whole, spans, eos_ids)]
    else:
        rows = [_row(tokenizer, span.text, [span], eos_ids) for span in spans]
    rows = [row for row in rows if any(row.supervised)]
    if not rows:
        raise BadRecord("no token is supervised (no assistant text), so a draft learns nothing")
    return rows


class _Span(NamedTuple):
    """An answer and the chat before it; the answer is text[begin:]."""

    text: str
    begin: int


def _span(tokenizer: PreTrainedTokenizerBase, chat: Chat, index: int) -> _Span:
    """Returns the answer in message `index`, rendered as the last message of its chat."""
    before = render(tokenizer, chat.messages[:index], True, chat.where, chat.variables)
    through = render(tokenizer, chat.messages[: index + 1], False, chat.where, chat.variables)
    if not through.startswith(before):
        raise BadRecord(
            "the chat template does not begin an answer with its generation prompt, so the "
            "answer's tokens cannot be identified"
        )
    return _Span(through, len(before))


def _row(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[_Span], eos_ids: Sequence[int]
) -> Row:
    """Tokenizes the text and supervises each span up to its last stop token."""
    tokens, ends = _tokens_and_ends(tokenizer, text)
    supervised = [False] * len(tokens)
    for span in spans:
        first, last = bisect_right(ends, span.begin), bisect_right(ends, len(span.text))
        stops = [place for place in range(first, last) if tokens[place] in eos_ids]
        last = stops[-1] + 1 if stops else last
        supervised[first:last] = [True] * (last - first)
    return Row(tokens, supervised)


def _tokens_and_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Returns token ids and the character index at which each token ends, non-decreasing."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = accumulate((end for _, end in encoded["offset_mapping"]), max)
    return list(encoded["input_ids"]), list(ends)


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Returns the text of one sequence of tokens."""
    text = tokenizer.decode(list(tokens))
    assert isinstance(text, str)  # a list of texts only for a list of sequences
    return text


def user_header(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that the template puts before the user's text.

    From these the target generates a prompt of its own (`data.source: self`).

    Raises:
        UserError: the template changes the user's text, or as `render`.
    """
    text = render(tokenizer, [{"role": "user", "content": _MARK}], True, "data.source: self")
    head, mark, _ = text.partition(_MARK)
    if not mark:
        raise UserError(
            "the chat template changes the user's text; data.source: self needs a template that "
            "does not"
        )
    return tokenizer.encode(head, add_special_tokens=False)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    where: str,
    variables: Mapping[str, Any] | None = None,
    *,
    overrides: bool = False,
) -> str:
    """Renders messages with the target's chat template. See `prompt_tokens` for the variables.

    Raises:
        UserError: the tokenizer has no template, or the template refuses these messages.
    """
    template = _template(tokenizer)
    if overrides and variables:
        template = _without(template, variables)
    for message in messages:
        check_text(message.get("content"), where)
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **(variables or {}),
        )
    except TemplateError as error:
        raise TemplateRefusal(where, str(error)) from error
    assert isinstance(text, str)  # one chat, not tokenized
    return text


def _without(template: str, names: Container[str]) -> str:
    """Removes what `weights/chat_template.py` wrote before a template for some variables."""
    left, place = "", 0
    while match := _SET.match(template, place):
        left += "" if match[1] in names else match[0]
        place = match.end()
    return left + template[place:]


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the tokenizer's template; of several named templates, the default."""
    template = tokenizer.chat_template
    if template is None:
        raise UserError(
            "the target's tokenizer has no chat template; use an instruction-tuned model, or "
            "give the text without one (--raw, raw=True, or target.chat_template: none)"
        )
    if isinstance(template, Mapping):
        if "default" not in template:
            raise UserError(
                "the target's tokenizer has several chat templates and none is the default "
                f"({', '.join(template)}); keep one in the model's folder as chat_template.jinja"
            )
        return template["default"]
    return template


def template_reads(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Returns the names of all variables and fields that the template reads."""
    # Those that transformers has.
    extensions: list[str | type[Extension]] = [_Generation, "jinja2.ext.loopcontrols"]
    try:
        tree = Environment(extensions=extensions).parse(_template(tokenizer))
    except TemplateError as error:
        raise UserError(f"the target's chat template cannot be read ({error})") from error
    names = {node.name for node in tree.find_all(nodes.Name)}
    names |= {node.attr for node in tree.find_all(nodes.Getattr)}
    fields = [node.arg for node in tree.find_all(nodes.Getitem)]
    return frozenset(names | {field.value for field in fields if isinstance(field, nodes.Const)})


class _Generation(Extension):
    """Parses the `generation` tag, which transformers adds to the template language."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

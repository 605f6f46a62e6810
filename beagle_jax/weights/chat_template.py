"""Chooses a tokenizer's chat template: `target.chat_template` and `target.template_variables`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from beagle_jax.errors import UserError

NO_TEMPLATE = "none"
_RAW = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def choose_template(
    tokenizer: PreTrainedTokenizerBase,
    choice: str | None,
    variables: Mapping[str, Any],
    where: str,
) -> PreTrainedTokenizerBase:
    """The tokenizer, whose chat template is the chosen one from here on.

    choice: None for the tokenizer's own (of several named ones the default), `none` for text as it
    is, the name of one of several, or a file. variables: what the template reads beside the
    messages, `enable_thinking` for example; they become part of it, so its hash tells them apart.
    where: the target's source, for messages. A tokenizer without a template stays without one: only
    rendering messages needs it. Raises UserError for a template that is not there.
    """
    template = _chosen(tokenizer, choice, where)
    if template is not None and variables:
        template = _settings(variables, where) + template
    tokenizer.chat_template = template
    return tokenizer


def _chosen(tokenizer: PreTrainedTokenizerBase, choice: str | None, where: str) -> str | None:
    own = tokenizer.chat_template
    named = own if isinstance(own, Mapping) else {}
    if choice == NO_TEMPLATE:
        # What the tokenizer puts before any text, a beginning-of-text token or nothing.
        return tokenizer.decode(tokenizer("")["input_ids"]) + _RAW
    if choice is None:
        return named.get("default", own) if named else own
    if choice in named:
        return named[choice]
    path = Path(choice).expanduser()
    if not path.is_file():
        names = ", ".join([*named, NO_TEMPLATE])
        raise UserError(
            f"target.chat_template: {choice!r} is no file; expected one, null for the template of "
            f"{where}, or one of {names} ({NO_TEMPLATE}: text as it is)"
        )
    return path.read_text(encoding="utf-8")


def _settings(variables: Mapping[str, Any], where: str) -> str:
    """Statements that give the variables their values."""
    statements = "".join(
        f"{{% set {name} = {_literal(value)} %}}" for name, value in variables.items()
    )
    try:
        Environment().parse(statements)
    except TemplateError as error:
        raise UserError(
            f"target.template_variables: {dict(variables)!r} for {where} cannot be set in a "
            f"template ({error}); expected names and plain values"
        ) from error
    return statements


def _literal(value: Any) -> str:
    """A value as jinja2 writes it: JSON, but for the word for nothing."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)

"""Sets a tokenizer's chat template from the settings of the target.

The settings are `target.chat_template` and `target.template_variables`.
"""

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
    """Replaces the tokenizer's chat template by the chosen one and returns the tokenizer.

    A tokenizer without a template stays without one: only rendering of messages needs it.

    Args:
      tokenizer: changed in place.
      choice: None keeps the tokenizer's own template (the default one, if it has several). `none`
        joins the messages' text without markup. Otherwise the name of one of several templates,
        or the path of a template file.
      variables: values that the template reads beside the messages, `enable_thinking` for
        example. They become part of the template, so the template's hash changes with them.
      where: the target's source, for error messages.

    Raises:
      UserError: there is no such template, or a variable cannot be set in one.
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
        # The tokenizer's own prefix: a beginning-of-text token, or nothing.
        prefix = tokenizer.decode(tokenizer("")["input_ids"])
        assert isinstance(prefix, str)  # of one text
        return prefix + _RAW
    if choice is None:
        return named.get("default", own) if named else own
    if choice in named:
        return named[choice]
    path = Path(choice).expanduser()
    if not path.is_file():
        names = ", ".join([*named, NO_TEMPLATE])
        raise UserError(
            f"target.chat_template: {choice!r} is no file; expected a file, null for the template "
            f"of {where}, or one of {names} ({NO_TEMPLATE}: plain text)"
        )
    return path.read_text(encoding="utf-8")


def _settings(variables: Mapping[str, Any], where: str) -> str:
    """Writes jinja2 statements that set the variables."""
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
    """Writes a value as a jinja2 literal: JSON, except that null is `none`."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)

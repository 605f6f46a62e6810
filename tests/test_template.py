"""From chats to tokens: which tokens are supervised, on a toy ChatML tokenizer.

The tokenizer has one token per byte and one for each marker, so a row can be written as text with
`<` for <|im_start|> and `>` for <|im_end|>, and its supervision as a line of dots and carets below
it.
"""

import pytest
from chat_cases import CHATML, byte_tokenizer, spell
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beagle_jax.data.chats import BadRecord, Chat
from beagle_jax.data.template import Row, chat_rows, prompt_tokens, template_reads, user_header
from beagle_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def using(tokenizer, monkeypatch):
    """Gives the tokenizer another chat template for one test."""
    return lambda template: monkeypatch.setattr(tokenizer, "chat_template", template)


def chat(*texts: str, system: str | None = None) -> Chat:
    """Makes turns of user and assistant, after a system message if there is one."""
    messages = [
        {"role": ("user", "assistant")[turn % 2], "content": text}
        for turn, text in enumerate(texts)
    ]
    return Chat(
        tuple(messages if system is None else [{"role": "system", "content": system}, *messages]),
        "chats.jsonl:7",
    )


def check(tokenizer, row: Row, text: str, marks: str) -> None:
    """Checks that the row spells `text` and is supervised where `marks` has a caret.

    The end of a line is /.
    """
    assert len(row.tokens) == len(row.supervised) == len(text)
    assert spell(tokenizer, row.tokens) == text
    assert "".join(".^"[flag] for flag in row.supervised) == marks


def row_of(tokenizer, conversation: Chat, eos_ids=None) -> Row:
    (row,) = chat_rows(
        tokenizer, conversation, [tokenizer.eos_token_id] if eos_ids is None else eos_ids
    )
    return row


def test_the_answer_and_its_stop_token_are_supervised(tokenizer):
    check(
        tokenizer,
        row_of(tokenizer, chat("Hi", "Yo!")),
        "<user/Hi>/<assistant/Yo!>/",
        ".....................^^^^.",
    )


def test_every_answer_of_a_chat_is_supervised(tokenizer):
    check(
        tokenizer,
        row_of(tokenizer, chat("a", "bc", "d", "e", system="S")),
        "<system/S>/<user/a>/<assistant/bc>/<user/d>/<assistant/e>/",
        "...............................^^^.....................^^.",
    )


def test_a_question_at_the_end_is_not_supervised(tokenizer):
    check(
        tokenizer,
        row_of(tokenizer, chat("a", "bc", "d")),
        "<user/a>/<assistant/bc>/<user/d>/",
        "....................^^^..........",
    )


def test_without_a_stop_token_all_of_the_answer_counts(tokenizer):
    check(
        tokenizer,
        row_of(tokenizer, chat("Hi", "Yo!"), eos_ids=[1]),
        "<user/Hi>/<assistant/Yo!>/",
        ".....................^^^^^",
    )


@pytest.mark.parametrize(
    "bug",
    [
        lambda flags: [False, *flags[:-1]],
        lambda flags: [*flags[1:], False],
        lambda flags: [*flags[:-2], False, False],
    ],
)
def test_a_shifted_mask_is_seen(tokenizer, bug):
    row = row_of(tokenizer, chat("Hi", "Yo!"))
    with pytest.raises(AssertionError):
        check(
            tokenizer,
            row._replace(supervised=bug(row.supervised)),
            "<user/Hi>/<assistant/Yo!>/",
            ".....................^^^^.",
        )


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% "
    "generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] "
    "}}<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt "
    "%}<|im_start|>assistant\n{% endif %}"
)


def check_against_markers(tokenizer, row: Row, conversation: Chat) -> None:
    """Checks that the row is supervised inside the template's {% generation %} markers.

    transformers finds them.
    """
    theirs = tokenizer.apply_chat_template(
        list(conversation.messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert row.tokens == list(theirs["input_ids"])
    assert [int(flag) for flag in row.supervised] == list(theirs["assistant_masks"])


def test_supervised_tokens_are_those_that_a_template_marks(tokenizer, using):
    using(MARKED)
    conversation = chat("caf\u00e9?", "o\u00f9 \u2603", "a", "b")
    row = row_of(tokenizer, conversation)
    check_against_markers(tokenizer, row, conversation)
    with pytest.raises(AssertionError):
        check_against_markers(
            tokenizer, row._replace(supervised=[False, *row.supervised[:-1]]), conversation
        )


def test_prompt_tokens_end_where_the_answer_begins(tokenizer):
    prompt = prompt_tokens(tokenizer, chat("Hi").messages)
    assert spell(tokenizer, prompt) == "<user/Hi>/<assistant/"
    row = row_of(tokenizer, chat("Hi", "Yo!"))
    assert row.tokens[: len(prompt)] == prompt and row.supervised.index(True) == len(prompt)


def test_user_header_ends_where_the_question_begins(tokenizer, using):
    assert spell(tokenizer, user_header(tokenizer)) == "<user/"
    using("<|im_start|>system\nBe brief<|im_end|>\n" + CHATML)
    assert spell(tokenizer, user_header(tokenizer)) == "<system/Be brief>/<user/"


def test_a_template_that_rewrites_earlier_turns_gives_a_row_for_each_answer(tokenizer, using):
    """Like Qwen3's template, which drops the thinking of earlier turns."""
    using(
        CHATML.replace(
            "m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '...')"
        )
    )
    assert row_of(tokenizer, chat("Hi", "Yo!")).supervised.count(True) == 4
    first, second = chat_rows(tokenizer, chat("Hi", "Yo!", "a", "b"), [tokenizer.eos_token_id])
    check(tokenizer, first, "<user/Hi>/<assistant/Yo!>/", ".....................^^^^.")
    check(
        tokenizer,
        second,
        "<user/Hi>/<assistant/...>/<user/a>/<assistant/b>/",
        "." * 46 + "^^.",
    )


def test_a_generation_prompt_that_the_answer_does_not_follow_is_refused(tokenizer, using):
    using(CHATML.replace("assistant\n", "assistant\n<think>\n"))
    with pytest.raises(BadRecord, match="does not begin an answer with its generation prompt"):
        row_of(tokenizer, chat("Hi", "Yo!"))


def test_a_chat_without_an_answer_is_refused(tokenizer):
    with pytest.raises(BadRecord, match="no token is supervised"):
        row_of(tokenizer, chat("Hi"))


MERGING = r"\s*[\r\n]+|[^\r\n]+"


def merging_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Makes a tokenizer that merges two pairs: two line ends, and a space with an H."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u010a\u010a", "\u0120H"]
    model = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[("\u010a", "\u010a"), ("\u0120", "H")],
        )
    )
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(MERGING), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


SPACED = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answer", "merged"), [(CHATML, "\nHello", "\n\n"), (SPACED, "Hello", " H")]
)
def test_a_token_that_reaches_over_the_border_is_supervised(template, answer, merged):
    tokenizer = merging_tokenizer(template)
    row = row_of(tokenizer, chat("x", answer))
    first = row.supervised.index(True)
    assert tokenizer.decode(row.tokens[first]) == merged
    after = merged.replace(" ", "").removeprefix("\n") + tokenizer.decode(row.tokens[first + 1 :])
    assert after.startswith(answer)
    supervised = [token for token, flag in zip(row.tokens, row.supervised, strict=True) if flag]
    assert tokenizer.decode(supervised[1:]) == tokenizer.decode(supervised)[len(merged) :]
    assert supervised[-1] == tokenizer.eos_token_id


def test_what_the_template_reads_is_rendered_and_weight_0_is_not_supervised(tokenizer, using):
    using(
        CHATML.replace(
            "{{ m['content'] }}",
            "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m['content'] }}"
            "{% if tools %}[{{ tools[0].name }}]{% endif %}",
        )
    )
    assert {"reasoning_content", "tools"} <= template_reads(tokenizer)
    assert "documents" not in template_reads(tokenizer)
    messages = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "e"},
    )
    conversation = Chat(
        messages, "x:1", untrained=frozenset({1}), variables={"tools": [{"name": "t"}]}
    )
    check(
        tokenizer,
        row_of(tokenizer, conversation),
        "<user/a[t]>/<assistant/b[t]>/<user/c[t]>/<assistant/(e)d[t]>/",
        "." * 52 + "^^^^^^^^.",
    )


def test_of_several_named_templates_the_default_is_used(tokenizer, using):
    using({"default": CHATML, "tool_use": "x"})
    assert (
        spell(tokenizer, prompt_tokens(tokenizer, chat("Hi").messages)) == "<user/Hi>/<assistant/"
    )
    using({"tool_use": "x", "rag": "y"})
    with pytest.raises(UserError, match=r"several chat templates .* \(tool_use, rag\)"):
        prompt_tokens(tokenizer, chat("Hi").messages)


def test_a_tokenizer_without_a_template_is_refused(tokenizer, using):
    using(None)
    for ask in (
        lambda: prompt_tokens(tokenizer, chat("Hi").messages),
        lambda: row_of(tokenizer, chat("Hi", "Yo")),
    ):
        with pytest.raises(
            UserError, match="tokenizer has no chat template; use an instruction-tuned model"
        ):
            ask()
    with pytest.raises(UserError, match="tokenizer has no chat template"):
        user_header(tokenizer)


def test_messages_that_the_template_refuses_are_named(tokenizer, using):
    using(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHATML
    )
    with pytest.raises(
        UserError, match=r"chats.jsonl:7: the target's chat template refuses .* \(no system role\)"
    ):
        row_of(tokenizer, chat("Hi", "Yo", system="S"))
    with pytest.raises(UserError, match=r"prompt: the target's chat template refuses"):
        prompt_tokens(tokenizer, chat("Hi", system="S").messages)


def test_a_template_that_changes_the_question_has_no_header(tokenizer, using):
    using(CHATML.replace("m['content']", "m['content'] | replace('\u2603', '*')"))
    with pytest.raises(UserError, match="changes the user's text"):
        user_header(tokenizer)


def test_what_a_template_reads_is_found_under_the_extensions_of_transformers(tokenizer, using):
    using(
        "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.name }}"
        "{% endfor %}"
    )
    assert "name" in template_reads(tokenizer)
    using("{% for m in messages %}")
    with pytest.raises(UserError, match="the target's chat template cannot be read"):
        template_reads(tokenizer)

"""Prompts as messages, raw text and tokens; variables of the template from config and call."""

import jax.numpy as jnp
import numpy as np
import pytest
from chat_cases import byte_tokenizer
from command_cases import make_target
from decode_cases import letters, target_of

from beagle_jax import SpeculativeDecoder, generate, load_target
from beagle_jax.decoding.requests import Codec
from beagle_jax.errors import PromptError, UserError, run_main
from beagle_jax.weights.chat_template import choose_template

PLAIN = "{{ messages[0]['role'][0] + messages[0]['content'] }}a"
SHOUTING = "{{ messages[0]['content'] }}{% if shout %}!{% endif %}{{ mark }}"


def codec(template: str | None = None, **variables) -> Codec:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or PLAIN
    choose_template(tokenizer, None, variables, "here")
    return Codec(tokenizer, (), 300, 64)


def text(made: Codec, prompt, **options) -> str:
    assert made.tokenizer is not None
    return made.tokenizer.decode(made.encode(prompt, **options))


def test_text_and_messages_pass_the_template_and_raw_text_does_not():
    made = codec()
    assert text(made, "AB") == text(made, [{"role": "user", "content": "AB"}]) == "uABa"
    assert text(made, "AB", raw=True) == "AB"


def test_raw_text_begins_as_the_tokenizer_begins_every_text():
    made = codec()
    plain = type(made.tokenizer).__call__

    class Beginning(type(made.tokenizer)):
        def __call__(self, text, **settings):
            encoded = plain(self, text, **settings)
            if settings.get("add_special_tokens", True):
                encoded["input_ids"] = [3, *encoded["input_ids"]]
            return encoded

    made.tokenizer.__class__ = Beginning
    assert made.encode("AB", raw=True)[0] == 3 and made.encode("AB")[0] != 3


@pytest.mark.parametrize("array", [list, tuple, np.array, jnp.array, lambda ids: np.uint8(ids)])
@pytest.mark.parametrize("raw", [False, True])
def test_tokens_of_any_integer_array_stay_what_they_are(array, raw):
    assert codec().encode(array([5, 0, 60]), raw=raw) == [5, 0, 60]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([{"role": "user", "content": "A"}], r"messages for the chat template, and raw is set"),
    ],
)
def test_what_cannot_be_raw_is_refused(prompt, message):
    with pytest.raises(PromptError, match=message):
        codec().encode(prompt, raw=True)


def test_variables_of_a_call_replace_those_of_the_settings():
    made = codec(SHOUTING, shout=False, mark='"%} ')
    assert text(made, "A") == 'A"%} '
    assert text(made, "A", variables={"shout": True}) == 'A!"%} '
    assert text(made, "A", variables={"mark": "B"}) == "AB"
    assert text(made, "A", variables={"shout": True, "mark": "B"}) == "A!B"


def test_variables_that_the_settings_hide_would_be_seen(monkeypatch):
    monkeypatch.setattr("beagle_jax.data.template._without", lambda template, names: template)
    with pytest.raises(AssertionError):
        test_variables_of_a_call_replace_those_of_the_settings()


def test_generate_takes_both(monkeypatch):
    target = target_of(tokenizer=letters())
    decoder = SpeculativeDecoder(target)

    def answer(prompt, **options) -> list[int]:
        return decoder.generate([prompt], max_new_tokens=6, **options)[0].tokens

    assert answer("AB", raw=True) == answer([32, 33]) != answer("AB")
    decoder.warm_up(["AB"], raw=True, max_new_tokens=6)
    streamed = decoder.stream("AB", raw=True, max_new_tokens=6)
    assert streamed.answer.tokens == answer([32, 33])
    target.tokenizer.chat_template = SHOUTING
    assert answer("A", template_variables={"mark": "B"}) == answer([32, 33])
    for options, message in (
        ({"raw": 1}, "raw is 1; expected True or False"),
        ({"template_variables": "x"}, r"template_variables is 'x'; expected a mapping"),
        ({"template_variables": {"a b": 1}}, "expected a mapping of names"),
    ):
        with pytest.raises(UserError, match=message):
            answer("A", **options)


def test_a_base_model_takes_raw_text_and_says_so(tmp_path, capsys):
    make_target(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    target = load_target(tmp_path / "base")
    with pytest.raises(PromptError, match=r"no chat template; .*raw=True, or target\.chat_templ"):
        SpeculativeDecoder(target).generate(["Hi"])
    argv = [f"target.source={tmp_path / 'base'}", "draft.path=lookup", "decode.max_new_tokens=4"]
    texts = []
    for more in (["--raw"], ["target.chat_template=none"]):
        assert run_main(generate.main, [*argv, *more, "Hi", "--quiet"]) == 0
        texts.append(capsys.readouterr().out.partition("plain ")[0])
    assert texts[0] == texts[1]
    assert run_main(generate.main, [*argv, "Hi"]) == 1
    assert "give the text without one (--raw" in capsys.readouterr().err
    assert run_main(generate.main, [*argv, "--chat", "--raw"]) == 2

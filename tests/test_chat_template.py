"""`target.chat_template` and `target.template_variables`."""

import pytest
from chat_cases import byte_tokenizer

from beagle_jax.config import load_config
from beagle_jax.data.template import prompt_tokens
from beagle_jax.errors import UsageError, UserError
from beagle_jax.weights.chat_template import choose_template

MESSAGES = [{"role": "user", "content": "Hi"}]
OTHER = "{{ messages[0]['content'] }}{% if shout %}!{% endif %}{{ times }}"


def text_of(tokenizer) -> str:
    return tokenizer.decode(prompt_tokens(tokenizer, MESSAGES))


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def chosen(tokenizer, choice=None, variables=None) -> str:
    return text_of(choose_template(tokenizer, choice, variables or {}, "here"))


def test_null_is_the_targets_own_template(tokenizer):
    own = text_of(tokenizer)
    assert chosen(tokenizer) == own and own != "Hi"


def test_none_is_text_as_it_is(tokenizer):
    assert chosen(tokenizer, "none") == "Hi"


def test_none_keeps_what_the_tokenizer_begins_every_text_with(tokenizer):
    begin = tokenizer.convert_ids_to_tokens(3)
    plain = type(tokenizer).__call__

    class Beginning(type(tokenizer)):
        def __call__(self, text, **settings):
            encoded = plain(self, text, **settings)
            if settings.get("add_special_tokens", True):
                encoded["input_ids"] = [3, *encoded["input_ids"]]
            return encoded

    tokenizer.__class__ = Beginning
    assert chosen(tokenizer, "none") == begin + "Hi"


def test_one_of_several_by_name(tokenizer):
    tokenizer.chat_template = {"default": "D", "rag": OTHER}
    assert chosen(tokenizer, "rag") == "Hi"


def test_a_file(tokenizer, tmp_path):
    (tmp_path / "mine.jinja").write_text(OTHER)
    assert chosen(tokenizer, str(tmp_path / "mine.jinja")) == "Hi"
    with pytest.raises(UserError, match=r"target.chat_template: 'mine' is no file; .* none"):
        choose_template(tokenizer, "mine", {}, "here")


def test_variables_reach_the_template(tokenizer):
    tokenizer.chat_template = OTHER
    assert chosen(tokenizer, None, {"shout": True, "times": 3}) == "Hi!3"
    tokenizer.chat_template = OTHER
    assert chosen(tokenizer, None, {"shout": False, "times": None}) == "HiNone"
    with pytest.raises(UserError, match=r"target.template_variables: {'a b': 1}"):
        choose_template(tokenizer, None, {"a b": 1}, "here")


def test_variables_are_a_mapping_in_a_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("target: {source: x, template_variables: {enable_thinking: false, a: null}}")
    config = load_config(path)
    assert dict(config.target.template_variables) == {"enable_thinking": False, "a": None}
    assert hash(config)  # a frozen config is one
    with pytest.raises(UsageError, match=r"target.template_variables is 3"):
        load_config(path, ["target.template_variables=3"])

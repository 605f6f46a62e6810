"""Arguments of callers from Python: each is accepted or refused by one message."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import MARKOV, letters, random_draft, right_draft, target_of

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.tree import chain, dynamic_tree
from beagle_jax.errors import PromptError, UserError

CHAT = [{"role": "user", "content": "A"}]
EXPECTED = "expected text, a list of messages, or a sequence of token ids (whole numbers)"


@pytest.fixture(scope="module")
def decoder():
    target = target_of(MARKOV, tokenizer=letters())
    return SpeculativeDecoder(target, right_draft(0.02), chain(2), context=64)


@pytest.fixture(scope="module")
def speechless():
    return SpeculativeDecoder(target_of(MARKOV), right_draft(0.02), chain(2), context=64)


def _texts(answers) -> list[str]:
    return [answer.text for answer in answers]


@pytest.mark.parametrize(
    "prompts",
    [
        [np.array([5, 6])],
        [np.array([5, 6], np.int8)],
        [np.array([5, 6], np.uint64)],
        np.array([[5, 6]]),
        [jnp.array([5, 6])],
        jnp.array([[5, 6]]),
        [range(5, 7)],
        ((5, 6),),
        [[np.int64(5), jnp.int32(6)]],
        map(list, [[5, 6]]),
        ((token for token in (5, 6)) for _ in range(1)),
        [iter([5, 6])],
    ],
    ids=range(12),
)
def test_tokens_in_any_container_are_a_prompt(decoder, prompts):
    assert _texts(decoder.generate(prompts, max_new_tokens=6)) == _texts(
        decoder.generate([[5, 6]], max_new_tokens=6)
    )


@pytest.mark.parametrize("prompt", [np.array([5, 6]), jnp.array([5, 6]), iter([5, 6]), (5, 6)])
def test_a_stream_takes_the_same_containers(decoder, prompt):
    [whole] = decoder.generate([[5, 6]], max_new_tokens=6)
    assert "".join(decoder.stream(prompt, max_new_tokens=6)) == whole.text


def test_messages_in_any_container_are_a_prompt(decoder):
    [whole] = decoder.generate([CHAT], max_new_tokens=6)
    for chat in (tuple(CHAT), iter(CHAT), (message for message in CHAT)):
        assert decoder.generate([chat], max_new_tokens=6)[0] == whole


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (None, "None"),
        (..., "Ellipsis"),
        (b"AB", "b'AB'"),
        ({5, 6}, "{5, 6}"),
        ([5.0, 6.0], "[5.0, 6.0]"),
        (np.array([5.5]), "[np.float64(5.5)]"),
        ([True, False], "[True, False]"),
        ([5, "A"], "[5, 'A']"),
        ([[5], [6, 7]], "[[5], [6, 7]]"),
        ([...], "[Ellipsis]"),
        ([[...]], "[[Ellipsis]]"),
        ([*CHAT, 5], f"{[*CHAT, 5]!r:.80}"),
        (["A", "B"], "['A', 'B']"),
        ({"input_ids": [5, 6]}, "{'input_ids': [5, 6]}"),
    ],
)
def test_what_is_no_prompt_is_refused(decoder, prompt, shown):
    for call in (lambda: decoder.generate([prompt]), lambda: decoder.stream(prompt)):
        with pytest.raises(PromptError) as raised:
            call()
        assert str(raised.value).startswith(f"the prompt is {shown}; {EXPECTED}")


def test_several_prompts_in_a_stream_are_named(decoder):
    for prompts in (["A"], [[5, 6]], [CHAT]):
        with pytest.raises(PromptError, match="of several prompts each is given by itself"):
            decoder.stream(prompts)


@pytest.mark.parametrize("prompts", [None, 5, ..., b"AB", np.array(5), jnp.array(5)])
def test_what_is_no_list_of_prompts_is_refused(decoder, prompts):
    for call in (decoder.generate, decoder.warm_up, decoder.prefilled):
        with pytest.raises(PromptError, match=r"prompts is .*; expected a list of prompts"):
            call(prompts)


@pytest.mark.parametrize("prompts", ["A", [5, 6], np.array([5, 6]), jnp.array([5, 6]), CHAT])
def test_one_prompt_in_place_of_a_list_is_refused(decoder, prompts):
    for call in (decoder.generate, decoder.warm_up, decoder.prefilled):
        with pytest.raises(PromptError, match=r"was given one, .*write generate\(\[prompt\]\)"):
            call(prompts)


def test_text_without_a_tokenizer_is_refused(speechless):
    for prompt in ("A", CHAT):
        with pytest.raises(
            PromptError, match="no tokenizer, so a prompt cannot be text; give token"
        ):
            speechless.generate([prompt])


DRAWN = {"temperature": 0.8}


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"top_k": 20.0}, {"top_k": 20}),
        ({"top_k": np.int64(20)}, {"top_k": 20}),
        ({"top_k": jnp.int32(20)}, {"top_k": 20}),
        ({"top_p": np.float64(0.5)}, {"top_p": 0.5}),
        ({"temperature": jnp.float32(0.5)}, {"temperature": 0.5}),
        ({"temperature": np.array(0.5)}, {"temperature": 0.5}),
        ({"temperature": 1}, {"temperature": 1.0}),
    ],
)
def test_numbers_of_any_library_are_settings(decoder, settings, same):
    answered, expected = (Sampling(**DRAWN | each) for each in (settings, same))
    assert answered.check() == expected and {type(x) for x in answered.check()[:7]} == {int, float}
    assert decoder.generate([[5]], answered)[0] == decoder.generate([[5]], expected)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"top_k": value}, r"top_k is .*; expected 0 \(all tokens\) or a whole number")
            for value in (20.5, None, "20", True, float("nan"), float("inf"), -1, [20])
        ),
        *(
            ({"temperature": value}, r"temperature is .*; expected 0 \(greedy\) or a number of at")
            for value in (None, "0.8", True, float("nan"), float("inf"), -1, np.array([0.8]))
        ),
        *(
            ({"top_p": value}, "top_p is .*; expected a share above 0 and at most 1")
            for value in (None, "0.5", True, float("nan"), 1.5, 0)
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(decoder, settings, message):
    with pytest.raises(UserError, match=message):
        decoder.generate([[5]], Sampling(**DRAWN | settings))


@pytest.mark.parametrize("sampling", [None, 0.8, (0.8, 0, 1.0), {"temperature": 1}, [0.8]])
def test_other_things_than_a_sampling_are_refused(decoder, sampling):
    for call in (
        lambda: decoder.generate([[5]], sampling),
        lambda: list(decoder.stream([5], sampling)),
        lambda: decoder.warm_up([[5]], sampling),
    ):
        reason = "sampling is .*; expected Sampling|3 samplings were given"
        with pytest.raises(UserError, match=reason):
            call()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 3.0},
        {"max_new_tokens": np.int64(3)},
        {"seed": np.int32(3)},
        {"seed": -1},
        {"seed": 2**80},
        {"batch": np.int64(2)},
        {"stop": {"never"}},
        {"stop": iter(["never"])},
        {"stop": np.array(["never"])},
    ],
)
def test_whole_numbers_and_containers_of_any_library_are_accepted(decoder, settings):
    usual = {"max_new_tokens": 3, "seed": 3}
    if settings.get("seed") in (-1, 2**80):
        usual["seed"] = settings["seed"] % 2**32
    [answered] = decoder.generate([[5]], Sampling(0.8), **usual | settings)
    assert answered == decoder.generate([[5]], Sampling(0.8), **usual)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"max_new_tokens": v}, "of at least 1") for v in (0, 3.5, None, "3", True, np.nan)),
        *(({"seed": v}, "a whole number") for v in (1.5, None, "1", True, jax.random.key(0))),
        *(({"batch": v}, "of at least 1") for v in (0, 1.5, "2", True)),
        *(
            ({"stop": v}, "a list of strings, none of them empty")
            for v in ("A", "", b"A", None, 5, [""], [b"A"], [5], ["A", ""], iter(["A", ""]))
        ),
    ],
)
def test_arguments_that_mean_nothing_are_refused(decoder, settings, message):
    [name] = settings
    calls = [lambda: decoder.generate([[5]], **settings)]
    if name != "batch":
        calls.append(lambda: decoder.stream([5], **settings))
    for number, call in enumerate(calls):
        if number and isinstance(settings[name], type(iter([]))):
            continue  # it was read by the call before
        with pytest.raises(UserError, match=f"(?s){name} is .*; expected .*{message}"):
            call()


def test_parts_of_a_decoder_are_told_from_other_things():
    target, draft = target_of(), random_draft()
    for make, message in (
        (lambda: SpeculativeDecoder("a/folder"), "target is 'a/folder'; expected what load_target"),
        (lambda: SpeculativeDecoder(target, "a/folder", chain(2)), "draft is 'a/folder'; expected"),
        (lambda: SpeculativeDecoder(target, draft, 3), "tree is 3; expected chain"),
        (lambda: SpeculativeDecoder(target, draft, None), "tree is None; expected chain"),
        (lambda: SpeculativeDecoder(target, rule="x"), "rule is 'x'; expected one of match, ratio"),
        (lambda: SpeculativeDecoder(target, context=64.5), "context is 64.5; expected a whole"),
        (lambda: SpeculativeDecoder.from_config(None), "config is None; expected the path"),
        (lambda: SpeculativeDecoder.from_config({}), "config is {}; expected the path"),
        (lambda: chain(2.5), "levels is 2.5; expected a whole number of at least 0"),
        (lambda: chain(-1), "levels is -1; expected a whole number of at least 0"),
        (lambda: dynamic_tree(2, "3", 4), "topk is '3'; expected a whole number"),
    ):
        with pytest.raises(UserError) as raised:
            make()
        assert str(raised.value).startswith(message)
    assert chain(np.int64(2)) == chain(2) and dynamic_tree(2.0, 2, 4) == dynamic_tree(2, 2, 4)


def test_planted_bug_letters_of_a_stop_string_are_taken_for_strings(decoder, monkeypatch):
    monkeypatch.setattr("beagle_jax.decoding.batch.stop_strings", tuple)
    monkeypatch.setattr("beagle_jax.decoding.requests.stop_strings", tuple)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_arguments_that_mean_nothing_are_refused(decoder, {"stop": "AB"}, "a list of strings")

"""A chat that keeps its caches between turns answers what a fresh decode of the whole text does."""

import numpy as np
import pytest
from conftest import slow_but
from decode_cases import (
    letters,
    random_draft,
    random_eagle,
    target_of,
)
from eagle3_cases import random_eagle3

from beagle_jax import Sampling, SpeculativeDecoder, chain, dynamic_tree
from beagle_jax.decoding import conversation
from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.sampling import GREEDY
from beagle_jax.errors import PromptError

SYSTEM = [{"role": "system", "content": "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 3}]
QUESTIONS = ["WHO ARE YOU", "AND WHY", "SO"]
KINDS = {
    "plain": lambda: (None,),
    "lookup": lambda: (Lookup(), chain(2)),
    "beagle": lambda: (random_draft(), dynamic_tree(2, 2, 4)),
    "eagle": lambda: (random_eagle(), chain(2)),
    "eagle3": lambda: (random_eagle3(), chain(2)),
}
LIMIT = {"max_new_tokens": 9}


def decoder_of(kind: str, **options) -> SpeculativeDecoder:
    return SpeculativeDecoder(target_of(tokenizer=letters()), *KINDS[kind](), **options)


def fresh(decoder, messages, sampling=None, **options):
    """The answer to a chat, from its whole text."""
    more = () if sampling is None else (sampling,)
    return decoder.generate([messages], *more, **{**LIMIT, **options})[0]


def check_turns(decoder, sampling=None, **options) -> list[conversation.Turn]:
    """Compares each turn with a fresh decode; returns what each turn read."""
    chat, turns = decoder.conversation(SYSTEM), []
    more = () if sampling is None else (sampling,)
    for question in QUESTIONS:
        before = chat.messages
        answer = chat.stream(question, *more, **{**LIMIT, **options}).answer
        expected = fresh(
            decoder, [*before, {"role": "user", "content": question}], sampling, **options
        )
        assert answer.tokens == expected.tokens
        # Equal draft caches draft the same: a stale entry shows here, and not in the tokens.
        assert (answer.rounds, answer.accepted) == (expected.rounds, expected.accepted)
        turns.append(chat.turn)
    return turns


@pytest.mark.parametrize("kind", slow_but(["plain", "beagle"], list(KINDS)))
def test_every_turn_is_that_of_a_fresh_decode(kind):
    turns = check_turns(decoder_of(kind))
    assert turns[0].new_tokens == turns[0].prompt_tokens
    for turn in turns[1:]:  # the end of the answer, the question and its markup
        assert turn.new_tokens < 9 + len("uANDaWHYaa") + 2 < turn.prompt_tokens


def test_penalties_count_what_is_not_read_again():
    penalised = Sampling(0.8, repetition_penalty=1.7, presence_penalty=0.4)
    check_turns(decoder_of("beagle"), penalised, seed=3)


def test_a_turn_that_trusts_too_much_of_its_caches_is_seen(monkeypatch):
    """The planted bug: tokens count as common that are not."""
    common = conversation._common
    monkeypatch.setattr(conversation, "_common", lambda *texts: common(*texts) + 4)
    with pytest.raises(AssertionError):
        check_turns(decoder_of("plain"))


def check_draft_caches(decoder) -> None:
    """Compares a draft's entries after the second prompt with those of reading all of it."""
    chat = decoder.conversation(SYSTEM)
    chat.ask(QUESTIONS[0], **LIMIT)
    messages = [*chat.messages, {"role": "user", "content": QUESTIONS[1]}]
    request = decoder.request(messages, GREEDY, LIMIT)
    earlier = chat._earlier(list(request.tokens))
    assert earlier.start > len(SYSTEM[0]["content"])
    states = [decoder.resumed(request, part).first_state() for part in (earlier, None)]
    length, drafter = len(request.tokens), decoder._round.drafter
    for mine, fresh in zip(*(drafter.rows(state.draft) for state in states), strict=True):
        axis = 3 if mine.shape[3] == states[0].transcript.out_BS.shape[1] else 2
        mine, fresh = (np.moveaxis(np.asarray(x), axis, 0)[:length] for x in (mine, fresh))
        np.testing.assert_allclose(mine, fresh, atol=1e-4)


@pytest.mark.parametrize("kind", slow_but(["eagle"], ["beagle", "eagle", "eagle3"]))
def test_a_drafts_entries_are_those_of_a_fresh_decode(kind):
    check_draft_caches(decoder_of(kind))


def test_a_draft_entry_of_another_state_is_seen():
    """The planted bug: the entry before the new tokens is written again, from the last state."""

    def resumed(now, state, chunk, first, prefix=None, follows=False):
        return Round.read_chunk(now, state, chunk, first, prefix)

    with pytest.raises(AssertionError):
        check_draft_caches(decoder_of("eagle").with_(read_chunk=resumed))


def test_several_conversations_read_a_common_beginning_once():
    decoder = decoder_of("beagle")
    first, second = decoder.conversation(SYSTEM), decoder.conversation(SYSTEM)
    first.ask(QUESTIONS[0], **LIMIT)
    text = second.ask(QUESTIONS[1], **LIMIT)
    assert second.turn.new_tokens < 20 < len(SYSTEM[0]["content"]) < second.turn.prompt_tokens
    assert text == fresh(decoder, [*SYSTEM, {"role": "user", "content": QUESTIONS[1]}]).text
    # The first one's caches were not changed by the second.
    before = first.messages
    text = first.ask(QUESTIONS[2], **LIMIT)
    assert first.turn.new_tokens < 20
    assert text == fresh(decoder, [*before, {"role": "user", "content": QUESTIONS[2]}]).text
    third = decoder_of("beagle").conversation(SYSTEM)  # another decoder's caches are not used
    third.ask(QUESTIONS[0], **LIMIT)
    assert third.turn.new_tokens == third.turn.prompt_tokens


def test_a_template_that_rewrites_history_is_noted_once_and_stays_right(caplog):
    decoder = decoder_of("plain")
    decoder.codec.tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['role'][0] + m['content'] }}"
        "{% endfor %}A"
    )
    turns = check_turns(decoder)
    assert turns[1].new_tokens > 80 and turns[2].new_tokens > 80
    assert caplog.text.count("the chat template rewrites earlier turns") == 1
    caplog.clear()
    check_turns(decoder_of("plain"))
    assert "rewrites" not in caplog.text


def test_a_turn_that_is_left_early_keeps_what_it_showed():
    decoder = decoder_of("beagle")
    chat = decoder.conversation(SYSTEM)
    shown = next(chat.stream(QUESTIONS[0], max_new_tokens=60))
    messages = chat.messages
    assert messages[-1]["role"] == "assistant" and messages[-1]["content"].startswith(shown)
    text = chat.ask(QUESTIONS[1], **LIMIT)
    expected = fresh(decoder, [*messages, {"role": "user", "content": QUESTIONS[1]}])
    assert text == expected.text and chat.turn.new_tokens < 60


def test_what_a_turn_refuses_leaves_the_conversation_as_it_was():
    chat = decoder_of("plain", context=128).conversation(SYSTEM)
    chat.ask(QUESTIONS[0], **LIMIT)
    before = chat.messages
    for message, text in (("  ", "not empty"), ("A" * 200, "leaves no room")):
        with pytest.raises(PromptError, match=text):
            chat.ask(message)
        assert chat.messages == before
    chat.clear()
    assert chat.messages == []
    assert (
        chat.ask("A" * 60, **LIMIT)
        == fresh(decoder_of("plain", context=128), [{"role": "user", "content": "A" * 60}]).text
    )

"""Batches that do not wait: prompts of a generator, answers as they end, long prompts in chunks."""

import itertools

import numpy as np
import pytest
from conftest import TINY
from decode_cases import MARKOV, random_draft, right_draft, target_of

from beagle_jax.decoding import session as session_module
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.programs import filters_for
from beagle_jax.decoding.requests import Answer, Codec, Request
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.session import Session
from beagle_jax.decoding.tree import chain, dynamic_tree
from beagle_jax.errors import PromptError, UserError


def _prompts(count: int, longest: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [
        rng.integers(0, TINY.vocab_size, length).tolist()
        for length in rng.integers(1, longest, count)
    ]


def test_a_generator_gives_the_answers_of_a_list_as_they_end():
    decoder = SpeculativeDecoder(target_of(), random_draft(), chain(2))
    prompts, taken = _prompts(12), []

    def coming():
        for number, prompt in enumerate(prompts):
            taken.append(number)
            yield prompt

    ask = dict(sampling=Sampling(0.8), seed=3, max_new_tokens=12, n=2)
    answers = decoder.generate(coming(), as_completed=True, batch=4, **ask)
    first = next(answers)
    assert len(taken) < 9  # a prompt is taken when a row needs it
    by_place = dict([first, *answers])
    together = decoder.generate(prompts, **ask)
    assert [by_place[place].tokens for place in range(24)] == [each.tokens for each in together]


def test_a_bad_prompt_fails_alone():
    decoder = SpeculativeDecoder(target_of(), random_draft(), chain(2), context=96)
    prompts = [[5], [], [7, 8], [70], list(range(60)) * 2]
    ask = dict(max_new_tokens=8)
    answers = decoder.generate(prompts, **ask)
    assert [answer.finish for answer in answers] == ["length", "error", "length", "error", "error"]
    assert [answer.tokens for answer in answers[1::2]] == [[], []]
    for place, reason in ((1, "empty"), (3, "token 70"), (4, "context")):
        assert reason in answers[place].error
    assert dict(decoder.generate(iter(prompts), as_completed=True, **ask)) == dict(
        enumerate(answers)
    )
    [alone] = decoder.generate([[7, 8]], seed=2, **ask)
    assert answers[2].tokens == alone.tokens
    with pytest.raises(PromptError, match="empty"):
        decoder.generate([[], []])
    with pytest.raises(UserError, match="one sampling for all prompts"):
        decoder.generate(prompts, [Sampling()] * 5, as_completed=True)


def test_a_longer_prompt_enlarges_the_caches_while_others_run():
    decoder = SpeculativeDecoder(target_of(), right_draft(), dynamic_tree(2, 2, 4))
    prompts = [[5], [6], list(range(50)) * 3, [8, 9]]
    ask = dict(max_new_tokens=30)
    growing = dict(decoder.generate(iter(prompts), as_completed=True, batch=2, **ask))
    alone = [decoder.generate([prompt], **ask)[0].tokens for prompt in prompts]
    assert [growing[place].tokens for place in range(4)] == alone


def test_rounds_run_between_the_chunks_of_a_long_prompt(monkeypatch):
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 32)
    monkeypatch.setattr(session_module, "PROMPT_BUCKET", 32)
    decoder = SpeculativeDecoder(target_of(), random_draft(), chain(2), context=256)
    prompts = [[5], [6, 7], list(range(60)) * 3, [8]]
    ask = dict(max_new_tokens=60)
    alone = [decoder.generate([prompt], **ask)[0].tokens for prompt in prompts]
    # All four at once: a short prompt is answered while the long one of its chunk is read.
    assert [each.tokens for each in decoder.generate(prompts, **ask)] == alone
    requests = [Request(prompt, 60 if line else 4) for line, prompt in enumerate(prompts)]
    pieces = list(decoder.pieces(requests, 2))
    tokens = [[], [], [], []]
    for piece in pieces:
        tokens[piece.index] += piece.tokens
    assert tokens[1:] == alone[1:] and tokens[0] == alone[0][:4]
    # Row 0's second request is long: row 1 gets pieces before its first token comes.
    first = next(at for at, piece in enumerate(pieces) if piece.index == 2)
    ended = next(at for at, piece in enumerate(pieces) if piece.index == 0 and piece.answer)
    assert sum(piece.index == 1 and bool(piece.tokens) for piece in pieces[ended + 1 : first]) >= 2


def test_eight_rows_are_busy():
    """Passes of the target for many prompts, against the rounds that each takes alone."""
    target = target_of(MARKOV, eos_ids=(5,))
    decoder = SpeculativeDecoder(target, right_draft(0.02), chain(2), context=192)
    session = decoder.session(_prompts(200), Sampling(1.5), batch=8, max_new_tokens=120)
    answers = [piece.answer for piece in session if piece.answer is not None]
    rounds = sum(answer.rounds for answer in answers)
    assert len({answer.rounds for answer in answers}) > 20
    assert rounds / 8 <= session.passes <= 1.1 * rounds / 8


def test_an_answer_ends_after_its_time_or_when_it_is_cancelled():
    decoder = SpeculativeDecoder(target_of(), random_draft(), chain(2), context=256)
    [late] = decoder.generate([[5]], max_new_tokens=200, seconds=1e-6)
    assert (late.finish, len(late.tokens) < 40) == ("time", True)
    whole = decoder.generate([[5], [6]], max_new_tokens=200, seed=0)
    assert late.tokens == whole[0].tokens[: len(late.tokens)]
    requests = [Request([5], 200), Request([6], 200, seed=1)]
    session = decoder._session(requests, 2, streaming=True)
    answers = {}
    for piece in session:
        session.cancel(0)
        if piece.answer is not None:
            answers[piece.index] = piece.answer
    assert answers[0].finish == "cancelled" and len(answers[0].tokens) < 60
    assert answers[1] == whole[1]


@pytest.mark.parametrize("heard", [True, False])
def test_a_prompt_that_nobody_waits_for_is_not_read_to_its_end(monkeypatch, heard):
    """A cancelled request frees its row after the chunk that is read; the twin hears nothing."""
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 8)
    if not heard:
        monkeypatch.setattr(Session, "_unwanted", lambda session: iter(()))
    decoder = SpeculativeDecoder(target_of(), random_draft(), chain(2), context=128)
    long, short = Request([n % 60 for n in range(100)], 20), Request([5, 6], 20, seed=1)
    chunks = 0

    def source():
        nonlocal chunks
        yield long
        while not ended:
            chunks += 1
            session.cancel(0)
            yield None
        yield short

    ended: dict[int, Answer] = {}
    filters = filters_for([long, short], ())
    session = decoder.live(source(), 1, filters)
    for piece in session:
        if piece.answer is not None:
            ended[piece.index] = piece.answer
    assert ended[0].finish == "cancelled"
    assert (chunks <= 3, ended[0].tokens == []) == (heard, heard)
    assert ended[1] == decoder.generate([[5, 6]], max_new_tokens=20, seed=1)[0]
    assert not session._cancelled


def test_each_request_is_checked_once(monkeypatch):
    decoder = SpeculativeDecoder(target_of(), random_draft(), chain(2), context=128)
    checked = []
    real = Codec.checked

    def counted(codec, request):
        checked.append(request)
        return real(codec, request)

    monkeypatch.setattr(Codec, "checked", counted)
    answers = decoder.generate([[5], [6]], n=2, max_new_tokens=4)
    assert len(checked) == 4
    pieces = list(decoder.pieces([Request([5], np.int64(4))], 1))  # numpy's numbers become Python's
    assert len(checked) == 5 and pieces[-1].answer.tokens == answers[0].tokens
    with pytest.raises(UserError, match="min_new_tokens is 5"):
        decoder.pieces([Request([5], 4, min_new_tokens=5)], 1)


def test_requests_may_come_while_others_run():
    """A source that has nothing yet is asked again."""
    decoder = SpeculativeDecoder(target_of(), random_draft(), chain(2), context=128)
    prompts = _prompts(6, 9)
    requests = [Request(prompt, 20, seed=line) for line, prompt in enumerate(prompts)]
    coming = itertools.chain.from_iterable((request, None, None) for request in requests)
    now, codec = decoder._round, decoder._codec
    session = Session(now, codec, coming, 2, 128, streaming=True)
    answers = {piece.index: piece.answer for piece in session if piece.answer is not None}
    expected = decoder.generate(prompts, max_new_tokens=20)
    assert [answers[index].tokens for index in range(6)] == [each.tokens for each in expected]
    assert now.filters == filters_for(requests, ())

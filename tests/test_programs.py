"""Requests that need more than the running ones are admitted among them, and change no token."""

from dataclasses import replace

import pytest
from decode_cases import MARKOV, right_draft, target_of

from beagle_jax.decoding import session as session_module
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.programs import covers, filters_for, filters_for_all, smallest
from beagle_jax.decoding.requests import MOST_ENDS, MOST_LOGPROBS, Answer, Request
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.rules import RULES
from beagle_jax.decoding.sampling import Filters, Sampling
from beagle_jax.decoding.session import Session
from beagle_jax.decoding.tree import chain, dynamic_tree

EVERYTHING = Sampling(0.3, top_k=20, repetition_penalty=1.5, presence_penalty=0.9)
# The first two run alone for a while; then come requests that need everything, or no drafts.
REQUESTS = [
    Request([5], 90, ignore_eos=True),
    Request([7, 8], 90, Sampling(0.9, top_p=0.9), seed=3, ignore_eos=True),
    Request([9], 20, EVERYTHING, seed=1, logprobs=3),
    Request([6], 24, Sampling(1.1), seed=2, draft=False),
    Request([4, 4], 20, Sampling(logit_bias={7: 2.0}, frequency_penalty=0.5), min_new_tokens=9),
    Request([3], 16, stop_token_ids=(11, 12), ignore_eos=True),
]
DRAWN = [replace(REQUESTS[0], sampling=Sampling(0.7)), *REQUESTS[1:4]]


ROWS = 4


def decoder_of(rule: str = "match") -> SpeculativeDecoder:
    tree = chain(2) if rule == "ratio" else dynamic_tree(2, 2, 5)
    return SpeculativeDecoder(
        target_of(MARKOV, (50,)), right_draft(0.02), tree, context=128, rule=rule
    )


def answers_of(decoder, requests, early: int = 2, drain: bool = False) -> dict[int, Answer]:
    """The answers of a live session by index, in the order in which they end.

    The first `early` requests come at once, the others when the session has run for a while; with
    `drain` only when the first have ended.
    """
    pieces, answers = 0, {}

    def coming():
        for count, request in enumerate(requests):
            while count >= early and (len(answers) < early if drain else pieces < 16):
                yield None
            yield decoder.checked(request)

    for piece in decoder.live(coming(), ROWS):
        pieces += 1
        if piece.answer is not None:
            answers[piece.index] = piece.answer
    return answers


def alone(requests, rule: str = "match") -> list[Answer]:
    """The answer of each request in a session of its own, whose rounds have what it needs."""
    decoder = decoder_of(rule)
    return [answers_of(decoder, [request])[0] for request in requests]


def check(answers, expected) -> None:
    """Checks answers against those of the same requests alone."""
    for index, same in enumerate(expected):
        answer = answers[index]
        assert (answer.tokens, answer.finish) == (same.tokens, same.finish), index
        assert (answer.rounds, answer.accepted) == (same.rounds, same.accepted)
        assert (answer.logprobs is None) == (same.logprobs is None)
        for entry, other in zip(answer.logprobs or (), same.logprobs or (), strict=True):
            assert entry.token == other.token and entry.top == other.top


@pytest.mark.parametrize("rule", ["match", pytest.param("ratio", marks=pytest.mark.slow)])
def test_wide_requests_run_among_narrow_ones(rule, monkeypatch):
    decoder, requests = decoder_of(rule), REQUESTS if rule == "match" else DRAWN
    expected, ran, real = alone(requests, rule), [], Session._rounds

    def rounds(session) -> Round:
        ran.append(real(session))
        return ran[-1]

    monkeypatch.setattr(Session, "_rounds", rounds)
    answers = answers_of(decoder, requests)
    check(answers, expected)
    assert set(list(answers)[-2:]) == {0, 1}  # nobody waited until these had ended
    programs = filters_for_all((50,), decoder.tree.size)
    places = [programs.index(now.filters) for now in ran]
    assert places[0] <= 1 and max(places) == 2 and places[-1] <= 1  # narrow, wide, narrow
    drained = answers_of(decoder, requests, drain=True)  # planted: the others wait for them
    assert set(list(drained)[:2]) == {0, 1}
    check(drained, expected)


def drafts_in_every_row(now, state, *rest):
    """Planted: drafts are accepted in rows that want none."""
    requests = state.requests._replace(drafts_B=None)
    return Round.accept(now, state._replace(requests=requests), *rest)


def no_history(now, state, *rest):
    """Planted: an answer's tokens are not counted once it runs."""
    return Round.emit(now, state, *rest)._replace(history=state.history)


def always_the_first(programs, requests):
    """Planted: the rounds have no steps but those of greedy requests."""
    return programs[0]


@pytest.mark.parametrize(
    ("bug", "wider"),
    [(always_the_first, 2), ({"accept": drafts_in_every_row}, 3), ({"emit": no_history}, 2)],
)
def test_planted_bugs_of_wider_rounds(bug, wider, monkeypatch):
    requests = [REQUESTS[0], REQUESTS[wider]]
    decoder, expected = decoder_of(), alone(requests)
    check(answers_of(decoder, requests, early=1), expected)
    if isinstance(bug, dict):
        decoder = decoder.with_(**bug)
    else:
        monkeypatch.setattr(session_module, "smallest", bug)
    with pytest.raises(AssertionError):
        check(answers_of(decoder, requests, early=1), expected)


def test_rows_without_drafts_run_plain_rounds_on_the_same_state(monkeypatch):
    """First alone, then beside one with drafts, then alone again."""
    depths, real = [], Session._rounds

    def rounds(session) -> Round:
        depths.append(real(session).tree.depth)
        return real(session)

    monkeypatch.setattr(Session, "_rounds", rounds)
    requests = [Request([5], 60, draft=False), Request([5], 60)]
    answers = answers_of(decoder_of(), requests, early=1)
    assert depths[0] == depths[-1] == 0 and max(depths) == 2
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].rounds == 59 and answers[1].rounds < 40


def test_programs_cover_what_requests_need():
    small, drawn = Filters(), Filters(drawn=True, top_p=True)
    rich = Filters(drawn=True, top_p=True, ends=8, logprobs=0, drafted=4)
    assert covers(rich, drawn) and covers(drawn, small) and not covers(small, drawn)
    assert not covers(drawn, rich) and not covers(rich, rich._replace(logprobs=20))
    programs = filters_for_all((1,), nodes=4)
    greedy, drawing, everything = programs
    assert covers(drawing, greedy) and covers(everything, drawing)
    assert covers(drawing, drawn) and drawing.ends == 0
    every = Filters(*[True] * 6, ends=MOST_ENDS + 1, logprobs=MOST_LOGPROBS, drafted=4)
    assert covers(everything, every._replace(undrafted=True))
    for request, expected in zip(
        REQUESTS, (greedy, drawing, everything, drawing, everything, greedy), strict=True
    ):
        assert smallest(programs, [request]) == expected
        assert covers(everything, filters_for([request], (1,)))
    assert smallest(programs, []) == greedy and smallest(programs, REQUESTS) == everything


def test_every_rule_has_a_plain_round():
    for rule in RULES:
        now = decoder_of(rule).live(iter(()), ROWS).now
        assert now.plain.filters == now.filters._replace(drafted=0)
        assert now.plain.rule == RULES["match"]

"""Rows that come and go: refilled rows answer as if alone; admission changes no other row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, slow_but
from decode_cases import (
    MARKOV,
    letters,
    naive_greedy,
    next_stop,
    random_draft,
    random_eagle,
    right_draft,
    right_eagle,
    round_of,
    run,
    start,
    target_of,
)

from beagle_jax.decoding import session as session_module
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.engine import admit, release
from beagle_jax.decoding.lookup import Lookup
from beagle_jax.decoding.requests import Request
from beagle_jax.decoding.round import Chunk, Round
from beagle_jax.decoding.sampling import GREEDY, Sampling, knobs_of
from beagle_jax.decoding.state import Requests
from beagle_jax.decoding.tree import ROOT_ONLY, chain, dynamic_tree, static_tree
from beagle_jax.errors import ContextFull, PromptError, UserError
from beagle_jax.evaluation.measure import CompileCounter

STATIC = static_tree([(0,), (1,), (0, 0), (1, 0)])
DYNAMIC = dynamic_tree(2, 2, 4)
DRAWN = Sampling(0.8, top_k=20)
# drafts that are mostly wrong for TINY, and mostly right for MARKOV
SYSTEMS = {
    "plain": (None, None, ROOT_ONLY),
    "beagle chain": (random_draft, right_draft, chain(2)),
    "beagle static": (random_draft, right_draft, STATIC),
    "beagle dynamic": (random_draft, right_draft, DYNAMIC),
    "eagle chain": (random_eagle, right_eagle, chain(2)),
    "eagle static": (random_eagle, right_eagle, STATIC),
    "eagle dynamic": (random_eagle, right_eagle, DYNAMIC),
    "lookup": (Lookup, Lookup, chain(2)),
}


def _prompts(count: int = 40, longest: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, TINY.vocab_size, length).tolist()
        for length in rng.integers(1, longest, count)
    ]


def _system(name: str, sampling: Sampling, **parts):
    """Returns a decoder, and what plain decoding answers to each prompt alone."""
    wrong, right, tree = SYSTEMS[name]
    if sampling.greedy:
        target, draft = target_of(), wrong and wrong()
    else:
        stop = naive_greedy(target_of(MARKOV), [5], 3)[2]
        target, draft = (
            target_of(MARKOV, (stop,)),
            right and right(0.02) if right != Lookup else Lookup(),
        )
    return target, SpeculativeDecoder(target, draft, tree, context=128).with_(**parts)


def _check_refilled(name: str, sampling: Sampling, rows: int = 4, **parts) -> None:
    target, decoder = _system(name, sampling, **parts)
    plain = SpeculativeDecoder(target, context=128)
    ask = dict(sampling=sampling, max_new_tokens=20)
    prompts = _prompts()
    alone = [
        plain.generate([prompt], seed=7 + line, **ask)[0] for line, prompt in enumerate(prompts)
    ]
    answers = decoder.generate(prompts, seed=7, batch=rows, **ask)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    assert [answer.finish for answer in answers] == [answer.finish for answer in alone]
    together = decoder.generate(prompts, seed=7, **ask)
    assert [(answer.rounds, answer.accepted) for answer in answers] == [
        (answer.rounds, answer.accepted) for answer in together
    ]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", slow_but(("beagle dynamic", "eagle chain"), list(SYSTEMS)))
def test_forty_prompts_over_four_rows_get_what_each_gets_alone(name, sampling):
    _check_refilled(name, sampling)


def _stale_length(now, state, chunk, first):
    """Planted: a row keeps the length of the previous answer."""
    after, states_RTD = Round.read_chunk(now, state, chunk, first)
    length_B = jnp.maximum(after.cache.length_B, state.cache.length_B)
    return after._replace(cache=after.cache.with_(length_B=length_B)), states_RTD


def _stale_seed(now, state, chunk, first):
    """Planted: a row samples with the seed of the previous answer."""
    after, states_RTD = Round.read_chunk(now, state, chunk, first)
    used_B = state.requests.limit_B > 0
    key_B = jnp.where(used_B, state.requests.key_B, after.requests.key_B)
    return after._replace(requests=after.requests._replace(key_B=key_B)), states_RTD


@pytest.mark.parametrize(
    ("bug", "sampling"), [(_stale_length, GREEDY), (_stale_seed, DRAWN)], ids=["length", "seed"]
)
def test_planted_bugs_of_refilled_rows(bug, sampling):
    with pytest.raises(AssertionError):
        _check_refilled("plain", sampling, read_chunk=bug)


def test_rows_of_stops_and_pieces_are_refilled():
    """Stop strings release a row; every request gets pieces that join to its answer."""
    target = target_of(MARKOV, tokenizer=letters())
    decoder = SpeculativeDecoder(target, right_draft(0.02), chain(2), context=128)
    prompts = [[token] for token in range(20)]
    free = decoder.generate(prompts, max_new_tokens=30)
    pairs = {answer.text[at : at + 2] for answer in free for at in range(10)}
    stop = max(pairs, key=lambda pair: len({pair in answer.text for answer in free}))
    whole = decoder.generate(prompts, max_new_tokens=30, stop=[stop])
    few = decoder.generate(prompts, max_new_tokens=30, stop=[stop], batch=3)
    assert list(few) == list(whole)
    assert {answer.finish for answer in few} == {"string", "length"}
    requests = [Request(prompt, 30, stop=(stop,), seed=n) for n, prompt in enumerate(prompts)]
    texts, tokens, ended = [""] * 20, [[] for _ in range(20)], []
    for piece in decoder.pieces(requests, 3):
        assert piece.index not in ended
        texts[piece.index] += piece.text
        tokens[piece.index] += piece.tokens
        if piece.answer is not None:
            assert piece.answer == whole[piece.index]
            ended.append(piece.index)
    assert sorted(ended) == list(range(20)) and texts == [answer.text for answer in whole]
    for written, answer in zip(tokens, whole, strict=True):
        assert written[: len(answer.tokens)] == answer.tokens


def test_requests_of_one_batch_have_settings_of_their_own():
    target = target_of(MARKOV)
    decoder = SpeculativeDecoder(target, right_draft(0.02), chain(2), context=128)
    requests = [
        Request([5], 20),
        Request([5], 7, Sampling(0.9), seed=3),
        Request([5], 30, Sampling(1.4, top_k=9), seed=3),
        Request([5, 6], 20, Sampling(0.5, top_p=0.7), seed=4),
    ]
    answers = {p.index: p.answer for p in decoder.pieces(requests, 2) if p.answer is not None}
    for index, request in enumerate(requests):
        [alone] = decoder.generate(
            [request.tokens],
            request.sampling,
            max_new_tokens=request.max_new_tokens,
            seed=request.seed,
        )
        assert answers[index].tokens == alone.tokens


def _chunk_for(row: int, prompt: list[int], width: int) -> Chunk:
    requests = Requests(
        np.array([9], np.int32), jax.vmap(jax.random.key)(np.array([3])), knobs_of([GREEDY])
    )
    token_RT = np.array([prompt + [0] * (width - len(prompt))], np.int32)
    rows, lengths = np.array([row], np.int32), np.array([len(prompt)], np.int32)
    return Chunk(rows, token_RT, np.int32(0), lengths, requests)


@pytest.mark.parametrize("name", ["beagle dynamic", "eagle chain", "lookup", "plain"])
def test_admitting_changes_nothing_in_the_other_rows(name):
    """Compares every array of the state, in the middle of answers."""
    wrong, _, tree = SYSTEMS[name]
    now = round_of(target_of(), wrong and wrong(), tree)
    state, _ = run(now, start(now, [[5], [6, 7], [8, 9, 10]], [20] * 3, 64), 3)
    before = jax.device_get(jax.tree.map(_data, state))
    state = admit(now.reading, state, _chunk_for(1, [3, 1, 4, 1], 8), first=True)
    after = jax.device_get(jax.tree.map(_data, state))
    changed = 0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[[0, 2]], new[[0, 2]])
        changed += not np.array_equal(old[1], new[1])
    assert changed > 3
    state = release(state, np.array([False, True, False]))
    assert state.transcript.done_B.tolist() == [False, True, False]


def _data(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_nothing_compiles_after_warm_up_whatever_is_asked():
    """Streams, stops, lengths, refills and seeds, with committed weights, as files give them."""
    target = target_of(tokenizer=letters())
    params = jax.device_put(target.params, jax.devices()[0])
    target = type(target)(target.spec, params, target.tokenizer, target.eos_ids, "test")
    decoder = SpeculativeDecoder(target, random_draft(), chain(2))
    decoder.warm_up([[1] * 60], DRAWN, max_new_tokens=40)
    decoder.warm_up([[1] * 60], DRAWN, max_new_tokens=40, batch=4)
    array = jnp.array([5, 6])
    with CompileCounter() as counter:
        for length, most in ((1, 40), (13, 7), (60, 1)):
            list(decoder.stream([5] * length, DRAWN, max_new_tokens=most, stop=["ab"], seed=4))
            decoder.generate([[5] * length], Sampling(1.1, 7), max_new_tokens=most, stop=["x"])
            decoder.generate([[5] * length] * 9, DRAWN, max_new_tokens=most, batch=4, stop=["b"])
            decoder.generate([[5] * length], DRAWN, n=3, batch=1, max_new_tokens=most)
        decoder.generate([array], DRAWN, max_new_tokens=4, seconds=60.0)
        decoder.generate(np.array([[5, 6]]), DRAWN, max_new_tokens=4)
        prompts = iter([[5], [], [6]])
        list(decoder.generate(prompts, DRAWN, as_completed=True, batch=1, max_new_tokens=4))
    assert counter.count == 0


# Prompts and errors


@pytest.mark.parametrize(
    "prompt",
    [
        np.array([5, 6, 7]),
        jnp.array([5, 6, 7]),
        (5, 6, 7),
        (token for token in (5, 6, 7)),
        [np.int32(5), 6, 7],
        np.array([5, 6, 7], np.uint16),
    ],
    ids=["numpy", "jax", "tuple", "generator", "mixed", "uint16"],
)
def test_any_sequence_of_whole_numbers_is_a_prompt(prompt):
    decoder = SpeculativeDecoder(target_of(), context=128)
    [expected] = decoder.generate([[5, 6, 7]], max_new_tokens=4)
    [answer] = decoder.generate(iter([prompt]), max_new_tokens=4)
    assert answer == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5.0, 6.0]], "expected text, a list of messages, or a sequence of token ids"),
        ([["Why?"]], "expected text, a list of messages, or a sequence"),
        ([[[5, 6]]], "expected text, a list of messages, or a sequence"),
        (["Why?"], "no tokenizer, so a prompt cannot be text"),
        ([[{"role": "user", "content": "Hi"}, 5]], "expected text, a list of messages"),
        (np.array([5, 6]), "takes a list of prompts, and was given one"),
        ({"role": "user", "content": "Hi"}, "takes a list of prompts, and was given one"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts, message):
    with pytest.raises(PromptError, match=message):
        SpeculativeDecoder(target_of(), context=128).generate(prompts)


def test_a_full_context_says_how_full():
    decoder = SpeculativeDecoder(target_of(), context=32)
    with pytest.raises(ContextFull) as caught:
        decoder.generate([[1] * 40])
    assert (caught.value.length, caught.value.limit) == (40, 32)
    with pytest.raises(UserError, match="batch is 0; expected a whole number of at least 1"):
        decoder.generate([[1]], batch=0)


def test_long_prompts_are_admitted_in_chunks(monkeypatch):
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 64)
    prompts = _prompts(6, 200)
    for draft in (random_draft(), random_eagle(), Lookup()):
        decoder = SpeculativeDecoder(target_of(), draft, chain(2))
        answers = decoder.generate(prompts, max_new_tokens=12, batch=2)
        assert [answer.tokens for answer in answers] == [
            naive_greedy(target_of(), prompt, 12) for prompt in prompts
        ]


@pytest.mark.parametrize("planted", [False, True])
def test_reading_prompts_compiles_once_with_weights_on_a_device(planted, monkeypatch):
    """The first prompts of a session and later ones run the same program.

    Planted: the first state stays where nobody has put it.
    """
    target = target_of(eos_ids=next_stop())
    params = jax.device_put(target.params, jax.devices()[0])
    target = dataclasses.replace(target, params=params)
    decoder = SpeculativeDecoder(target, None, context=64)
    if planted:
        monkeypatch.setattr(jax, "device_put", lambda state, _: state)
    before = admit._cache_size()
    decoder.generate([[5], [6], [7]], batch=1, max_new_tokens=3)
    assert admit._cache_size() - before == 1 + planted

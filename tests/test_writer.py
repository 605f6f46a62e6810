"""Batched writing: each answer as if its prompt were alone, its states, no copied cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params, slow_but
from decode_cases import append_at_once
from test_target import GREEDY, NEVER, _answers, _pad, _states

from beagle_jax.decoding import writer as writer_module
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.drafter import NoDrafter
from beagle_jax.decoding.engine import advance_keeping
from beagle_jax.decoding.round import Round, TargetModel
from beagle_jax.decoding.sampling import (
    Sampling,
    choose,
    filter_logits,
    filters_of,
    gumbel,
    gumbel_of,
    knobs_of,
)
from beagle_jax.decoding.tree import ROOT_ONLY
from beagle_jax.decoding.writer import write_answers
from beagle_jax.errors import UserError
from beagle_jax.model.cache import RingCache
from beagle_jax.model.target import init_cache, logits
from beagle_jax.weights.target import Target

MAX_NEW = 24


@pytest.fixture(scope="module")
def alone(tiny_params):
    """Forty prompts of 1 to 40 tokens with their greedy answers.

    Answers come from running the whole text again for each token.
    """
    rng = np.random.default_rng(5)
    prompts = [
        rng.integers(0, TINY.vocab_size, length).tolist() for length in rng.permutation(40) + 1
    ]
    following = jax.jit(
        lambda tokens, length: jnp.argmax(
            logits(
                tiny_params, TINY, _states(tiny_params, TINY, tokens, length)[0][0, length[0] - 1]
            )
        )
    )
    answers = []
    for prompt in prompts:
        text = list(prompt)
        while len(text) < len(prompt) + MAX_NEW:
            text.append(int(following(*_pad([text], width=64))))
        answers.append(text[len(prompt) :])
    return prompts, answers


@pytest.fixture(scope="module")
def stops(alone):
    """Two stop tokens that end some of the answers and not others."""
    tokens, counts = np.unique(
        [token for answer in alone[1] for token in set(answer)], return_counts=True
    )
    return tuple(tokens[(counts >= 5) & (counts <= 15)][:2].tolist())


@pytest.fixture(scope="module")
def short(alone):
    """The shortest prompts, which one program reads."""
    prompts, answers = alone
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))[:16]
    return [prompts[index] for index in order], [answers[index] for index in order]


def _cut(answer, stops):
    ends = [index for index, token in enumerate(answer) if token in stops]
    return answer[: ends[0] + 1] if ends else answer


@pytest.mark.parametrize(
    "batch", [16, 40]
)  # fewer rows than prompts, so that rows are refilled, or as many
def test_each_answer_is_that_of_the_row_alone(tiny_params, alone, stops, batch):
    prompts, answers = alone
    expected = [_cut(answer, stops) for answer in answers]
    lengths = list(map(len, expected))
    # Both kinds of ending, at many lengths.
    assert 0 < lengths.count(MAX_NEW) < 30 and len(set(lengths)) > 5
    counted = []
    written = _answers(
        tiny_params,
        TINY,
        prompts,
        eos_ids=stops,
        max_new=MAX_NEW,
        batch=batch,
        on_tokens=counted.append,
    )
    assert written == expected
    assert sum(counted) == sum(lengths)


class _OneTooMany(RingCache):
    def visible(self):
        return super(_OneTooMany, self.with_(length_B=self.length_B + 1)).visible()


def _late_slot(now, state, *rest):
    late = state.cache.with_(rounds=state.cache.rounds + 1)
    after = Round.append(now, state._replace(cache=late), *rest)
    return after._replace(cache=after.cache.with_(rounds=after.cache.rounds - 1))


def _old_step(now, state, nodes):
    fields = dataclasses.fields(RingCache)
    cache = _OneTooMany(*(getattr(state.cache, field.name) for field in fields))
    return Round.read(now, state._replace(cache=cache), nodes)


def _no_stop(now, *rest):
    return Round.emit(dataclasses.replace(now, eos_ids=NEVER), *rest)


def _one_prompt_token_unseen(now, state, chunk, first, prefix):
    after, states_RTD = Round.read_chunk(now, state, chunk, first, prefix)
    prompt_B = after.cache.prompt_B.at[chunk.row_R].add(-1)
    return after._replace(cache=after.cache.with_(prompt_B=prompt_B)), states_RTD


WRITER_PLANTS = {
    "rows written one slot late": {"append": _late_slot},
    "an old row's step visible": {"read": _old_step},
    "stop token ignored": {"emit": _no_stop},
    "a prompt's last token unseen": {"read_chunk": _one_prompt_token_unseen},
}


@pytest.mark.parametrize("plant", WRITER_PLANTS)
def test_planted_bug_in_answers(tiny_params, alone, stops, plant):
    prompts, answers = alone
    written = _answers(
        tiny_params,
        TINY,
        prompts,
        eos_ids=stops,
        max_new=MAX_NEW,
        batch=16,
        parts=WRITER_PLANTS[plant],
    )
    assert written != [_cut(answer, stops) for answer in answers]


DRAWN = Sampling(0.9, top_k=12)


@pytest.mark.parametrize("sampling", slow_but(["top-k"], {"top-k": DRAWN, "all": Sampling(1.0)}))
def test_the_text_does_not_depend_on_the_rows(tiny_params, alone, stops, sampling):
    """Sampled by position: the same with 4 and with 64 rows.

    It is also what the decoder writes with these seeds.
    """
    prompts, _ = alone
    ask = dict(eos_ids=stops, max_new=MAX_NEW, sampling=sampling, seed=5)
    few, many = (_answers(tiny_params, TINY, prompts, batch=batch, **ask) for batch in (4, 64))
    assert few == many != _answers(tiny_params, TINY, prompts, batch=64, **ask | {"seed": 6})
    decoder = SpeculativeDecoder(Target(TINY, tiny_params, None, stops, "test"))
    alike = decoder.generate(prompts, sampling, max_new_tokens=MAX_NEW, seed=5)
    assert many == [answer.tokens for answer in alike]


def test_planted_bug_noise_by_row(tiny_params, alone, stops):
    def wrong(now, key_B, place_BT, purpose):
        row_B = jax.random.split(jax.random.key(0), len(key_B))
        return Round.keys(now, row_B, place_BT, purpose)

    prompts, _ = alone
    ask = dict(eos_ids=stops, max_new=MAX_NEW, sampling=DRAWN, parts={"keys": wrong})
    few, many = (_answers(tiny_params, TINY, prompts, batch=batch, **ask) for batch in (4, 64))
    assert few != many


@pytest.mark.parametrize("top_k", [5, 64, 70])
def test_few_tokens_are_drawn_as_among_all(top_k):
    """A token's noise is the same whether it is made for all tokens or for some."""
    logits_BTV = 3 * jax.random.normal(jax.random.key(0), (4, 3, 500))
    key_BT = jax.random.split(jax.random.key(1), (4, 3))
    noise_BTV = gumbel(key_BT, 500)
    token_BTC = jax.random.randint(jax.random.key(2), (4, 3, 20), 0, 500)
    some_BTC = jnp.take_along_axis(noise_BTV, token_BTC, axis=-1)
    np.testing.assert_array_equal(gumbel_of(key_BT, token_BTC), some_BTC)
    settings = [Sampling(0.8, top_k), Sampling(1.2, top_k, 0.9), Sampling(), Sampling(1.0, 3)]
    knobs, filters = knobs_of(settings), filters_of(settings)
    expected_BT = jnp.argmax(
        filter_logits(logits_BTV, knobs, filters)
        + jnp.where(jnp.arange(4)[:, None, None] == 2, 0.0, noise_BTV),
        axis=-1,
    )
    found_BT = choose(logits_BTV, key_BT, knobs, filters)
    assert found_BT.tolist() == expected_BT.tolist()
    assert found_BT.tolist() != choose(logits_BTV, key_BT[::-1], knobs, filters).tolist()


WINDOWED = dataclasses.replace(TINY, windows=(None, 8))


class _SlotsArePositions(RingCache):
    def positions(self):
        return None


def test_a_sliding_window_acts_in_the_ring_too(tiny_params, short):
    """Texts longer than the window, in refilled rows, equal what the decoder writes."""
    prompts = short[0]
    params = random_params(WINDOWED, 0)
    decoder = SpeculativeDecoder(Target(WINDOWED, params, None, NEVER, "test"))
    expected = [answer.tokens for answer in decoder.generate(prompts, max_new_tokens=MAX_NEW)]
    ask = dict(max_new=MAX_NEW, batch=8)
    assert _answers(params, WINDOWED, prompts, **ask) == expected
    assert _answers(params, dataclasses.replace(WINDOWED, windows=()), prompts, **ask) != expected

    def wrong(now, state, nodes):
        fields = dataclasses.fields(RingCache)
        cache = _SlotsArePositions(*(getattr(state.cache, field.name) for field in fields))
        return Round.read(now, state._replace(cache=cache), nodes)

    assert _answers(params, WINDOWED, prompts, parts={"read": wrong}, **ask) != expected


def test_a_target_that_gives_no_number_is_named(tiny_params):
    broken = {**tiny_params, "norm_D": tiny_params["norm_D"].at[3].set(jnp.nan)}
    with pytest.raises(UserError, match="the target's logits are not finite"):
        _answers(broken, TINY, [[5], [6]], max_new=4, batch=2)


HEADER = [7, 3, 11]


@pytest.fixture(scope="module")
def with_header(alone):
    """The same prompts with one header, and then one that differs in the header's third token."""
    return [HEADER + prompt for prompt in alone[0][:19]], [7, 3, 12]


@jax.jit
def _of_whole_text(params, tokens_1T, length_1):
    """Returns the states of a text, and the best token after each."""
    states_1TD = _states(params, TINY, tokens_1T, length_1)[0]
    return states_1TD[0], jnp.argmax(logits(params, TINY, states_1TD[0]), axis=-1)


def _check_against_whole_texts(params, prompts):
    """Checks a greedy writer against whole texts.

    Each chosen token is the best at its position, and the states are the text's.
    """
    answers = list(
        write_answers(
            params, TINY, prompts, eos_ids=NEVER, max_new=9, batch=16, sampling=GREEDY, seed=0
        )
    )
    assert sorted(answer.index for answer in answers) == list(range(len(prompts)))
    for answer in answers:
        text = prompts[answer.index] + answer.tokens
        states_LD, best_L = map(np.asarray, _of_whole_text(params, *_pad([text], width=64)))
        assert answer.tokens == best_L[len(prompts[answer.index]) - 1 : len(text) - 1].tolist()
        # 1e-4: another order of summation.
        np.testing.assert_allclose(answer.states_LD[:-1], states_LD[: len(text) - 1], atol=1e-4)


@pytest.mark.parametrize("begins", ["with a header", "in two tokens", "alike and ends so"])
def test_what_all_prompts_begin_with_is_read_once(tiny_params, with_header, begins, monkeypatch):
    prompts, other = with_header
    prompts = {
        "with a header": prompts,
        "in two tokens": [*prompts, other],
        "alike and ends so": [HEADER] * 17,
    }[begins]
    beginnings, read_beginning = [], writer_module._read_beginning
    monkeypatch.setattr(
        writer_module,
        "_read_beginning",
        lambda *rest: beginnings.append(read_beginning(*rest)) or beginnings[-1],
    )
    _check_against_whole_texts(tiny_params, prompts)
    assert [len(beginning.states_PD) for beginning in beginnings] == [
        3 if begins == "with a header" else 2
    ]


BEGINNING_PLANTS = {
    "its states in another order": lambda rows, states_PD: (rows, states_PD[::-1]),
    "its keys at the wrong places": lambda rows, states_PD: (
        [row._replace(k_BKHS=row.k_BKHS[..., ::-1]) for row in rows],
        states_PD,
    ),
    "values of another token": lambda rows, states_PD: (
        [row._replace(v_BKSH=row.v_BKSH[:, :, ::-1]) for row in rows],
        states_PD,
    ),
}


@pytest.mark.parametrize("plant", BEGINNING_PLANTS)
def test_planted_bug_in_the_beginning(tiny_params, with_header, plant, monkeypatch):
    read_beginning = writer_module._read_beginning
    monkeypatch.setattr(
        writer_module,
        "_read_beginning",
        lambda *rest: writer_module.Beginning(*BEGINNING_PLANTS[plant](*read_beginning(*rest))),
    )
    with pytest.raises(AssertionError):
        _check_against_whole_texts(tiny_params, with_header[0])


def _check_answer_states(params, prompts, stops, shift=0):
    for answer in write_answers(
        params, TINY, prompts, eos_ids=stops, max_new=MAX_NEW, batch=16, sampling=GREEDY, seed=0
    ):
        text = prompts[answer.index] + answer.tokens
        expected_LD = np.asarray(_states(params, TINY, *_pad([text], width=64))[0])[0, : len(text)]
        found_LD = np.roll(answer.states_LD[:-1], shift, axis=0)
        # 1e-4: another order of summation.
        np.testing.assert_allclose(found_LD, expected_LD[:-1], atol=1e-4)
        assert answer.states_LD.shape == expected_LD.shape and not answer.states_LD[-1].any()


def test_states_that_come_with_answers_are_those_of_the_text(tiny_params, alone, stops):
    _check_answer_states(tiny_params, alone[0], stops)


def test_planted_bug_states_one_token_late(tiny_params, alone, stops):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _check_answer_states(tiny_params, alone[0], stops, shift=1)


def test_stop_token_ends_an_answer_and_is_kept(tiny_params, alone):
    prompts, answers = alone
    stop = answers[0][2]
    (written,) = _answers(tiny_params, TINY, prompts[:1], eos_ids=(stop,), max_new=MAX_NEW, batch=1)
    assert written == answers[0][: answers[0].index(stop) + 1]


@pytest.mark.parametrize("max_new", [1, 9])  # 9 is one more than a segment's steps
def test_answers_end_at_max_new(tiny_params, short, max_new):
    prompts, answers = short
    written = _answers(tiny_params, TINY, prompts, max_new=max_new, batch=16)
    assert written == [answer[:max_new] for answer in answers]


def test_no_prompts_no_answers(tiny_params):
    assert _answers(tiny_params, TINY, [], max_new=4, batch=16) == []


@pytest.mark.parametrize("batch", [1, 5])
def test_few_rows_for_many_prompts(tiny_params, short, batch):
    prompts, answers = short
    idle = []

    def progress(count):
        idle.append(count == 0)
        assert sum(idle) < 10, "the rows stay empty"

    written = _answers(tiny_params, TINY, prompts[:7], max_new=4, batch=batch, on_tokens=progress)
    assert written == [answer[:4] for answer in answers[:7]]


def _segment_memory(params, donate=("state",), **parts) -> tuple[int, int, int]:
    """Returns bytes of the cache, of the compiled segment's temporaries, and of reused inputs."""
    now = Round(TargetModel(TINY, params), NoDrafter(), ROOT_ONLY, NEVER).with_(**parts)
    jitted = jax.jit(
        advance_keeping.__wrapped__, static_argnames=("rounds",), donate_argnames=donate
    )
    nothing = init_cache(TINY, 1, 0, jnp.float32)
    state = writer_module._begin(TINY, nothing, batch=16, max_new=1024)
    memory = jitted.lower(now, state, rounds=8).compile().memory_analysis()
    cache_bytes = sum(array.nbytes for array in jax.tree.leaves(state.cache.layers))
    return cache_bytes, memory.temp_size_in_bytes, memory.alias_size_in_bytes


def test_segment_does_not_copy_the_cache(tiny_params):
    cache_bytes, temporary, reused = _segment_memory(tiny_params)
    assert 0 < temporary < cache_bytes <= reused


def test_planted_bug_cache_not_donated(tiny_params):
    cache_bytes, _, reused = _segment_memory(tiny_params, donate=())
    assert reused < cache_bytes


def test_planted_bug_slot_free_of_the_token(tiny_params):
    cache_bytes, temporary, _ = _segment_memory(tiny_params, append=append_at_once)
    assert temporary > cache_bytes

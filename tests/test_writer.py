"""Batched writing of answers: each as if its prompt were alone, states with it, and no copy of the
cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from test_target import GREEDY, NEVER, _answers, _pad, _states

from beagle_jax.decoding import batch as batch_module
from beagle_jax.decoding.batch import _visible, _write_slot, write_answers
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.model.target import init_cache, logits

MAX_NEW = 24


@pytest.fixture(scope="module")
def alone(tiny_params):
    """Forty prompts of 1 to 40 tokens, and each one's greedy answer by running its whole text again
    per token.
    """
    rng = np.random.default_rng(5)
    asked = [
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
    for prompt in asked:
        text = list(prompt)
        while len(text) < len(prompt) + MAX_NEW:
            text.append(int(following(*_pad([text], width=64))))
        answers.append(text[len(prompt) :])
    return asked, answers


@pytest.fixture(scope="module")
def stops(alone):
    """Two stop tokens that end some of the answers and not others."""
    tokens, counts = np.unique(
        [token for answer in alone[1] for token in set(answer)], return_counts=True
    )
    return tuple(tokens[(counts >= 5) & (counts <= 15)][:2].tolist())


@pytest.fixture(scope="module")
def short(alone):
    """The shortest of them, which one program reads."""
    asked, answers = alone
    order = sorted(range(len(asked)), key=lambda index: len(asked[index]))[:16]
    return [asked[index] for index in order], [answers[index] for index in order]


def _cut(answer, stops):
    ends = [index for index, token in enumerate(answer) if token in stops]
    return answer[: ends[0] + 1] if ends else answer


@pytest.mark.parametrize(
    "batch", [16, 40]
)  # fewer rows than prompts, so that rows are refilled, or as many
def test_each_answer_is_that_of_the_row_alone(tiny_params, alone, stops, batch):
    asked, answers = alone
    expected = [_cut(answer, stops) for answer in answers]
    lengths = list(map(len, expected))
    assert (
        0 < lengths.count(MAX_NEW) < 30 and len(set(lengths)) > 5
    )  # both kinds of ending, at many lengths
    counted = []
    found = _answers(
        tiny_params,
        TINY,
        asked,
        eos_ids=stops,
        max_new=MAX_NEW,
        batch=batch,
        on_tokens=counted.append,
    )
    assert found == expected
    assert sum(counted) == sum(lengths)


# The plant is traced in, so each has a `sampling` of its own (all greedy) and no other test meets
# its program.
WRITER_PLANTS = {
    "rows written one slot late": (
        7,
        "_write_slot",
        lambda cache, rows, slot: _write_slot(cache, rows, slot + 1),
    ),
    "an old row's step visible": (
        10,
        "_visible",
        lambda state: _visible(state._replace(count_B=state.count_B + 1)),
    ),
    "stop token ignored": (8, "is_stop", lambda token, eos_ids: jnp.zeros(token.shape, bool)),
    "padding visible": (
        9,
        "causal_mask",
        lambda length_B, width: jnp.ones((length_B.shape[0], width, width), bool),
    ),
}


@pytest.mark.parametrize("plant", WRITER_PLANTS)
def test_planted_bug_in_answers(tiny_params, alone, stops, plant, monkeypatch):
    top_k, name, bug = WRITER_PLANTS[plant]
    monkeypatch.setattr(batch_module, name, bug)
    asked, answers = alone
    found = _answers(
        tiny_params,
        TINY,
        asked,
        eos_ids=stops,
        max_new=MAX_NEW,
        batch=16,
        sampling=Sampling(0.0, top_k),
    )
    assert found != [_cut(answer, stops) for answer in answers]


HEADER = [7, 3, 11]


@pytest.fixture(scope="module")
def with_header(alone):
    """The same prompts behind one header, and after them one that begins otherwise in the header's
    third token.
    """
    return [HEADER + prompt for prompt in alone[0][:19]], [7, 3, 12]


@jax.jit
def _of_whole_text(params, tokens_1T, length_1):
    """The states of a text, and the best token after each."""
    states_1TD = _states(params, TINY, tokens_1T, length_1)[0]
    return states_1TD[0], jnp.argmax(logits(params, TINY, states_1TD[0]), axis=-1)


def _check_against_whole_texts(params, asked):
    """What a greedy writer chose is the best choice at each place of the whole text, and its states
    are the text's.
    """
    found = list(
        write_answers(
            params, TINY, asked, eos_ids=NEVER, max_new=9, batch=16, sampling=GREEDY, seed=0
        )
    )
    assert sorted(answer.index for answer in found) == list(range(len(asked)))
    for answer in found:
        text = asked[answer.index] + answer.tokens
        states_LD, best_L = map(np.asarray, _of_whole_text(params, *_pad([text], width=64)))
        assert answer.tokens == best_L[len(asked[answer.index]) - 1 : len(text) - 1].tolist()
        np.testing.assert_allclose(
            answer.states_LD[:-1], states_LD[: len(text) - 1], atol=1e-4
        )  # 1e-4: another order of summation


@pytest.mark.parametrize("begins", ["with a header", "in two tokens", "alike and ends so"])
def test_what_all_prompts_begin_with_is_read_once(tiny_params, with_header, begins, monkeypatch):
    asked, other = with_header
    asked = {
        "with a header": asked,
        "in two tokens": [*asked, other],
        "alike and ends so": [HEADER] * 17,
    }[begins]
    beginnings, read = [], batch_module._read_beginning
    monkeypatch.setattr(
        batch_module,
        "_read_beginning",
        lambda *rest: beginnings.append(read(*rest)) or beginnings[-1],
    )
    _check_against_whole_texts(tiny_params, asked)
    assert [len(one.states_PD) for one in beginnings] == [3 if begins == "with a header" else 2]


BEGINNING_PLANTS = {
    "its states in another order": lambda rows, states_PD: (rows, states_PD[::-1]),
    "its keys at the wrong places": lambda rows, states_PD: (
        [one._replace(k_BKHS=one.k_BKHS[..., ::-1]) for one in rows],
        states_PD,
    ),
    "values of another token": lambda rows, states_PD: (
        [one._replace(v_BKSH=one.v_BKSH[:, :, ::-1]) for one in rows],
        states_PD,
    ),
}


@pytest.mark.parametrize("plant", BEGINNING_PLANTS)
def test_planted_bug_in_the_beginning(tiny_params, with_header, plant, monkeypatch):
    read = batch_module._read_beginning
    monkeypatch.setattr(
        batch_module,
        "_read_beginning",
        lambda *rest: batch_module.Beginning(*BEGINNING_PLANTS[plant](*read(*rest))),
    )
    with pytest.raises(AssertionError):
        _check_against_whole_texts(tiny_params, with_header[0])


def _check_answer_states(params, asked, stops, shift=0):
    for answer in write_answers(
        params, TINY, asked, eos_ids=stops, max_new=MAX_NEW, batch=16, sampling=GREEDY, seed=0
    ):
        text = asked[answer.index] + answer.tokens
        expected_LD = np.asarray(_states(params, TINY, *_pad([text], width=64))[0])[0, : len(text)]
        found_LD = np.roll(answer.states_LD[:-1], shift, axis=0)
        np.testing.assert_allclose(
            found_LD, expected_LD[:-1], atol=1e-4
        )  # 1e-4: another order of summation
        assert answer.states_LD.shape == expected_LD.shape and not answer.states_LD[-1].any()


def test_states_that_come_with_answers_are_those_of_the_text(tiny_params, alone, stops):
    _check_answer_states(tiny_params, alone[0], stops)


def test_planted_bug_states_one_token_late(tiny_params, alone, stops):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _check_answer_states(tiny_params, alone[0], stops, shift=1)


def test_stop_token_ends_an_answer_and_is_kept(tiny_params, alone):
    asked, answers = alone
    stop = answers[0][2]
    (found,) = _answers(tiny_params, TINY, asked[:1], eos_ids=(stop,), max_new=MAX_NEW, batch=1)
    assert found == answers[0][: answers[0].index(stop) + 1]


@pytest.mark.parametrize("max_new", [1, 9])  # 9 is one more than a segment's steps
def test_answers_end_at_max_new(tiny_params, short, max_new):
    asked, answers = short
    found = _answers(tiny_params, TINY, asked, max_new=max_new, batch=16)
    assert found == [answer[:max_new] for answer in answers]


def test_no_prompts_no_answers(tiny_params):
    assert _answers(tiny_params, TINY, [], max_new=4, batch=16) == []


@pytest.mark.parametrize("batch", [1, 5])
def test_few_rows_for_many_prompts(tiny_params, short, batch):
    asked, answers = short
    idle = []

    def progress(count):
        idle.append(count == 0)
        assert sum(idle) < 10, "the rows stay empty"

    found = _answers(tiny_params, TINY, asked[:7], max_new=4, batch=batch, on_tokens=progress)
    assert found == [answer[:4] for answer in answers[:7]]


def _segment_memory(params, sampling, donate=("state",)) -> tuple[int, int, int]:
    """Bytes of the cache, of the compiled segment's temporary buffers, and of its outputs that
    reuse inputs.
    """
    static = ("spec", "sampling", "eos_ids")
    jitted = jax.jit(
        batch_module._segment.__wrapped__, static_argnames=static, donate_argnames=donate
    )
    state = batch_module._empty_state(TINY, init_cache(TINY, 1, 0, jnp.float32), 16, 1024, 0)
    memory = jitted.lower(params, TINY, state, sampling, NEVER).compile().memory_analysis()
    cache_bytes = sum(array.nbytes for array in jax.tree.leaves(state.cache))
    return cache_bytes, memory.temp_size_in_bytes, memory.alias_size_in_bytes


def test_segment_does_not_copy_the_cache(tiny_params):
    cache_bytes, temporary, reused = _segment_memory(tiny_params, GREEDY)
    assert 0 < temporary < cache_bytes <= reused


def test_planted_bug_cache_not_donated(tiny_params):
    cache_bytes, _, reused = _segment_memory(tiny_params, GREEDY, donate=())
    assert reused < cache_bytes


def test_planted_bug_slot_free_of_the_token(tiny_params, monkeypatch):
    monkeypatch.setattr(
        batch_module, "_write_slot", lambda cache, rows, slot: _write_slot(cache, rows, 0 * slot)
    )
    cache_bytes, temporary, _ = _segment_memory(tiny_params, Sampling(0.0, 6))
    assert temporary > cache_bytes

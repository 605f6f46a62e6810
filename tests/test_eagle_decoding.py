"""EAGLE drafts decode in Beagle's loop: the answers of plain decoding, and right states.

The states are those that a row computes (method.md 8).
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import (
    MARKOV,
    letters,
    naive_greedy,
    planted,
    random_eagle,
    right_eagle,
    round_of,
    run,
    target_of,
)

from beagle_jax.decoding import session as session_module
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.draft import grow
from beagle_jax.decoding.drafter import Known
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.trained import EagleDrafter
from beagle_jax.decoding.tree import chain, dynamic_tree, static_tree
from beagle_jax.evaluation import inside
from beagle_jax.evaluation.forced import forced_states
from beagle_jax.evaluation.inside import attention
from beagle_jax.evaluation.measure import CompileCounter
from beagle_jax.model.eagle import EagleBlock

STATIC = static_tree([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 1, 1)])
TREES = {"chain": chain(3), "static": STATIC, "dynamic": dynamic_tree(3, 3, 8)}
PROMPTS = [[5], [7, 8, 9, 10, 11]]
HOT = jnp.array([3, 17, 40, 41, 5, 8], jnp.int32)
DRAWN = Sampling(0.4, top_k=20, top_p=0.95)


# Answers


@pytest.mark.parametrize(
    ("tree", "case", "append_predicted"),
    [
        ("chain", "accepting", True),
        ("static", "rejecting", True),
        ("dynamic", "rejecting", True),
        ("dynamic", "accepting", True),
        ("dynamic", "accepting", False),
    ],
)
def test_equals_plain_decoding(tree, case, append_predicted):
    target, draft = (
        (target_of(), random_eagle(hot_ids=HOT))
        if case == "rejecting"
        else (target_of(MARKOV), right_eagle(0.03))
    )
    answers = SpeculativeDecoder(
        target, draft, TREES[tree], append_predicted=append_predicted
    ).generate(PROMPTS, max_new_tokens=20)
    assert [answer.tokens for answer in answers] == [
        naive_greedy(target, prompt, 20) for prompt in PROMPTS
    ]
    if case == "accepting":
        assert sum(answer.rounds for answer in answers) < 32 and all(
            answer.accepted[0] for answer in answers
        )


def test_a_right_draft_goes_all_the_way_in_every_round():
    for prompt, answer in zip(
        PROMPTS,
        SpeculativeDecoder(target_of(MARKOV), right_eagle(), chain(3)).generate(
            PROMPTS, max_new_tokens=21
        ),
        strict=True,
    ):
        assert answer.tokens == naive_greedy(target_of(MARKOV), prompt, 21) and answer.accepted == [
            0,
            0,
            0,
            5,
        ]


def test_draws_and_streams_are_those_of_plain_decoding():
    target = target_of(MARKOV, tokenizer=letters())
    fast, plain = (
        SpeculativeDecoder(target, right_eagle(0.03), TREES["dynamic"]),
        SpeculativeDecoder(target),
    )

    def ask(decoder):
        return decoder.generate([[5, 6]], DRAWN, max_new_tokens=30, seed=3)[0]

    assert ask(fast).tokens == ask(plain).tokens and ask(fast).rounds < ask(plain).rounds
    assert "".join(fast.stream([5, 6], DRAWN, max_new_tokens=30, seed=3)) == ask(plain).text


# States, against the row computed again over the text and what was predicted


def decoded(spec, draft, tree, rounds, append_predicted=True):
    """Returns a round, and the state after some rounds of two answers."""
    target = target_of(spec)
    decoder = SpeculativeDecoder(target, draft, tree, append_predicted=append_predicted)
    now, state = decoder.prefilled(PROMPTS, max_new_tokens=40)
    return target, now, run(now, state, rounds)[0]


@partial(jax.jit, static_argnums=0)
def true_rows(spec, params, e_LD, h_LD):
    """Computes the cache rows of all entries of a text: each state and the next embedding."""
    block = EagleBlock(spec).bind({"params": params})
    return block.keys_values(
        block.fuse(e_LD[None, 1:], h_LD[None, :-1]), jnp.arange(len(e_LD) - 1)[None]
    )


@partial(jax.jit, static_argnums=0)
def row_states(spec, params, e_QLD, h_QLD, mask_QTT):
    return EagleBlock(spec).apply({"params": params}, e_QLD, h_QLD, mask_QTT, method="row")


def check_known(
    spec, params, target, state, line: int, text: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Compares what a state holds of a text with all of the text read at once.

    The text's last token is the root. Embeddings and true states are the text's.
    """
    n = len(text) - 1
    h_LD = np.asarray(forced_states(target, text))
    e_LD = np.asarray(target.params["embed_VD"])[[*text, *[0] * (len(h_LD) - n - 1)]]
    rows = true_rows(spec, params, e_LD, h_LD)
    np.testing.assert_allclose(
        state.draft.rows.k_BKHS[line, ..., :n], rows.k_BKHS[0, ..., :n], atol=1e-4
    )
    np.testing.assert_allclose(
        state.draft.rows.v_BKSH[line, :, :n], rows.v_BKSH[0, :, :n], atol=1e-4
    )
    np.testing.assert_allclose(state.draft.last_B1D[line, 0], h_LD[n - 1], atol=1e-4)
    return e_LD, h_LD


@jax.jit
def _grown(now, state):
    known = Known(state.transcript.root_B, state.cache.length_B)
    return grow(now.drafter, state.draft, known, now.tree)


def text_of(prompt, state, line: int) -> list[int]:
    """Returns the prompt and the answer so far; the last token is the root."""
    written = state.transcript
    return [*prompt, *written.out_BS[line, : written.count_B[line]].tolist()]


def check_drafted(target, now, state) -> None:
    """Checks all queries of the next round."""
    drafted = jax.device_get(_grown(now, state))
    embed_VD, P = np.asarray(target.params["embed_VD"]), now.tree.depth
    for line, prompt in enumerate(PROMPTS):
        text = text_of(prompt, state, line)
        n, h_LD = len(text) - 1, np.asarray(forced_states(target, text))
        assert n == int(state.cache.length_B[line])
        # One row for each query: the text, then the tokens of its path, with the states that were
        # predicted for them.
        sees_QQ, Q, L = drafted.query_sees_BQQ[line], drafted.state_BQD.shape[1], len(h_LD)
        e_QLD, h_QLD = np.zeros((2, Q, L, TINY.hidden_size), np.float32)
        e_QLD[:, : n + 1], h_QLD[:, :n], mask_QTT = (
            embed_VD[text],
            h_LD[:n],
            np.tile(np.tri(L - 1, dtype=bool), (Q, 1, 1)),
        )
        for query in range(Q):
            # The root first.
            for depth, above in enumerate([*np.flatnonzero(sees_QQ[query]), query]):
                e_QLD[query, n + depth] = embed_VD[drafted.query_token_BQ[line, above]]
                h_QLD[query, n + depth] = drafted.state_BQD[line, above]
        if not now.drafter.append_predicted:
            mask_QTT[..., n:] &= np.eye(L - 1, dtype=bool)[:, n:]
        depth_Q = sees_QQ.sum(axis=1)
        assert depth_Q.max() == P - 1
        spec, params = now.drafter.spec, now.drafter.params
        expected_QD = np.asarray(row_states(spec, params, e_QLD, h_QLD, mask_QTT))[
            np.arange(Q), n - 1 + depth_Q
        ]
        np.testing.assert_allclose(
            drafted.state_BQD[line], expected_QD, atol=1e-5 * float(np.abs(expected_QD).max())
        )


def check_cached(target, now, state) -> None:
    """Checks the rows in the cache, and the last state."""
    for line, prompt in enumerate(PROMPTS):
        text = text_of(prompt, state, line)
        check_known(now.drafter.spec, now.drafter.params, target, state, line, text)


@pytest.mark.parametrize(
    ("case", "tree", "append_predicted"),
    [
        ("accepting", "chain", True),
        ("rejecting", "static", True),
        ("accepting", "dynamic", True),
        ("accepting", "dynamic", False),
    ],
)
def test_drafting_is_the_row_computed_again(case, tree, append_predicted):
    spec, draft = (
        (TINY, random_eagle(hot_ids=HOT)) if case == "rejecting" else (MARKOV, right_eagle(0.05))
    )
    for rounds in (0, 4):
        target, now, state = decoded(spec, draft, TREES[tree], rounds, append_predicted)
        check_drafted(target, now, state)
        check_cached(target, now, state)
        count_B = state.transcript.count_B
        assert case == "rejecting" or not rounds or int(count_B.max()) - 1 > 4


@pytest.fixture(scope="module")
def four_rounds():
    return decoded(MARKOV, right_eagle(0.05), TREES["dynamic"], 4)


class _Late(EagleDrafter):
    def level(self, state, frontier):
        late = frontier._replace(length_B=frontier.length_B + 1)
        # what is visible of the cache stays as it was
        rows = jax.tree.map(jnp.asarray, state.rows)
        hidden = jnp.arange(rows.v_BKSH.shape[2])[None] == frontier.length_B[:, None]
        v_BKSH = jnp.where(hidden[:, None, :, None], 0.0, rows.v_BKSH)
        return super().level(state._replace(rows=rows._replace(v_BKSH=v_BKSH)), late)


class _AnotherParent(EagleDrafter):
    def level(self, state, frontier):
        before_BTD = frontier.before_BTD
        if before_BTD is not None:
            before_BTD = jnp.roll(before_BTD, 1, axis=1)
        return super().level(state, frontier._replace(before_BTD=before_BTD))


class _Unseen(EagleDrafter):
    def with_own(self, *arguments):
        memory, sees_BTQ = super().with_own(*arguments)
        return memory, sees_BTQ.at[:, :, -1].set(False)


DRAFTERS = {
    "late positions": _Late,
    "another parent's state": _AnotherParent,
    "itself unseen": _Unseen,
}


@pytest.mark.parametrize("bug", [*DRAFTERS, "stale last state", "stale row"])
def test_planted_bugs(four_rounds, bug):
    target, now, state = four_rounds
    if bug in DRAFTERS:
        now = replace(now, drafter=planted(DRAFTERS[bug], now.drafter))
    elif bug == "stale last state":
        before = decoded(MARKOV, right_eagle(0.05), TREES["dynamic"], 0)[2]
        state = state._replace(draft=state.draft._replace(last_B1D=before.draft.last_B1D))
    else:
        place, rows = int(state.cache.length_B[0]) - 1, state.draft.rows
        rows = rows._replace(v_BKSH=rows.v_BKSH.at[0, :, place].set(0.0))
        state = state._replace(draft=state.draft._replace(rows=rows))
    with pytest.raises(AssertionError):
        check_drafted(target, now, state)
    if bug.startswith("stale"):
        with pytest.raises(AssertionError):
            check_cached(target, now, state)


# Prompts in chunks


def check_chunks(monkeypatch, plant=None) -> None:
    """Checks prompts that end in different chunks and at their borders."""
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 64)
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(0, TINY.vocab_size, length).tolist() for length in (150, 64, 65, 3, 128)
    ]
    target, draft = target_of(), random_eagle()
    decoder = SpeculativeDecoder(target, draft, chain(2))
    if plant is not None:
        drafter = planted(plant, round_of(target, draft, chain(2)).drafter)
        decoder = SpeculativeDecoder(target, drafter, chain(2))
    _, state = decoder.prefilled(prompts, max_new_tokens=12)
    for line, prompt in enumerate(prompts):
        text = [*prompt, int(state.transcript.root_B[line])]
        check_known(draft.spec, draft.params, target, state, line, text)


def test_long_prompts_are_read_in_chunks(monkeypatch):
    check_chunks(monkeypatch)


class _OtherBorder(EagleDrafter):
    """Planted: the entry at a chunk's border is made of another token."""

    def observe(self, state, seen):
        if seen.resumed:
            seen = seen._replace(token_BT=seen.token_BT.at[:, 0].add(1))
        return super().observe(state, seen)


def test_planted_bug_the_token_after_a_chunk(monkeypatch):
    with pytest.raises(AssertionError):
        check_chunks(monkeypatch, _OtherBorder)


# Programs


def test_nothing_compiles_after_warm_up():
    decoder = SpeculativeDecoder(target_of(), random_eagle(), TREES["dynamic"])
    prompts = [
        [(7 * length + place) % 61 for place in range(length)] for length in (1, 2, 30, 63, 64)
    ]
    decoder.warm_up(prompts[:1], max_new_tokens=8)
    with CompileCounter() as counter:
        for prompt in prompts:
            decoder.generate([prompt], max_new_tokens=8)
    assert counter.count == 0


# Where it looks


def test_planted_bug_attention_one_place_on(monkeypatch):
    right = inside._weights
    monkeypatch.setattr(inside, "_weights", lambda *a: jnp.roll(right(*a), 1, axis=0))
    with pytest.raises(AssertionError):
        test_attention_is_that_of_the_block()


def test_attention_is_that_of_the_block():
    target, draft, prompt = target_of(), random_eagle(), [5, 7, 9]
    weights_TS, tokens = attention(
        SpeculativeDecoder(target, draft, TREES["dynamic"]), prompt, max_new_tokens=12
    )
    assert weights_TS.shape == (len(tokens) - 3, len(tokens) - 1)
    block, L = EagleBlock(draft.spec).bind({"params": draft.params}), len(tokens)
    f_1TD = block.fuse(
        target.params["embed_VD"][jnp.array([tokens[1:]])],
        forced_states(target, tokens)[None, : L - 1],
    )
    parts = jax.jit(
        lambda f_1TD, at_1T: (
            block.queries(f_1TD, at_1T)[0],
            block.keys_values(f_1TD, at_1T).k_BKHS[0],
        )
    )
    q_KGTH, k_KHT = jax.device_get(parts(f_1TD, jnp.arange(L - 1)[None]))
    # Its entry stands one place before it, and is the last that it sees.
    for row, place in enumerate(range(3, L)):
        heads = [
            np.exp(q_KGTH[k, g, place - 1] @ k_KHT[k, :, :place] / np.sqrt(8))
            for k in range(2)
            for g in range(2)
        ]
        np.testing.assert_allclose(
            weights_TS[row, :place],
            np.mean([head / head.sum() for head in heads], axis=0),
            atol=1e-5,
        )
        assert not weights_TS[row, place:].any()

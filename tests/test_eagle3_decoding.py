"""EAGLE-3 drafts decode in everyone's loop: the answers of plain decoding, and the states that
training-time test simulates over the same tokens (method.md 14).
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import MARKOV, letters, naive_greedy, planted, round_of, target_of
from eagle3_cases import D, random_eagle3, right_eagle3
from test_eagle_decoding import DRAWN, PROMPTS, TREES, decoded, text_of

from beagle_jax.data.target_forward import states_at
from beagle_jax.decoding import session as session_module
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.draft import grow
from beagle_jax.decoding.drafter import Known
from beagle_jax.decoding.trained import Eagle3Drafter
from beagle_jax.decoding.tree import chain
from beagle_jax.errors import UserError
from beagle_jax.model.eagle3 import Eagle3Block
from beagle_jax.training.eagle import eagle_states

CASES = {
    "rejecting": (TINY, random_eagle3()),
    "speculators": (TINY, random_eagle3("speculators")),
    "narrow": (TINY, random_eagle3("narrow")),
    "the target's head": (TINY, random_eagle3("the target's head")),
    "accepting": (MARKOV, right_eagle3(0.05)),
}


# Answers


@pytest.mark.parametrize(
    ("tree", "case", "append_predicted"),
    [
        ("chain", "accepting", True),
        ("static", "rejecting", True),
        ("dynamic", "speculators", True),
        ("dynamic", "narrow", True),
        ("static", "the target's head", True),
        ("dynamic", "accepting", True),
        ("dynamic", "accepting", False),
    ],
)
def test_equals_plain_decoding(tree, case, append_predicted):
    spec, draft = CASES[case]
    target = target_of(spec)
    decoder = SpeculativeDecoder(target, draft, TREES[tree], append_predicted=append_predicted)
    answers = decoder.generate(PROMPTS, max_new_tokens=20)
    expected = [naive_greedy(target, prompt, 20) for prompt in PROMPTS]
    assert [answer.tokens for answer in answers] == expected
    if case == "accepting":
        assert sum(answer.rounds for answer in answers) < 32


def test_a_right_draft_is_accepted():
    decoder = SpeculativeDecoder(target_of(MARKOV), right_eagle3(), chain(3))
    answers = decoder.generate(PROMPTS, max_new_tokens=21)
    # Plain decoding takes 40 rounds. It attends to other tokens now and then.
    assert sum(answer.rounds for answer in answers) <= 24


def test_a_batch_gives_each_prompt_its_own_answer():
    target, prompts = target_of(MARKOV), [[n, n + 3] for n in range(5)]
    decoder = SpeculativeDecoder(target, right_eagle3(0.05), TREES["dynamic"])
    together = decoder.generate(prompts, max_new_tokens=16, batch=2)
    expected = [naive_greedy(target, prompt, 16) for prompt in prompts]
    assert [answer.tokens for answer in together] == expected


@pytest.mark.parametrize("rule", ["match", "ratio"])
def test_draws(rule):
    """By match they are those of plain decoding; by ratio a right draft is accepted too."""
    target = target_of(MARKOV, tokenizer=letters())
    tree = chain(3) if rule == "ratio" else TREES["dynamic"]
    fast = SpeculativeDecoder(target, right_eagle3(0.03), tree, rule=rule)
    plain = SpeculativeDecoder(target)
    [ours], [theirs] = (
        decoder.generate([[5, 6]], DRAWN, max_new_tokens=30, seed=3) for decoder in (fast, plain)
    )
    assert ours.rounds < theirs.rounds
    if rule == "match":
        assert ours.tokens == theirs.tokens
        assert "".join(fast.stream([5, 6], DRAWN, max_new_tokens=30, seed=3)) == theirs.text


def test_another_target_is_refused():
    draft = random_eagle3()
    with pytest.raises(UserError, match=r"it reads the streams \[1, 2\], the target has 0 to 0"):
        SpeculativeDecoder(target_of(MARKOV), draft, chain(2))
    wide = replace(draft.spec, target_hidden_size=64)
    with pytest.raises(UserError, match="its hidden size is 64, the target's is 32"):
        SpeculativeDecoder(target_of(), replace(draft, spec=wide), chain(2))


# Numbers: those of training over the same tokens


@jax.jit
def _grown(now, state):
    known = Known(state.transcript.root_B, state.cache.length_B)
    return grow(now.drafter, state.draft, known, now.tree)


_states_at = jax.jit(states_at, static_argnums=(1, 4))


@partial(jax.jit, static_argnames="spec")
def _entries(params, spec, taps_1TX, e_1TD, places_1T):
    """Entries of a text for the draft's cache, and its features."""
    block = Eagle3Block(spec).bind({"params": params})
    return block.true_rows(taps_1TX, e_1TD, places_1T), block.features(taps_1TX)


def padded(tokens_BL: np.ndarray) -> np.ndarray:
    """Padded to a multiple of 32 tokens, so that few programs are compiled."""
    return np.pad(tokens_BL, ((0, 0), (0, -tokens_BL.shape[1] % 32)))


def streams_of(target, draft, tokens_BL: np.ndarray) -> np.ndarray:
    """The streams [B, L, X] that the draft reads of a text."""
    B, L = tokens_BL.shape
    tokens_BL = padded(tokens_BL)
    length_B1 = np.full((B, 1), tokens_BL.shape[1])
    joined_BLI = _states_at(target.params, target.spec, tokens_BL, length_B1, draft.spec.taps)
    return np.asarray(joined_BLI[:, :L, :-D])


def trained_states(target, draft, text: list[int], paths: np.ndarray) -> np.ndarray:
    """What training simulates from the text's last token on: states [Q, steps, d] along paths
    [Q, steps] of tokens, the root's first.
    """
    n, (Q, steps) = len(text) - 1, paths.shape
    tokens_QL = padded(np.concatenate([np.tile(text[:-1], (Q, 1)).astype(np.int32), paths], 1))
    table_VD = draft.spec.embedding(draft.params, target.params["embed_VD"])
    states = jax.jit(eagle_states, static_argnames=("spec", "count", "steps", "detach"))(
        draft.params,
        draft.spec,
        np.asarray(table_VD)[tokens_QL],
        streams_of(target, draft, tokens_QL),
        jnp.full((Q, 1), n + steps),
        jnp.full((Q, 1), n),
        count=1,
        steps=steps,
        detach=False,
    )[:, 0]
    return np.asarray(Eagle3Block(draft.spec).bind({"params": draft.params}).carried(states))


def check_drafted(target, draft, now, state) -> None:
    """All queries of the next round."""
    drafted = jax.device_get(_grown(now, state))
    for line, prompt in enumerate(PROMPTS):
        sees_QQ, token_Q = drafted.query_sees_BQQ[line], drafted.query_token_BQ[line]
        Q, steps = len(token_Q), now.tree.depth
        paths, depth_Q = np.zeros((Q, steps), np.int32), sees_QQ.sum(axis=1)
        for query in range(Q):
            above = [*np.flatnonzero(sees_QQ[query]), query]
            paths[query, : len(above)] = token_Q[above]
        assert depth_Q.max() == steps - 1
        expected = trained_states(target, draft, text_of(prompt, state, line), paths)
        expected_QD = expected[np.arange(Q), depth_Q]
        np.testing.assert_allclose(
            drafted.state_BQD[line], expected_QD, atol=2e-5 * float(np.abs(expected_QD).max())
        )


def check_known(target, draft, state, line: int, text: list[int]) -> None:
    """What the state holds of a text whose last token is the root, against all of it at once."""
    n = len(text) - 1
    table_VD = np.asarray(draft.spec.embedding(draft.params, target.params["embed_VD"]))
    token_1T = padded(np.array([text[:-1]], np.int32))
    taps_1TX = streams_of(target, draft, token_1T)
    e_1TD = table_VD[padded(np.array([text[1:]], np.int32))]
    places_1T = np.arange(token_1T.shape[1])[None]
    rows, features_1TD = jax.device_get(
        _entries(draft.params, draft.spec, taps_1TX, e_1TD, places_1T)
    )
    held = jax.device_get(state.draft)
    np.testing.assert_allclose(held.rows.k_BKHS[line, ..., :n], rows.k_BKHS[0, ..., :n], atol=1e-4)
    np.testing.assert_allclose(held.rows.v_BKSH[line, :, :n], rows.v_BKSH[0, :, :n], atol=1e-4)
    np.testing.assert_allclose(held.last_B1D[line], features_1TD[0, n - 1 : n], atol=1e-4)


@pytest.mark.parametrize(
    ("case", "tree"),
    [
        ("accepting", "chain"),
        pytest.param("rejecting", "static", marks=pytest.mark.slow),
        ("speculators", "dynamic"),
        pytest.param("narrow", "chain", marks=pytest.mark.slow),
        pytest.param("accepting", "dynamic", marks=pytest.mark.slow),
    ],
)
def test_drafting_gives_the_numbers_of_training(case, tree):
    spec, draft = CASES[case]
    for rounds in (0, 4):
        target, now, state = decoded(spec, draft, TREES[tree], rounds)
        check_drafted(target, draft, now, state)
        for line, prompt in enumerate(PROMPTS):
            check_known(target, draft, state, line, text_of(prompt, state, line))
        assert case != "accepting" or not rounds or int(state.transcript.count_B.max()) - 1 > 4


class _AnotherParent(Eagle3Drafter):
    def level(self, state, frontier):
        before_BTD = frontier.before_BTD
        if before_BTD is not None:
            before_BTD = jnp.roll(before_BTD, 1, axis=1)
        return super().level(state, frontier._replace(before_BTD=before_BTD))


class _StreamsTurned(Eagle3Drafter):
    def observe(self, state, seen):
        return super().observe(state, seen._replace(tapped_BTI=seen.tapped_BTI[..., ::-1]))


class _Late(Eagle3Drafter):
    def level(self, state, frontier):
        return super().level(state, frontier._replace(length_B=frontier.length_B + 1))


class _RawOutput(Eagle3Drafter):
    def level(self, state, frontier):
        output = super().level(state, frontier)
        weight_11D = self.params["norm"][None, None]
        return output._replace(state_BTD=output.state_BTD / weight_11D)


@pytest.mark.parametrize("bug", [_AnotherParent, _StreamsTurned, _Late, _RawOutput])
def test_planted_bugs(bug):
    spec, draft = CASES["speculators"]
    target, now, _ = decoded(spec, draft, TREES["dynamic"], 0)
    drafter = planted(bug, now.drafter)
    decoder = SpeculativeDecoder(target, drafter, TREES["dynamic"])
    now, state = decoder.prefilled(PROMPTS, max_new_tokens=40)
    with pytest.raises(AssertionError):
        check_drafted(target, draft, now, state)


def check_chunks(monkeypatch, plant=None) -> None:
    """Prompts that end in different chunks and at their borders."""
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 64)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, TINY.vocab_size, length).tolist() for length in (130, 64, 65, 3)]
    target, draft = target_of(), random_eagle3()
    drafter = draft
    if plant is not None:
        drafter = planted(plant, round_of(target, draft, chain(2)).drafter)
    _, state = SpeculativeDecoder(target, drafter, chain(2)).prefilled(prompts, max_new_tokens=12)
    for line, prompt in enumerate(prompts):
        text = [*prompt, int(state.transcript.root_B[line])]
        check_known(target, draft, state, line, text)


def test_long_prompts_are_read_in_chunks(monkeypatch):
    check_chunks(monkeypatch)


class _OtherBorder(Eagle3Drafter):
    """The row that crosses the border is made of another token."""

    def observe(self, state, seen):
        if seen.resumed:
            seen = seen._replace(token_BT=seen.token_BT.at[:, 0].add(1))
        return super().observe(state, seen)


def test_planted_bug_the_token_after_a_chunk(monkeypatch):
    with pytest.raises(AssertionError):
        check_chunks(monkeypatch, _OtherBorder)

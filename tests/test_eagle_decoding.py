"""EAGLE drafts decode in Beagle's loop: the same answers as plain decoding, and states that its row computes (method.md 8)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import MARKOV, letters, naive_greedy, random_eagle, right_eagle, start, target_of

from beagle_jax.decoding import draft as drafting
from beagle_jax.decoding import loop
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.tree import chain, dynamic_tree, static_tree
from beagle_jax.evaluation.inside import attention
from beagle_jax.evaluation.measure import CompileCounter
from beagle_jax.model.eagle import EagleBlock, EagleSpec, init_eagle
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward
from beagle_jax.weights.draft import Draft

STATIC = static_tree([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 1, 1)])
TREES = {"chain": chain(3), "static": STATIC, "dynamic": dynamic_tree(3, 3, 8)}
PROMPTS = [[5], [7, 8, 9, 10, 11]]
HOT = jnp.array([3, 17, 40, 41, 5, 8], jnp.int32)
DRAWN = Sampling(0.4, top_k=20, top_p=0.95)


# Answers


@pytest.mark.parametrize(
    ("tree", "case", "append_predicted"),
    [*[(tree, case, True) for tree in TREES for case in ("rejecting", "accepting")], ("dynamic", "accepting", False)],
)
def test_equals_plain_decoding(tree, case, append_predicted):
    target, draft = (target_of(), random_eagle(hot_ids=HOT)) if case == "rejecting" else (target_of(MARKOV), right_eagle(0.03))
    answers = SpeculativeDecoder(target, draft, TREES[tree], append_predicted=append_predicted).generate(PROMPTS, max_new_tokens=20)
    assert [answer.tokens for answer in answers] == [naive_greedy(target, prompt, 20) for prompt in PROMPTS]
    if case == "accepting":
        assert sum(answer.rounds for answer in answers) < 32 and all(answer.accepted[0] for answer in answers)


def test_a_right_draft_goes_all_the_way_in_every_round():
    [found] = SpeculativeDecoder(target_of(MARKOV), right_eagle(), chain(3)).generate([[5]], max_new_tokens=21)
    assert found.tokens == naive_greedy(target_of(MARKOV), [5], 21) and found.accepted == [0, 0, 0, 5]


def test_draws_and_streams_are_those_of_plain_decoding():
    target = target_of(MARKOV, tokenizer=letters())
    fast, plain = SpeculativeDecoder(target, right_eagle(0.03), TREES["dynamic"]), SpeculativeDecoder(target)
    ask = lambda decoder: decoder.generate([[5, 6]], DRAWN, max_new_tokens=30, seed=3)[0]
    assert ask(fast).tokens == ask(plain).tokens and ask(fast).rounds < ask(plain).rounds
    assert "".join(fast.stream([5, 6], DRAWN, max_new_tokens=30, seed=3)) == ask(plain).text


# States, against the row computed again over the text and what was predicted


def decoded(spec, draft, tree, rounds, append_predicted=True):
    """What the loop's functions take after some rounds of two answers."""
    target = target_of(spec)
    models = loop.Models(target.params, draft.params, loop.draft_head_of(target.params, None))
    shapes = loop.Shapes(target.spec, draft.spec, tree, target.eos_ids, append_predicted=append_predicted)
    state = start(models, shapes, PROMPTS, jnp.array([40, 40]), 64)
    return models, shapes, loop.decode(models, shapes, state, np.int32(rounds))[0]


def true_states(models, shapes, text) -> jax.Array:
    text_1L = jnp.array([text])
    L = text_1L.shape[1]
    return forward(models.target, shapes.target, text_1L, jnp.arange(L)[None], causal_mask(jnp.array([L]), L))[0]


def check_states(models, shapes, state) -> None:
    """All queries of the next round, and the rows in the cache."""
    block = EagleBlock(shapes.draft).bind({"params": models.draft})
    drafted, P = jax.jit(lambda state: loop.propose(models, shapes, state))(state), shapes.tree.depth
    for line, prompt in enumerate(PROMPTS):
        n = int(state.length_B[line])
        text = [*prompt, *state.out_BS[line, : state.count_B[line]].tolist()]
        assert len(text) == n + 1
        h_1LD, e_LD = true_states(models, shapes, text), models.target["embed_VD"][jnp.array(text)]
        rows = block.keys_values(block.fuse(e_LD[None, 1:], h_1LD[:, :n]), jnp.arange(n)[None])
        np.testing.assert_allclose(state.draft_cache.k_BKHS[line, ..., :n], rows.k_BKHS[0], atol=1e-4)
        np.testing.assert_allclose(state.draft_cache.v_BKSH[line, :, :n], rows.v_BKSH[0], atol=1e-4)
        np.testing.assert_allclose(state.last_B1D[line, 0], h_1LD[0, n - 1], atol=1e-4)
        # One row for each query: the text, then the tokens of its path, with the states that were predicted for them.
        sees_QQ = np.asarray(drafted.query_sees_BQQ[line])
        Q, D = drafted.state_BQD.shape[1:]
        e_QLD, h_QLD = np.zeros((2, Q, n + 1 + P, D), np.float32)
        e_QLD[:, : n + 1], h_QLD[:, :n], mask_QTT = e_LD, h_1LD[0, :n], np.tile(np.tri(n + P, dtype=bool), (Q, 1, 1))
        for query in range(Q):
            path = [*np.flatnonzero(sees_QQ[query]), query]  # the root first
            for depth, above in enumerate(path):
                e_QLD[query, n + depth] = models.target["embed_VD"][drafted.query_token_BQ[line, above]]
                h_QLD[query, n + depth] = drafted.state_BQD[line, above]
            if not shapes.append_predicted:
                mask_QTT[query, :, n:] &= np.eye(n + P, dtype=bool)[:, n:]
        states_QTD = block.row(jnp.asarray(e_QLD), jnp.asarray(h_QLD), jnp.asarray(mask_QTT))
        depth_Q = sees_QQ.sum(axis=1)
        assert depth_Q.max() == P - 1
        expected_QD = np.asarray(states_QTD)[np.arange(Q), n - 1 + depth_Q]
        np.testing.assert_allclose(drafted.state_BQD[line], expected_QD, atol=1e-5 * float(np.abs(expected_QD).max()))


@pytest.mark.parametrize(
    ("case", "tree", "append_predicted"),
    [("accepting", "chain", True), ("rejecting", "static", True), ("accepting", "dynamic", True), ("accepting", "static", False)],
)
def test_drafting_is_the_row_computed_again(case, tree, append_predicted):
    spec, draft = (TINY, random_eagle()) if case == "rejecting" else (MARKOV, right_eagle(0.05))
    for rounds in (0, 4):
        models, shapes, state = decoded(spec, draft, TREES[tree], rounds, append_predicted)
        check_states(models, shapes, state)
        assert case == "rejecting" or not rounds or 4 < int(state.count_B.max()) - 1


@pytest.fixture(scope="module")
def four_rounds():
    return decoded(MARKOV, right_eagle(0.05), TREES["dynamic"], 4)


class _Late(EagleBlock):
    def queries(self, e_BTD, positions_BT):
        return super().queries(e_BTD, positions_BT + 1)


@pytest.mark.parametrize("bug", ["late positions", "another parent's state", "itself unseen", "stale last state", "stale row"])
def test_planted_bugs(four_rounds, bug, monkeypatch):
    models, shapes, state = four_rounds
    if bug == "late positions":
        monkeypatch.setattr(drafting, "block_of", _Late)
    elif bug == "another parent's state":
        right = drafting._next_level
        wrong = lambda *a: (level := right(*a))._replace(before_BTD=jnp.roll(level.before_BTD, 1, axis=1))
        monkeypatch.setattr(drafting, "_next_level", wrong)
    elif bug == "itself unseen":
        right = drafting._with_own_rows
        monkeypatch.setattr(drafting, "_with_own_rows", lambda *a: (found := right(*a))[:1] + (found[1].at[:, :, -1].set(False),))
    elif bug == "stale last state":
        state = state._replace(last_B1D=decoded(MARKOV, right_eagle(0.05), TREES["dynamic"], 0)[2].last_B1D)
    else:
        place = int(state.length_B[0]) - 1
        state = state._replace(draft_cache=state.draft_cache._replace(v_BKSH=state.draft_cache.v_BKSH.at[0, :, place].set(0.0)))
    with pytest.raises(AssertionError):
        check_states(models, shapes, state)


# Prompts in chunks


def check_chunks(monkeypatch) -> None:
    """Rows of the batch end in different chunks and at their borders."""
    monkeypatch.setattr("beagle_jax.decoding.decoder.PREFILL_CHUNK", 64)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, TINY.vocab_size, length).tolist() for length in (150, 64, 65, 3, 128)]
    decoder, draft = SpeculativeDecoder(target_of(), random_eagle(), chain(2)), random_eagle()
    shapes, state = decoder._prefill(prompts, Sampling(), 12, 0)
    block = EagleBlock(draft.spec).bind({"params": draft.params})
    for line, prompt in enumerate(prompts):
        text, n = [*prompt, int(state.root_B[line])], len(prompt)
        h_1LD = true_states(decoder._models, shapes, text + [0] * (151 - len(text)))
        np.testing.assert_allclose(state.last_B1D[line], h_1LD[0, n - 1 : n], atol=1e-4)
        f_1LD = block.fuse(target_of().params["embed_VD"][jnp.array(text[1:])][None], h_1LD[:, :n])
        np.testing.assert_allclose(state.draft_cache.v_BKSH[line, :, :n], block.keys_values(f_1LD, jnp.arange(n)[None]).v_BKSH[0], atol=1e-4)
        np.testing.assert_allclose(state.draft_cache.k_BKHS[line, ..., :n], block.keys_values(f_1LD, jnp.arange(n)[None]).k_BKHS[0], atol=1e-4)


def test_long_prompts_are_read_in_chunks(monkeypatch):
    check_chunks(monkeypatch)


def test_planted_bug_the_token_after_a_chunk(monkeypatch):
    """The row that crosses the border is made of another token."""
    right = loop.draft_rows
    wrong = lambda models, draft, states, next_BT, *rest: right(models, draft, states, next_BT.at[:, 0].add(1) if next_BT.shape[1] == 65 else next_BT, *rest)
    monkeypatch.setattr(loop, "draft_rows", wrong)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        check_chunks(monkeypatch)
    jax.clear_caches()


# Programs


def test_caches_are_donated_and_updated_in_place():
    spec = replace(TINY, head_dim=64, num_layers=4)  # heads so wide that scores are small beside keys
    target, draft_spec = target_of(spec), EagleSpec.from_target(spec)
    draft = Draft(draft_spec, init_eagle(draft_spec, jax.random.key(0)), None, {})
    models = loop.Models(target.params, draft.params, loop.draft_head_of(target.params, None))
    shapes = loop.Shapes(target.spec, draft.spec, TREES["dynamic"], target.eos_ids)
    state = start(models, shapes, [[5]], jnp.array([8]), 2048)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state.target_cache, state.draft_cache, state.last_B1D)))
    memory = loop.decode.lower(models, shapes, state, np.int32(9)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2
    loop.decode(models, shapes, state, np.int32(9))
    assert state.draft_cache.v_BKSH.is_deleted() and state.last_B1D.is_deleted()


def test_nothing_compiles_after_warm_up():
    decoder = SpeculativeDecoder(target_of(), random_eagle(), TREES["dynamic"])
    prompts = [[(7 * length + place) % 61 for place in range(length)] for length in (1, 2, 30, 63, 64)]
    decoder.warm_up(prompts[:1], max_new_tokens=8)
    with CompileCounter() as counter:
        for prompt in prompts:
            decoder.generate([prompt], max_new_tokens=8)
    assert counter.count == 0


# Where it looks


def test_attention_is_that_of_the_block():
    target, draft, prompt = target_of(), random_eagle(), [5, 7, 9]
    decoder = SpeculativeDecoder(target, draft, TREES["dynamic"])
    weights_TS, tokens = attention(decoder, prompt, max_new_tokens=12)
    assert weights_TS.shape == (len(tokens) - 3, len(tokens) - 1)
    block, L = EagleBlock(draft.spec).bind({"params": draft.params}), len(tokens)
    f_1TD = block.fuse(target.params["embed_VD"][jnp.array([tokens[1:]])], true_states(decoder._models, decoder._shapes, tokens)[:, :-1])
    q_KGTH = np.asarray(block.queries(f_1TD, jnp.arange(L - 1)[None]))[0]
    k_KHT = np.asarray(block.keys_values(f_1TD, jnp.arange(L - 1)[None]).k_BKHS)[0]
    for row, place in enumerate(range(3, L)):  # its entry stands one place before it, and is the last that it sees
        heads = [np.exp(q_KGTH[k, g, place - 1] @ k_KHT[k, :, :place] / np.sqrt(8)) for k in range(2) for g in range(2)]
        np.testing.assert_allclose(weights_TS[row, :place], np.mean([head / head.sum() for head in heads], axis=0), atol=1e-5)
        assert not weights_TS[row, place:].any()

"""Greedy speculative decoding equals plain decoding, whatever the tree, the draft and the place where it stops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import MARKOV, NEVER, naive_greedy, random_draft, right_draft, target_of

from beagle_jax.decoding import loop
from beagle_jax.decoding.decoder import Decoder, Generation
from beagle_jax.decoding.tree import EAGLE_PATHS, ROOT_ONLY, chain, static_tree
from beagle_jax.errors import UserError
from beagle_jax.evaluation.suites import CompileCounter, Measurement

TREES = {
    "chain 1": chain(1),
    "chain 5": chain(5),
    "eagle": static_tree(EAGLE_PATHS),
    "ragged": static_tree([(0,), (1,), (3,), (1, 0), (1, 2), (1, 2, 0)]),
}
PROMPTS = {"one token": [5], "short": [7, 8, 9], "a bucket": list(range(60)) + [3, 1, 4, 1], "one more": list(range(60)) + [3, 1, 4, 1, 5]}


def _generate(target, draft, tree, prompt, max_new=20, limit=None) -> Generation:
    decoder = Decoder(target, draft, tree, max_new_tokens=max_new, longest_prompt=max(len(prompt), 40))
    return decoder.generate(prompt, limit)


def _check_lossless(target, draft, tree, prompt, max_new=20) -> Generation:
    found = _generate(target, draft, tree, prompt, max_new)
    assert found.tokens == naive_greedy(target, prompt, max_new)
    assert sum(found.accepted) == found.rounds
    return found


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("tree", [ROOT_ONLY, *TREES.values()], ids=["plain", *TREES])
def test_equals_plain_decoding(tree, prompt):
    _check_lossless(target_of(), random_draft() if tree.depth else None, tree, prompt)


@pytest.mark.parametrize("error", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_equals_plain_decoding_when_drafts_are_accepted(tree, error):
    found = _check_lossless(target_of(MARKOV), right_draft(error), tree, [5], 30)
    if error == 0.0 and tree != TREES["ragged"]:
        assert found.accepted[-1] >= found.rounds - 1  # every round but perhaps the last goes all the way
        assert found.rounds == -(-29 // (tree.depth + 1))


def test_planted_bug_accepts_one_too_many(monkeypatch):
    right = loop.accept_greedy
    monkeypatch.setattr(loop, "accept_greedy", lambda tree, token, best: right(tree, token, best.at[:, 0].set(token[:, 1])))
    jax.clear_caches()
    with pytest.raises(AssertionError):
        _check_lossless(target_of(), random_draft(), chain(2), [5])
    jax.clear_caches()


def test_all_drafts_rejected():
    target = target_of()
    never = next(token for token in range(TINY.vocab_size) if token not in naive_greedy(target, [5], 20))
    found = _check_lossless(target, random_draft(hot_ids=jnp.array([never])), chain(3), [5])
    assert found.accepted == [19, 0, 0, 0]
    assert found.tau == 1.0


@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 5, 6, 7])
def test_stop_token_anywhere_in_an_accepted_run(position):
    free = naive_greedy(target_of(MARKOV), [5], 12)
    stop = free[position]
    target = target_of(MARKOV, eos_ids=(9_999, stop))
    first = free.index(stop)
    found = _check_lossless(target, right_draft(), chain(5), [5], 12)
    assert found.tokens == free[: first + 1]
    assert found.rounds == -(-first // 6)


@pytest.mark.parametrize("limit", [1, 2, 6, 7, 8, 13])
def test_length_limit_inside_a_round(limit):
    target = target_of(MARKOV)
    found = _generate(target, right_draft(), chain(5), [5], 13, limit)
    assert found.tokens == naive_greedy(target, [5], 13)[:limit]
    assert found.rounds == -(-(limit - 1) // 6)
    assert found.tau == ((limit - 1) / found.rounds if found.rounds else 1.0)


def _state(target, draft, tree, prompts, capacity, max_new):
    head = loop.draft_head_of(target.params, draft.hot_ids)
    models = loop.Models(target.params, draft.params, head)
    shapes = loop.Shapes(target.spec, draft.spec, tree, target.eos_ids)
    width = max(map(len, prompts))
    tokens = jnp.array([prompt + [0] * (width - len(prompt)) for prompt in prompts], jnp.int32)
    lengths = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
    limits = jnp.full(len(prompts), max_new, jnp.int32)
    state = loop.prefill(models, shapes, tokens, lengths, limits, capacity=capacity, max_new=max_new)
    return models, shapes, state


@pytest.mark.parametrize("spec", [TINY, MARKOV], ids=["rejecting", "accepting"])
def test_cache_exactly_full(spec):
    target, draft, tree, prompt, max_new = target_of(spec), right_draft(), chain(4), [3, 1, 4], 11
    # The last round starts at the latest at prompt + max_new - 2 and overhangs by the depth.
    capacity = len(prompt) + max_new - 2 + tree.depth + 1
    models, shapes, state = _state(target, draft, tree, [prompt], capacity, max_new)
    state = loop.decode(models, shapes, state, np.int32(100))
    assert state.out_BT[0].tolist() == naive_greedy(target, prompt, max_new)


@pytest.mark.parametrize("tree", [chain(3), TREES["ragged"]], ids=["chain", "ragged"])
def test_rows_of_a_batch_equal_those_alone(tree):
    stop = naive_greedy(target_of(MARKOV), [5], 3)[2]
    for target, draft in ((target_of(), random_draft()), (target_of(MARKOV, (stop,)), right_draft(0.02))):
        prompts = [[5], [7, 8, 9, 10, 11], [2, 3]]
        models, shapes, state = _state(target, draft, tree, prompts, 64, 16)
        state = loop.decode(models, shapes, state, np.int32(100))
        for line, prompt in enumerate(prompts):
            assert state.out_BT[line, : state.count_B[line]].tolist() == naive_greedy(target, prompt, 16)


def test_reduced_vocabulary_is_still_exact():
    hot = jnp.array([3, 17, 40, 41, 5], jnp.int32)
    found = _check_lossless(target_of(), random_draft(hot_ids=hot), TREES["ragged"], [5])
    assert found.rounds > 0
    target, draft = target_of(), random_draft(hot_ids=hot)
    models, shapes, state = _state(target, draft, TREES["eagle"], [[5]], 64, 4)
    drafted, _ = loop.draft_tree(
        models.draft, shapes.draft, shapes.tree, target.params["embed_VD"], models.draft_head, state.draft_cache,
        state.length_B, state.root_B,
    )  # fmt: skip
    assert set(drafted[0, 1:].tolist()) <= set(hot.tolist())


def test_stream_is_generate_in_pieces():
    decoder = Decoder(target_of(), random_draft(), chain(2), max_new_tokens=30, longest_prompt=8)
    pieces = list(decoder.stream([5, 6]))
    assert len(pieces) > 2
    assert sum(pieces, []) == decoder.generate([5, 6]).tokens


def test_nothing_compiles_after_warm_up():
    decoder = Decoder(target_of(), random_draft(), chain(2), max_new_tokens=8, longest_prompt=90)
    prompts = [list(range(length)) for length in (*range(1, 60, 3), 70, 90)]
    decoder.warm_up(prompts)
    with CompileCounter() as counter:
        for prompt in prompts:
            decoder.generate(prompt)
    assert counter.count == 0
    other = Decoder(target_of(), random_draft(), chain(4), max_new_tokens=8, longest_prompt=90)
    with CompileCounter() as counter:
        other.generate([1])
    assert counter.count > 0


def test_caches_are_donated_and_updated_in_place():
    # One draft token: with more, the scores of the tiny heads are as large as the cache itself.
    models, shapes, state = _state(target_of(), random_draft(), chain(1), [[5]], 2048, 8)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state.target_cache, state.draft_cache)))
    memory = loop.decode.lower(models, shapes, state, np.int32(9)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2
    loop.decode(models, shapes, state, np.int32(9))
    assert state.target_cache[0].k_BKHS.is_deleted() and state.draft_cache.v_BKSH.is_deleted()


def test_phases_are_named_in_the_program():
    models, shapes, state = _state(target_of(), random_draft(), chain(3), [[5]], 64, 8)
    text = loop.decode.lower(models, shapes, state, np.int32(9)).compile().as_text()
    assert all(f"/{phase}/" in text for phase in ("draft", "verify", "accept", "append"))


def test_definitions_of_tau_and_step_alpha():
    one = Generation([1] * 8, 3, [1, 0, 2], 0.5, 1.5)
    other = Generation([1, 2, 3], 2, [2, 0, 0], 0.5, 0.5)
    assert (one.tau, one.tokens_per_second) == (7 / 3, 4.0)
    both = Measurement("both", [one, other])
    assert (both.tokens, both.rounds, both.tau) == (11, 5, 9 / 5)
    assert both.step_alpha == [2 / 5, 1.0]
    assert both.identical_to(Measurement("x", [one, one])) == 1
    assert both.repeated_4_grams == 4 / 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _generate(target_of(), random_draft(), chain(1), []), "the prompt is empty"),
        (lambda: Decoder(target_of(), None, chain(1), max_new_tokens=4, longest_prompt=4), "needs a draft"),
        (lambda: Decoder.plain(target_of(), max_new_tokens=200, longest_prompt=100), "exceed the target's context of 256"),
        (lambda: Decoder.plain(target_of(), max_new_tokens=4, longest_prompt=4).generate([1] * 5), "has 5 tokens"),
        (lambda: Decoder.plain(target_of(), max_new_tokens=4, longest_prompt=4).generate([1], 5), "max_new_tokens is 5"),
    ],
)
def test_error_messages(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_stop_tokens_used_here_are_outside_the_vocabulary():
    assert min(NEVER) >= TINY.vocab_size

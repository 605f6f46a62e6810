"""A text whose values are not finite ends alone: nothing of it reaches what runs in its row later.

In a masked slot such a value would do so, as 0 times infinity is NaN.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import naive_greedy, next_stop, random_draft, random_eagle, target_of

from beagle_jax.decoding import trained
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.draft import grow
from beagle_jax.decoding.drafter import Known
from beagle_jax.decoding.round import _spoiled
from beagle_jax.decoding.tree import ROOT_ONLY, chain, dynamic_tree, static_tree
from beagle_jax.model import cache as cache_module
from beagle_jax.model.cache import KVRows, empty_rows, write_rows

UNTIED = dataclasses.replace(TINY, tie_embeddings=False)
# The first prompt is answered with token 7 after 71 others, in a slot that later prompts, padded to
# 64 tokens, do not write.
BREAKING, SOUND, AT, TOKEN = 0, 1, 72, 7


def spoiled(token: int, value: float):
    """A target with an embedding that is not finite; its head is finite."""
    params = target_of().params
    embed_VD = params["embed_VD"].at[token].set(value)
    target = target_of(UNTIED, next_stop())
    return dataclasses.replace(
        target, params={**params, "embed_VD": embed_VD, "head_VD": params["embed_VD"]}
    )


def check_later_texts(draft, tree, value=jnp.inf) -> None:
    free = naive_greedy(target_of(), [SOUND], 100)
    assert TOKEN not in free
    decoder = SpeculativeDecoder(spoiled(TOKEN, value), draft, tree)
    broken, *later = decoder.generate([[BREAKING], [SOUND]], batch=1, max_new_tokens=100)
    assert (broken.finish, len(broken.tokens), broken.tokens[-1]) == ("error", AT, TOKEN)
    assert [(answer.finish, answer.tokens) for answer in later] == [("length", free)]


@pytest.mark.parametrize(
    ("draft", "tree", "value"),
    [
        (None, ROOT_ONLY, jnp.inf),
        (random_draft, chain(3), jnp.nan),
        (random_eagle, dynamic_tree(2, 2, 5), jnp.inf),
    ],
    ids=["plain", "beagle chain", "eagle dynamic"],
)
def test_a_row_that_broke_answers_the_next_prompt(draft, tree, value):
    check_later_texts(draft and draft(), tree, value)


def test_planted_bug_values_that_are_not_finite_stay_in_the_cache(monkeypatch):
    monkeypatch.setattr(cache_module, "finite", lambda values: values)
    with pytest.raises(AssertionError):
        check_later_texts(None, ROOT_ONLY)


def test_a_token_that_only_pads_prompts_decides_nothing():
    """Prompts are padded with token 0."""
    free = naive_greedy(target_of(), [SOUND], 8)
    assert 0 not in free
    [answer] = SpeculativeDecoder(spoiled(0, jnp.inf)).generate([[SOUND]], max_new_tokens=8)
    assert (answer.finish, answer.tokens) == ("length", free)


def test_a_prompt_with_such_a_token_ends_its_own_answer_alone():
    free = naive_greedy(target_of(), [SOUND], 8)
    decoder = SpeculativeDecoder(spoiled(TOKEN, jnp.inf))
    answers = decoder.generate([[SOUND], [5, TOKEN, 9], [SOUND]], batch=1, max_new_tokens=8)
    assert [answer.tokens for answer in answers] == [free, [], free]
    assert [answer.finish for answer in answers] == ["length", "error", "length"]


def test_values_of_a_prompt_are_looked_at_before_they_are_stored_as_zeros():
    """Only those of its own tokens: the last column pads."""
    v_RKTH = np.ones((3, 2, 4, 3), np.float32)
    v_RKTH[0, 1, 3, 0] = np.nan
    v_RKTH[1, 1, 2, 2] = np.inf
    sound = KVRows(jnp.full((3, 2, 3, 4), jnp.nan), jnp.ones((3, 2, 4, 3)))
    rows = [sound, KVRows(sound.k_BKHS, jnp.asarray(v_RKTH)), sound]
    assert _spoiled(rows, jnp.array([3, 3, 3])).tolist() == [False, True, False]
    assert _spoiled(rows, jnp.array([4, 2, 4])).tolist() == [True, False, False]


def test_written_values_are_finite_and_keys_are_as_they_are():
    rows = KVRows(jnp.full((1, 1, 4, 2), jnp.inf), jnp.array([[[[1.0, jnp.nan], [-jnp.inf, 2.0]]]]))
    held = write_rows(
        empty_rows(1, 1, 3, 4, jnp.float32)._replace(v_BKSH=jnp.zeros((1, 1, 3, 2))),
        rows,
        jnp.array([1]),
    )
    np.testing.assert_array_equal(held.v_BKSH[0, 0], [[0, 0], [1, 0], [0, 2]])


NEVER_WRITTEN = 60
TREE = static_tree([ranks for n in (1, 2, 3) for ranks in itertools.product(range(3), repeat=n)])


def check_other_drafts() -> None:
    """One child of the root has an embedding that is not finite: only paths over it suffer."""
    draft = random_draft(hot_ids=jnp.array([NEVER_WRITTEN, 11, 12]))
    now, state = SpeculativeDecoder(spoiled(NEVER_WRITTEN, jnp.inf), draft, TREE).prefilled([[5]])
    known = Known(state.transcript.root_B, state.cache.length_B)
    grown = jax.jit(lambda drafter, state: grow(drafter, state, known, TREE))(
        now.drafter, state.draft
    )
    spoilt_Q = np.asarray(grown.query_token_BQ[0]) == NEVER_WRITTEN
    below_Q = (np.asarray(grown.query_sees_BQQ[0]) & spoilt_Q).any(axis=1) | spoilt_Q
    assert below_Q[1:4].any() and not below_Q[4:].all()
    np.testing.assert_array_equal(np.isfinite(grown.state_BQD[0]).all(axis=1), ~below_Q)


def test_a_drafted_node_spoils_no_other_draft():
    check_other_drafts()


def test_planted_bug_a_drafted_node_reaches_the_others(monkeypatch):
    monkeypatch.setattr(trained, "finite", lambda values: values)
    with pytest.raises(AssertionError):
        check_other_drafts()

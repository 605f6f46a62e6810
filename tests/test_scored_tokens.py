"""The tokens that a draft scores: each once, all in the vocabulary, one for each row of its head.

Folders are checked where they are loaded or imported, and drafts that are built in Python where a
decoder takes them.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import random_draft, random_eagle, target_of
from eagle3_cases import HOT, random_eagle3

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.tree import chain
from beagle_jax.errors import UserError
from beagle_jax.weights.draft import load_draft, save_draft

DRAFTS = {"beagle": random_draft, "eagle": random_eagle, "eagle3": random_eagle3}
V = TINY.vocab_size


def changed(name: str, ids: list[int] | None):
    """A draft that scores these tokens; an EAGLE-3 draft keeps its number of them."""
    draft = DRAFTS[name]()
    if ids is not None and name == "eagle3":
        ids = [*ids, *[token for token in HOT.tolist() if token not in ids]][: len(HOT)]
    return dataclasses.replace(draft, hot_ids=None if ids is None else jnp.array(ids, jnp.int32))


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 0, 1], "hot_tokens holds token 0 more than once"),
        ([5, 9, 5], "hot_tokens holds token 5 more than once"),
        ([3, V], f"this draft belongs to another target .it scores token {V}"),
        ([3, -1], "this draft belongs to another target .it scores token -1"),
    ],
)
def test_repeated_and_unknown_tokens_are_refused(tmp_path, name, ids, message):
    draft = changed(name, ids)
    with pytest.raises(UserError, match=message):
        SpeculativeDecoder(target_of(), draft, chain(1))
    save_draft(tmp_path / "draft", draft)
    with pytest.raises(UserError, match=message):
        load_draft(tmp_path / "draft", TINY)


@pytest.mark.parametrize("name", DRAFTS)
def test_an_order_of_tokens_is_kept(tmp_path, name):
    draft = changed(name, [9, 3, 60, 0])
    SpeculativeDecoder(target_of(), draft, chain(1))
    save_draft(tmp_path / "draft", draft)
    np.testing.assert_array_equal(load_draft(tmp_path / "draft", TINY).hot_ids, draft.hot_ids)


@pytest.mark.parametrize("ids", [None, HOT[:-1].tolist()])
def test_a_head_of_another_number_of_tokens_is_refused(tmp_path, ids):
    """Row v would score token v, or no row would score the last tokens."""
    draft = dataclasses.replace(random_eagle3(), hot_ids=None if ids is None else jnp.array(ids))
    count = V if ids is None else len(ids)
    with pytest.raises(UserError, match=f"head has {len(HOT)} rows for {count} scored tokens"):
        SpeculativeDecoder(target_of(), draft, chain(1))
    save_draft(tmp_path / "draft", draft)
    with pytest.raises(UserError, match=f"head has {len(HOT)} rows, and {count} tokens are scored"):
        load_draft(tmp_path / "draft", TINY)

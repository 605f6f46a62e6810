"""Drafting with a cache equals training's simulation, and caches hold true states only.

method.md 13.2, 13.10.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from decode_cases import MARKOV, random_draft, right_draft, round_of, run, start, target_of
from late_oracle import late_keys_values

from beagle_jax.decoding import trained
from beagle_jax.decoding.draft import grow
from beagle_jax.decoding.drafter import Known
from beagle_jax.decoding.round import Round
from beagle_jax.decoding.trained import BeagleDrafter, DraftHead
from beagle_jax.decoding.tree import chain, dynamic_tree, static_tree
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec
from beagle_jax.model.cache import empty_rows, write_rows
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import forward
from beagle_jax.training.late import late_states

LENGTH = 12
TREE = static_tree([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 1, 1)])


def _draft(draft, embed_VD, states_BLD, length, root, tree, **options):
    """Returns what one round drafts, from a cache of true states below `length`."""
    block = BeagleBlock(draft.spec).bind({"params": draft.params})
    rows = block.keys_values(states_BLD, jnp.arange(states_BLD.shape[1])[None])
    empty = empty_rows(1, draft.spec.num_kv_heads, 32, draft.spec.head_dim, jnp.float32)
    # Slots at and past `length` hold rows that must not show.
    cache = write_rows(empty, rows, jnp.zeros(1, jnp.int32))
    drafter = BeagleDrafter(
        draft.spec, draft.params, embed_VD, DraftHead(embed_VD, None), **options
    )
    return grow(drafter, cache, Known(jnp.array([root]), length[None]), tree)


@lru_cache
def _both_ways(steps: int, plant: str = ""):
    """Returns a jitted function of states and length: the drafted text, and its late stage.

    plant: a name of its own for a program with a planted bug, so that no other test meets it.
    """
    target, draft = target_of(), random_draft()
    embed_VD = target.params["embed_VD"]

    @jax.jit
    def both(states_BLD, length):
        drafted = _draft(draft, embed_VD, states_BLD, length, 7, chain(steps))
        # Training sees the text that the draft itself proposed, in a window that starts at the
        # root.
        tokens = jax.lax.dynamic_update_slice(
            jnp.zeros((1, LENGTH + 6), jnp.int32), drafted.query_token_BQ, (0, length)
        )
        return drafted.state_BQD, late_states(
            draft.params,
            draft.spec,
            embed_VD[tokens],
            states_BLD,
            jnp.array([[LENGTH + 6]]),
            jnp.array([[0]]),
            window=steps,
            steps=steps,
            offset=length % steps,
            detach=True,
        )

    return both


def _compare_with_training(length: int, steps: int, plant: str = "") -> None:
    states_BLD = jax.random.normal(jax.random.key(length), (1, LENGTH + 6, TINY.hidden_size))
    state_BQD, late = _both_ways(steps, plant)(states_BLD, jnp.int32(length))
    window = length // steps
    assert late.query_BUJ[0, window].tolist() == list(range(length, length + steps))
    np.testing.assert_allclose(
        state_BQD[0], late.state_BUJD[0, window], atol=1e-5 * float(jnp.abs(state_BQD).max())
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 4, 5, 12])
def test_drafting_equals_the_late_stage(length, steps):
    _compare_with_training(length, steps)


def test_planted_bug_draft_attends_to_itself_late(monkeypatch):
    # Training keeps the right block: it takes the kind's own.
    monkeypatch.setattr(
        trained, "BeagleBlock", type("Wrong", (BeagleBlock,), {"keys_values": late_keys_values})
    )
    with pytest.raises(AssertionError):
        _compare_with_training(5, 3, "late")


@partial(jax.jit, static_argnums=1)
def _alone(params, spec, *rest):
    return BeagleBlock(spec).apply({"params": params}, *rest)


@pytest.mark.parametrize("append_predicted", [True, False])
@pytest.mark.parametrize("tree", [TREE, dynamic_tree(3, 3, 9)], ids=["static", "dynamic"])
def test_a_query_sees_its_strict_ancestors_only(tree, append_predicted):
    """In a tree each query's state is that of the chain along its own path.

    Without appended states it depends on the depth alone.
    """
    target, draft = target_of(), random_draft()
    states_BLD = jax.random.normal(jax.random.key(0), (1, LENGTH, TINY.hidden_size))
    embed_VD = target.params["embed_VD"]
    run = jax.jit(
        lambda states_BLD, length: _draft(
            draft, embed_VD, states_BLD, length, 7, tree, append_predicted=append_predicted
        )
    )
    drafted, seen = jax.device_get(run(states_BLD, jnp.int32(LENGTH))), []
    true_LD, table_VD = np.asarray(states_BLD[0]), np.asarray(embed_VD)
    for query, sees_Q in enumerate(drafted.query_sees_BQQ[0]):
        path = np.array([*np.flatnonzero(sees_Q), query])
        memory_SD = np.concatenate([true_LD, drafted.state_BQD[0, path[:-1]]])
        e_SD = np.concatenate([np.zeros_like(true_LD), table_VD[drafted.query_token_BQ[0, path]]])
        mask = np.tri(len(e_SD), len(memory_SD), -1, dtype=bool)
        if not append_predicted:
            mask = mask & (np.arange(len(memory_SD)) < LENGTH)[None]
        alone = _alone(draft.params, draft.spec, e_SD[None], memory_SD[None], mask[None])[0, -1]
        np.testing.assert_allclose(
            drafted.state_BQD[0, query], alone, atol=1e-5 * float(jnp.abs(alone).max())
        )
        seen.append(len(path))
    assert max(seen) == tree.depth


@partial(jax.jit, static_argnames="spec")
def _rows_of_text(params, spec, draft_params, text_BL):
    """Returns the draft's and the target's cache rows of a text that is read at once."""
    B, L = text_BL.shape
    positions_BL = jnp.arange(L)[None]
    states_BLD, rows = forward(params, spec, text_BL, positions_BL, causal_mask(jnp.full(B, L), L))
    return [
        BeagleBlock(BeagleSpec.from_target(spec))
        .bind({"params": draft_params})
        .keys_values(states_BLD, positions_BL),
        *rows,
    ]


def compare_caches(spec, draft, tree, rounds=4, **parts) -> None:
    target, prompt = target_of(spec), [3, 1, 4, 1, 5]
    now = round_of(target, draft, tree).with_(**parts)
    state, after = run(now, start(now, [prompt], [40], 64), rounds)
    cached = int(state.cache.length_B[0])
    # tokens past those cached are garbage, and later
    text = jnp.array([prompt + after.out_BS[0].tolist()])[:, :64]
    assert cached == len(prompt) + int(after.count_B[0]) - 1 > len(prompt) + rounds - 1
    rows = _rows_of_text(target.params, spec, draft.params, text)
    for cache, right in zip([state.draft, *state.cache.layers], rows, strict=True):
        np.testing.assert_allclose(
            cache.k_BKHS[..., :cached], right.k_BKHS[..., :cached], atol=1e-4
        )
        np.testing.assert_allclose(
            cache.v_BKSH[:, :, :cached], right.v_BKSH[:, :, :cached], atol=1e-4
        )


@pytest.mark.parametrize(
    "tree", [chain(3), TREE, dynamic_tree(3, 3, 7)], ids=["chain", "static", "dynamic"]
)
@pytest.mark.parametrize("case", ["rejecting", "accepting"])
def test_caches_hold_true_states_only(case, tree):
    if case == "rejecting":
        compare_caches(TINY, random_draft(), tree)
    else:
        compare_caches(MARKOV, right_draft(0.02), tree)


def test_planted_bug_keeps_the_wrong_path():
    def wrong(now, state, proposal, states_BWD):
        accepted, finite_BW = Round.accept(now, state, proposal, states_BWD)
        path_BP1 = jnp.minimum(accepted.path_BP1 + 1, states_BWD.shape[1] - 1)
        return accepted._replace(path_BP1=path_BP1), finite_BW

    with pytest.raises(AssertionError):
        compare_caches(TINY, random_draft(), chain(3), accept=wrong)

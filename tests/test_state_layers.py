"""Beagle drafts that read several layers, with heads of their own number (method.md 15)."""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY, slow_but
from decode_cases import letters, naive_greedy, next_stop, round_of, run, start, target_of
from late_oracle import oracle_states
from layers_cases import SPEC, D, random_layers_draft, random_params
from step_cases import CLEAN, EARLY, LATE, NOISY, three_rows

from beagle_jax.config import DraftConfig
from beagle_jax.data.state_records import apart
from beagle_jax.data.target_forward import states_in_memory
from beagle_jax.decoding import trained
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.draft import grow
from beagle_jax.decoding.drafter import Known
from beagle_jax.decoding.sampling import Sampling
from beagle_jax.decoding.tree import chain, dynamic_tree, static_tree
from beagle_jax.errors import UserError
from beagle_jax.evaluation.forced import forced_reads
from beagle_jax.evaluation.replay import replayed
from beagle_jax.model import beagle
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec, init_draft
from beagle_jax.model.kinds import new_spec
from beagle_jax.model.layers import apply_rope, rope_tables
from beagle_jax.model.target import FINAL, forward
from beagle_jax.training import step as stepping
from beagle_jax.training.cost import row_flops
from beagle_jax.training.early import early_states
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.late import late_states
from beagle_jax.training.step import make_steps
from beagle_jax.weights.draft import load_draft, save_draft

PLAIN = replace(SPEC, state_layers=())
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6]]
TREES = {
    "chain": chain(3),
    "static": static_tree([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)]),
    "dynamic": dynamic_tree(3, 3, 8),
}


def records(B: int = 2, L: int = 13, seed: int = 3) -> np.ndarray:
    """Random streams and states. The streams are of very different sizes, as a target's are."""
    rng = np.random.default_rng(seed)
    sizes = np.repeat([0.02, 30.0, 1.0], D)
    return (rng.standard_normal((B, L, 3 * D)) * sizes).astype(np.float32)


# Off by default, and then today's draft


def test_without_layers_it_reads_the_states_alone():
    spec = BeagleSpec.from_target(TINY)
    assert (spec.taps, spec.streams, spec.input_width) == ((), (), D)
    assert new_spec(DraftConfig(), TINY) == spec
    assert (SPEC.taps, SPEC.streams, SPEC.input_width) == ((0, 1, FINAL), (0, 1), 3 * D)


def test_training_begins_exactly_at_the_draft_without_layers():
    """The new projections start at zero and change no other random number."""
    with_layers, without = (init_draft(spec, jax.random.key(7)) for spec in (SPEC, PLAIN))
    assert not any(with_layers[name].any() for name in ("k_layers", "v_layers"))
    assert with_layers.keys() - without.keys() == {"k_layers", "v_layers"}
    for name, array in without.items():
        np.testing.assert_array_equal(with_layers[name], array, err_msg=name)
    joined_BLI = jnp.asarray(records())
    e_BLD, positions_BL = joined_BLI[..., :D], jnp.arange(13)[None]

    @partial(jax.jit, static_argnums=0)
    def states(spec, params, h_BLI):
        block = BeagleBlock(spec).bind({"params": params})
        return block.teacher_forced(e_BLD, h_BLI), *block.true_rows(h_BLI, e_BLD, positions_BL)

    for ours, plain in zip(
        states(SPEC, with_layers, joined_BLI),
        states(PLAIN, without, joined_BLI[..., -D:]),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, plain)


# The equations of method.md 15


def by_hand(params, joined_LI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [L, K, H] of true states, without the block's code, in float64."""
    h_LD, w = joined_LI[:, -D:].astype(np.float64), {k: np.float64(x) for k, x in params.items()}
    size_L1 = np.sqrt((h_LD**2).mean(axis=1, keepdims=True))
    streams = []
    for first in range(0, 2 * D, D):
        a_LD = joined_LI[:, first : first + D].astype(np.float64)
        streams.append(a_LD / np.sqrt((a_LD**2).mean(axis=1, keepdims=True) + 1e-6) * size_L1)
    lower_LI = np.concatenate(streams, axis=1)
    k_LKH, v_LKH = (
        (h_LD @ w[f"{name}_proj"].T + lower_LI @ w[f"{name}_layers"].T).reshape(
            len(h_LD), SPEC.num_kv_heads, SPEC.head_dim
        )
        for name in "kv"
    )
    cos_LH, sin_LH = rope_tables(jnp.arange(len(h_LD)), SPEC.head_dim, SPEC.rope_theta)
    return np.asarray(apply_rope(jnp.asarray(k_LKH), cos_LH[:, None], sin_LH[:, None])), v_LKH


def check_rows() -> None:
    joined_BLI, params = records(1), random_params()
    block = BeagleBlock(SPEC).bind({"params": params})
    rows = block.entry_rows(jnp.asarray(joined_BLI), jnp.arange(13)[None])
    k_LKH, v_LKH = by_hand(params, joined_BLI[0])
    np.testing.assert_allclose(rows.k_BKHS[0], np.moveaxis(k_LKH, 0, 2), atol=1e-4)
    np.testing.assert_allclose(rows.v_BKSH[0], np.moveaxis(v_LKH, 0, 1), atol=1e-4)


def test_rows_are_those_of_the_equation():
    check_rows()


def test_planted_bug_streams_in_their_own_size(monkeypatch):
    monkeypatch.setattr(beagle, "beside_state", lambda x_BTI, width: x_BTI[..., :-width])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_rows()


# Training: the fast late stage against the plain one, and the early stage


LENGTH, START = jnp.array([[13], [9]], jnp.int32), jnp.zeros((2, 1), jnp.int32)


@pytest.mark.parametrize(("window", "steps", "detach"), [(3, 3, True), (4, 2, False)])
def test_the_late_stage_equals_its_plain_form(window, steps, detach):
    joined_BLI, params = jnp.asarray(records()), random_params()
    e_BLD = jax.random.normal(jax.random.key(2), (2, 13, D))
    settings = dict(window=window, steps=steps, offset=jnp.int32(1), detach=detach)

    @jax.jit
    def both(params, e_BLD, joined_BLI):
        return (
            late_states(params, SPEC, e_BLD, joined_BLI, LENGTH, START, **settings),
            oracle_states(params, SPEC, e_BLD, joined_BLI, LENGTH[:, 0], **settings),
        )

    fast, plain = jax.device_get(both(params, e_BLD, joined_BLI))
    for step in range(steps):
        valid_BU1 = fast.valid_BUJ[:, :, step, None]
        expected_BUD = np.take_along_axis(plain[step], fast.query_BUJ[:, :, step, None], axis=1)
        np.testing.assert_allclose(
            np.where(valid_BU1, fast.state_BUJD[:, :, step], 0),
            np.where(valid_BU1, expected_BUD, 0),
            atol=2e-5,
        )


def test_early_and_late_read_the_streams():
    """Both stages see a change in a stream before the query, and none in one after it."""
    joined_BLI, params = jnp.asarray(records()), random_params()
    e_BLD = jax.random.normal(jax.random.key(2), (2, 13, D))
    changed_BLI = joined_BLI.at[:, 6, : 2 * D].multiply(-1.0)  # streams alone

    @jax.jit
    def early(h_BLI):
        return early_states(
            params, SPEC, e_BLD, h_BLI, LENGTH, START, window=1, offset=jnp.int32(0)
        )

    @jax.jit
    def late(h_BLI):
        return late_states(
            params, SPEC, e_BLD, h_BLI, LENGTH, START, window=1, steps=1, offset=0, detach=True
        ).state_BUJD[:, :, 0]

    for stage in (early, late):
        moved_BL = np.abs(stage(changed_BLI) - stage(joined_BLI)).max(axis=-1)
        assert (moved_BL[:, :7] == 0).all() and (moved_BL[0, 7:13] > 1e-5).all()


def stored_batch(tiny_params, spec):
    batch = three_rows(0, 3, 3)
    joined_BLI = states_in_memory(tiny_params, TINY, batch.tokens_BL, batch.length_BC, spec.taps)
    reads_BLI, targets_BLD = apart(joined_BLI, spec.taps)
    return batch._replace(inputs_BLI=reads_BLI, targets_BLD=targets_BLD)


@pytest.mark.parametrize(
    ("stage", "states"),
    [
        (EARLY, "stored"),
        (LATE, "online"),
        pytest.param(EARLY, "online", marks=pytest.mark.slow),
        pytest.param(LATE, "stored", marks=pytest.mark.slow),
    ],
)
def test_a_stage_trains_every_parameter(tiny_params, stage, states):
    stored = stored_batch(tiny_params, SPEC)
    assert stored.inputs_BLI.shape[-1] == 3 * D and stored.targets_BLD.shape[-1] == D
    batch = stored if states == "stored" else stored._replace(inputs_BLI=None, targets_BLD=None)
    table_VD = tiny_params["embed_VD"]
    frozen = FrozenTarget(table_VD, table_VD, tiny_params, TINY)
    step, evaluate, init = make_steps(SPEC, CLEAN, stage, ONE_DEVICE)
    first = init_draft(SPEC, jax.random.key(1))
    before = evaluate(first, frozen, batch)
    # 1e-5: the same streams, stored and computed in the step
    np.testing.assert_allclose(
        before.objective, evaluate(first, frozen, stored).objective, rtol=1e-5
    )
    state = init(first)
    for _ in range(8):
        state, _ = step(state, frozen, batch, 42)
    assert not [name for name in first if np.array_equal(state.params[name], first[name])]
    assert evaluate(state.params, frozen, batch).objective < before.objective


@pytest.mark.parametrize("plant", [False, True])
def test_noise_is_on_the_states_and_not_on_the_streams(tiny_params, plant):
    batch = stored_batch(tiny_params, SPEC)
    taps = (0, 1) if plant else SPEC.taps  # planted: a draft that takes streams for states
    spec = SimpleReads(taps)
    noisy_BLI = stepping._noisy_inputs(spec, batch, NOISY, jax.random.key(0))
    same = np.asarray(noisy_BLI) == batch.inputs_BLI
    streams_stay, states_stay = same[..., : 2 * D].all(), same[0, :, 2 * D :].all()
    assert (streams_stay, states_stay) == ((False, False) if plant else (True, False))


class SimpleReads:
    """What `_noisy_inputs` asks of a description."""

    target_width = D

    def __init__(self, taps):
        self.taps, self.streams = taps, tuple(tap for tap in taps if tap != FINAL)


def test_operations_count_the_streams():
    for stage in (EARLY, LATE):
        few, many = (row_flops(spec, stage, 61, 14, 8) for spec in (PLAIN, SPEC))
        # keys and values of 14 states, from 2 * D more numbers, with the gradient of the weights
        assert many - few == 2 * 14 * 2 * 2 * (2 * D) * SPEC.num_kv_heads * SPEC.head_dim


# Decoding


@lru_cache
def _both_ways(steps: int, plant: str = ""):
    """What one round drafts after a text, and what the late stage predicts for the same tokens.

    plant: a name of its own for a program with a planted bug.
    """
    # A stop token of its own keeps a planted program apart from the right one.
    target, draft = target_of(eos_ids=next_stop()), random_layers_draft()
    now = round_of(target, draft, chain(steps))

    @jax.jit
    def inputs_of(tokens_BL):
        L = tokens_BL.shape[1]
        positions_BL, mask_BLL = jnp.arange(L)[None], jnp.tri(L, dtype=bool)[None]
        out = forward(target.params, TINY, tokens_BL, positions_BL, mask_BLL, taps=SPEC.taps)
        return out.tapped_BTI

    @jax.jit
    def drafted(state):
        known = Known(state.transcript.root_B, state.cache.length_B)
        return grow(now.drafter, state.draft, known, now.tree)

    return target, draft, now, inputs_of, drafted


def compare_with_training(steps: int, plant: str = "") -> None:
    target, draft, now, inputs_of, drafted = _both_ways(steps, plant)
    prompt = [3, 1, 4, 1, 5]
    state, after = run(now, start(now, [prompt], [40], 64), 2)
    length = int(state.cache.length_B[0])
    out = drafted(state)
    text = [*prompt, *after.out_BS[0].tolist()][:length]
    tokens_1L = jnp.array([[*text, *out.query_token_BQ[0].tolist()]], jnp.int32)
    table_VD = target.params["embed_VD"]
    late = jax.jit(late_states, static_argnames=("spec", "window", "steps", "detach"))(
        draft.params,
        SPEC,
        table_VD[tokens_1L],
        inputs_of(tokens_1L),
        jnp.array([[tokens_1L.shape[1]]]),
        jnp.array([[0]]),
        window=steps,
        steps=steps,
        offset=length % steps,
        detach=True,
    )
    window = length // steps
    assert late.query_BUJ[0, window].tolist() == list(range(length, length + steps))
    np.testing.assert_allclose(
        out.state_BQD[0],
        late.state_BUJD[0, window],
        atol=1e-4 * float(jnp.abs(out.state_BQD).max()),
    )


@pytest.mark.parametrize("steps", [2, 3])
def test_drafting_equals_the_late_stage(steps):
    compare_with_training(steps)


def test_planted_bug_drafting_without_streams(monkeypatch):
    """The cache of decoding lacks what the streams add; training keeps the right block."""

    class Wrong(BeagleBlock):
        def entry_rows(self, x_BTI, positions_BT):
            return self.keys_values(x_BTI[..., -D:], positions_BT)

    monkeypatch.setattr(trained, "BeagleBlock", Wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare_with_training(3, "without streams")


@pytest.mark.parametrize("tree", slow_but(["dynamic"], list(TREES)))
def test_greedy_text_is_that_of_plain_decoding(tree):
    target = target_of()
    decoder = SpeculativeDecoder(target, random_layers_draft(), TREES[tree])
    answers = decoder.generate(PROMPTS, max_new_tokens=20)
    assert [answer.tokens for answer in answers] == [
        naive_greedy(target, prompt, 20) for prompt in PROMPTS
    ]


def test_draws_are_those_of_plain_decoding():
    target, drawn = target_of(tokenizer=letters()), Sampling(temperature=1.0, top_p=0.9)
    hot = random_layers_draft(hot_ids=jnp.arange(40, dtype=jnp.int32))
    fast, plain = SpeculativeDecoder(target, hot, TREES["dynamic"]), SpeculativeDecoder(target)
    ours, theirs = (
        decoder.generate(PROMPTS, drawn, max_new_tokens=12, seed=3) for decoder in (fast, plain)
    )
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in theirs]


def replayed_rounds(bug: int = 0) -> list[int]:
    """Recomputes the rounds of an answer from its tokens alone, as the audit does."""
    target, draft, tree, prompt = target_of(), random_layers_draft(), dynamic_tree(3, 8, 24), [5, 7]
    # attention that outweighs the embedding, which knows nothing of streams
    draft = replace(draft, params=draft.params | {"o_proj": 20 * draft.params["o_proj"]})
    [answer] = SpeculativeDecoder(target, draft, tree).generate([prompt], max_new_tokens=60)
    reads_LI = forced_reads(target, [*prompt, *answer.tokens], draft.taps)
    rounds = replayed(
        target, draft, tree, prompt, answer.tokens, np.roll(reads_LI, bug, axis=0), True
    )
    assert np.bincount(rounds, minlength=tree.depth + 1).tolist() == answer.accepted
    return answer.accepted


def test_the_audit_recomputes_its_rounds():
    assert sum(replayed_rounds()[1:]) > 2, "right and wrong rounds must both be there"


def test_planted_bug_streams_of_the_token_before():
    with pytest.raises(AssertionError):
        replayed_rounds(bug=1)


# Settings and files


def test_sizes_are_settings():
    settings = DraftConfig(num_heads=8, num_kv_heads=8, head_dim=6, intermediate_size=20)
    for kind in ("beagle", "eagle", "eagle3"):
        spec = new_spec(settings.changed(kind=kind), TINY)
        sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.intermediate_size)
        assert sizes == (8, 8, 6, 20)
        assert spec.param_shapes()["v_proj"][0] == 48
    assert new_spec(DraftConfig(num_kv_heads=4), TINY).num_heads == TINY.num_heads
    with pytest.raises(UserError, match=r"draft\.num_heads is 4 and draft\.num_kv_heads 3 "):
        new_spec(DraftConfig(num_kv_heads=3), TINY)
    with pytest.raises(UserError, match=r"streams 0 to 1; leave out \[2\]"):
        new_spec(DraftConfig(state_layers=(0, 2)), TINY)
    eagle3 = DraftConfig(kind="eagle3", state_layers=(0, 2))
    assert new_spec(eagle3, TINY).taps == (0, 2)


def test_a_draft_is_saved_and_loaded(tmp_path):
    draft = random_layers_draft()
    save_draft(tmp_path, draft)
    again = load_draft(tmp_path, TINY)
    assert again.spec == SPEC and again.fingerprint == draft.fingerprint
    for name, array in draft.params.items():
        np.testing.assert_array_equal(again.params[name], array)
    with pytest.raises(UserError, match=r"reads the streams \[1\], the target has 0 to 0"):
        load_draft(tmp_path, replace(TINY, num_layers=0))
    with pytest.raises(UserError, match=r"reads the streams \[1\], the target has 0 to 0"):
        SpeculativeDecoder(target_of(replace(TINY, num_layers=0)), draft, chain(2))

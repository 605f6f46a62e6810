"""The closed-form start: sees the newest state, fits as a plain linear map does, keeps shapes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beagle_jax.data.loader import Batch
from beagle_jax.model.attention import partial_attention
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec, init_draft
from beagle_jax.model.masks import early_block_mask
from beagle_jax.training.warm_start import _neighbours, _summed, warm_start

SPEC = BeagleSpec(
    hidden_size=48,
    intermediate_size=96,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
)
VOCAB, ROWS, WIDTH = 40, 24, 64


@pytest.fixture(scope="module")
def linear_text():
    """Makes states that are linear in the token and the previous state.

    They have a large mean, as real states do.
    """
    rng = np.random.default_rng(0)
    embed_VD = 0.3 + 0.3 * rng.standard_normal((VOCAB, SPEC.hidden_size))
    carry_DD = 0.6 * np.linalg.qr(rng.standard_normal((SPEC.hidden_size,) * 2))[0]
    tokens_BL = rng.integers(0, VOCAB, (ROWS, WIDTH), np.int32)
    states_BLD = np.zeros((ROWS, WIDTH, SPEC.hidden_size), np.float32)
    for position in range(1, WIDTH):
        drive = (
            2.0 + 3.0 * embed_VD[tokens_BL[:, position]] + states_BLD[:, position - 1] @ carry_DD.T
        )
        states_BLD[:, position] = drive
    counted_BT = np.ones((ROWS, WIDTH), bool)
    counted_BT[:, -1] = False
    batch = Batch(
        tokens_BL,
        states_BLD,
        counted_BT,
        np.full((ROWS, 1), WIDTH, np.int32),
        np.zeros((ROWS, 1), np.int32),
    )
    return jnp.asarray(embed_VD, jnp.float32), batch


def in_parts(batch: Batch):
    """Returns a sample of the batch's rows, eight at a time."""
    parts = [
        jax.tree.map(lambda x, first=first: x[first : first + 8], batch) for first in (0, 8, 16)
    ]
    return lambda: parts


@pytest.fixture(scope="module")
def started(linear_text):
    fresh = init_draft(SPEC, jax.random.key(0))
    embed_VD, batch = linear_text
    return fresh, warm_start(fresh, SPEC, embed_VD, in_parts(batch))


@partial(jax.jit, static_argnames="spec")
def _error(params, embed_VD, batch, spec=SPEC):
    mask = early_block_mask(jnp.asarray(batch.length_BC), WIDTH, 1, jnp.int32(0))
    states = BeagleBlock(spec).apply(
        {"params": params}, embed_VD[batch.tokens_BL], jnp.asarray(batch.inputs_BLI), mask
    )
    return jnp.mean(jnp.square(states - batch.inputs_BLI)[:, 8:])


@jax.jit
def _nearest_share(params, embed_VD, batch):
    """Returns the attention weight on the newest visible state.

    The mean over the first head's queries.
    """
    block = BeagleBlock(SPEC).bind({"params": params})
    position = jnp.broadcast_to(jnp.arange(WIDTH), (ROWS, WIDTH))
    q_BKGTH = block.queries(embed_VD[batch.tokens_BL], position)
    rows = block.keys_values(jnp.asarray(batch.inputs_BLI), position)
    visible_TS = jnp.arange(WIDTH)[None, :] < jnp.arange(WIDTH)[:, None]
    part = partial_attention(q_BKGTH, *rows, visible_TS[None, None, None])
    score = jnp.einsum("BKGTH,BKHS->BKGTS", q_BKGTH, rows.k_BKHS) * SPEC.head_dim**-0.5
    weight = jnp.exp(score - part.peak_BKGT[..., None]) / part.total_BKGT[..., None]
    return jnp.mean(jnp.diagonal(weight[:, 0, 0], offset=-1, axis1=1, axis2=2))


def test_same_names_and_shapes(started):
    fresh, warm = started
    assert jax.tree.map(jnp.shape, warm) == jax.tree.map(jnp.shape, fresh)
    assert all(bool(jnp.isfinite(array).all()) for array in warm.values())


def test_attends_to_the_newest_state(started, linear_text):
    fresh, warm = started
    assert _nearest_share(warm, *linear_text) > 0.5
    assert _nearest_share(fresh, *linear_text) < 0.2


def test_fits_better_than_a_random_start(started, linear_text):
    fresh, warm = started
    assert _error(warm, *linear_text) < 0.5 * _error(fresh, *linear_text)


def test_planted_bug_score_that_peaks_elsewhere(started, linear_text, monkeypatch):
    from beagle_jax.training import warm_start as module

    monkeypatch.setattr(module, "_back_one", lambda score_H, spec: -score_H)
    embed_VD, batch = linear_text
    broken = module.warm_start(started[0], SPEC, embed_VD, in_parts(batch))
    assert _nearest_share(broken, *linear_text) < 0.2


NARROW = replace(SPEC, num_kv_heads=1)


def plain_fit(embed_VD, batch) -> float:
    """Error of h_i ~ A e_i + B h_{i-1} + c with a B of the rank of one KV head."""
    e_MD = np.asarray(embed_VD, np.float64)[batch.tokens_BL[:, 1:-1].ravel()]
    before_MD, after_MD = (
        np.asarray(batch.inputs_BLI[:, at], np.float64).reshape(-1, NARROW.hidden_size)
        for at in (slice(0, -2), slice(1, -1))
    )
    token_MF = np.concatenate([e_MD, np.ones((len(e_MD), 1))], axis=1)

    def left(y_MO: np.ndarray) -> np.ndarray:
        return y_MO - token_MF @ np.linalg.lstsq(token_MF, y_MO, rcond=None)[0]

    own_MD, rest_MD = left(before_MD), left(after_MD)
    fitted_MD = own_MD @ np.linalg.lstsq(own_MD, rest_MD, rcond=None)[0]
    _, _, direction_OD = np.linalg.svd(fitted_MD, full_matrices=False)
    kept_Dr = direction_OD[: NARROW.head_dim].T
    return float(np.mean(np.square(rest_MD - fitted_MD @ kept_Dr @ kept_Dr.T)))


def narrow_error(linear_text) -> float:
    embed_VD, batch = linear_text
    started = warm_start(init_draft(NARROW, jax.random.key(0)), NARROW, embed_VD, in_parts(batch))
    return float(_error(started, *linear_text, spec=NARROW))


# Its attention is not all on the newest state, and the MLP reads states of normed size.
NEARLY = 1.05


def test_fits_as_well_as_a_linear_map_of_the_rank_of_the_values(linear_text):
    assert narrow_error(linear_text) < NEARLY * plain_fit(*linear_text)


def test_planted_bug_values_that_explain_nothing(linear_text, monkeypatch):
    from beagle_jax.training import warm_start as module

    monkeypatch.setattr(module, "_explaining", lambda D, rank, **_: np.eye(rank, D))
    assert narrow_error(linear_text) > NEARLY * plain_fit(*linear_text)


def test_a_sample_in_parts_gives_the_sums_of_the_whole(linear_text):
    embed_VD, batch = linear_text
    parts, whole = (
        _summed(SPEC, embed_VD, sample, _neighbours)
        for sample in (in_parts(batch), lambda: [batch])
    )
    jax.tree.map(
        lambda part, all_: np.testing.assert_allclose(part, all_, atol=1e-5 * np.abs(all_).max()),
        parts,
        whole,
    )
    assert all(x.dtype == np.float64 for x in jax.tree.leaves(parts))

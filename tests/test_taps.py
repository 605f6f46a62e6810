"""Taps of the target: the residual streams that `forward` returns beside its states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY
from family_cases import family

from beagle_jax.model import target as target_module
from beagle_jax.model.cache import visible_slots, write_all
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import Forward, final_norm, forward, init_cache

__all__ = ["family"]  # a fixture: pytest looks for it among the names of this file

# A family whose layers have two norms, one with experts, and one whose embedding is scaled.
some_families = pytest.mark.parametrize("family", ["llama", "mixtral", "gemma 3"], indirect=True)


_forward = jax.jit(forward, static_argnames=("spec", "taps"))


def _read(params, spec, tokens_BT, taps) -> Forward:
    B, T = tokens_BT.shape
    positions_BT = np.broadcast_to(np.arange(T), (B, T))
    mask_BTT = np.asarray(causal_mask(np.full(B, T), T))
    return _forward(params, spec, tokens_BT, positions_BT, mask_BTT, taps=tuple(taps))


def _check_torch_streams(model, spec, params, shift=0):
    """Checks that taps equal the inputs of transformers' layers.

    shift: planted, taps of other layers.
    """
    tokens_BT = np.random.default_rng(1).integers(0, spec.vocab_size, (3, 7))
    with torch.no_grad():
        hidden = model.model(torch.from_numpy(tokens_BT), output_hidden_states=True).hidden_states
    taps = [(layer + shift) % spec.num_layers for layer in range(spec.num_layers)]
    reading = _read(params, spec, tokens_BT, taps)
    for stream_BTD, expected_BTD in zip(reading.taps, hidden[: spec.num_layers], strict=True):
        np.testing.assert_allclose(stream_BTD, expected_BTD.numpy(), atol=1e-4, rtol=1e-5)


@some_families
def test_taps_equal_the_streams_that_enter_torchs_layers(family):
    model, target = family
    _check_torch_streams(model, target.spec, target.params)


@some_families
def test_planted_bug_in_taps(family):
    model, target = family
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _check_torch_streams(model, target.spec, target.params, shift=1)


def test_the_stream_after_the_last_layer_gives_the_states(tiny_params):
    tokens_BT = np.random.default_rng(2).integers(0, TINY.vocab_size, (2, 5))
    reading = jax.device_get(_read(tiny_params, TINY, tokens_BT, (2,)))
    assert np.abs(reading.taps[0] - reading.states_BTD).max() > 0.1
    normed_BTD = jax.jit(final_norm, static_argnums=1)(tiny_params, TINY, reading.taps[0])
    np.testing.assert_allclose(normed_BTD, reading.states_BTD, 1e-6)


def test_taps_come_in_the_order_asked_for(tiny_params):
    tokens_BT = np.random.default_rng(2).integers(0, TINY.vocab_size, (2, 5))
    inward, outward = (_read(tiny_params, TINY, tokens_BT, taps) for taps in ((0, 1), (1, 0)))
    assert np.abs(inward.taps[0] - inward.taps[1]).max() > 0.1
    np.testing.assert_array_equal(inward.taps, outward.taps[::-1])


def test_taps_over_a_cache_equal_those_of_the_whole_text(tiny_params):
    tokens_BT = np.random.default_rng(2).integers(0, TINY.vocab_size, (2, 6))
    whole, start = (_read(tiny_params, TINY, tokens_BT[:, :T], (1,)) for T in (6, 4))
    positions_BT = np.broadcast_to(np.arange(4, 6), (2, 2))

    @jax.jit
    def rest_of(rows):
        cache = write_all(init_cache(TINY, 2, 8, jnp.float32), rows, jnp.zeros(2, jnp.int32))
        return forward(
            tiny_params,
            TINY,
            tokens_BT[:, 4:],
            positions_BT,
            causal_mask(jnp.full(2, 2), 2),
            cache,
            visible_slots(jnp.full(2, 4), cache),
            taps=(1,),
        )

    rest = rest_of(start.rows)
    np.testing.assert_allclose(rest.taps[0], whole.taps[0][:, 4:], atol=1e-4)


def test_without_taps_nothing_is_computed_for_them(tiny_params):
    """The program equals that of a decoder without taps, written from the module's parts."""
    tokens_BT = jnp.zeros((2, 5), jnp.int32)
    positions_BT, mask_BTT = jnp.broadcast_to(jnp.arange(5), (2, 5)), causal_mask(jnp.full(2, 5), 5)

    def plain(params):
        module, shape = target_module, (2, 5)
        sees = module._layer_masks(TINY, positions_BT, mask_BTT, None)
        rotary = module._layer_rotary(TINY, positions_BT)
        x_DM = module.embed(params["embed_VD"], tokens_BT.reshape(-1)).T
        x_DM = jnp.pad(x_DM, ((0, 0), (0, 2)))
        all_rows = []
        for index, layer in enumerate(params["layers"]):
            with jax.named_scope(f"layer_{index}"):
                x_DM, rows = module._block(
                    layer, TINY, x_DM, shape, rotary[index], None, *sees[index]
                )
            all_rows.append(rows)
        x_DM = module._norm(TINY, x_DM, params["norm_D"], axis=0)
        return x_DM[:, :10].T.reshape(2, 5, -1), all_rows

    def tapped(taps):
        return lambda params: forward(params, TINY, tokens_BT, positions_BT, mask_BTT, taps=taps)

    expected = str(jax.make_jaxpr(plain)(tiny_params))
    assert str(jax.make_jaxpr(tapped(()))(tiny_params)) == expected
    assert str(jax.make_jaxpr(tapped((1,)))(tiny_params)) != expected  # the planted bug


def test_a_tap_that_is_no_stream(tiny_params):
    with pytest.raises(ValueError, match=r"taps \[3, -2\]: the target has streams 0 to 2"):
        _read(tiny_params, TINY, jnp.zeros((1, 2), jnp.int32), (0, 3, -2))

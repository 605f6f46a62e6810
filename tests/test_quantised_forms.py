"""How each platform stores and multiplies quantised matrices (model/quantised.py).

Programs of GPUs and TPUs are compiled where their compilers are installed.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY
from decode_cases import target_of
from jax.sharding import AbstractMesh
from weight_cases import Held

from beagle_jax.config import Config, DraftConfig, TargetConfig
from beagle_jax.decoding.cost import abstract_round, held_bytes
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.tree import ROOT_ONLY
from beagle_jax.errors import UserError
from beagle_jax.model import quantised
from beagle_jax.model.joined import join_layer, separate_layer
from beagle_jax.model.quantised import (
    FORMS,
    arranged,
    arranged_layer,
    dense,
    pick,
    quantise,
    quantise_layer,
    stored_bytes,
    times,
)
from beagle_jax.model.tensors import param_table
from beagle_jax.sharding import decoding_mesh
from beagle_jax.weights.target import fill_params

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from hlo_traffic import operations

TESTS = Path(__file__).parent
OUTPUTS = 48
SMALL = dataclasses.replace(TINY, num_layers=1)
_arranged, _times = jax.jit(arranged, static_argnums=1), jax.jit(times)


def matrix(kind, group, inputs):
    weight = jax.random.normal(jax.random.key(3), (OUTPUTS, inputs))
    return jax.jit(quantise, static_argnums=(1, 2))(weight, kind, group)


@pytest.mark.parametrize("columns", [1, 70])
@pytest.mark.parametrize(("group", "inputs"), [(32, 256), (128, 256), (48, 192)])
@pytest.mark.parametrize(("form", "kind"), [("rows", "int8"), ("blocks", "int4")])
def test_every_form_multiplies_by_the_same_matrix(form, kind, group, inputs, columns):
    """Groups of 48 are no part of a TPU register's 128 lanes."""
    whole = matrix(kind, group, inputs)
    other = _arranged(whole, form)
    x_IM = jax.random.normal(jax.random.key(4), (inputs, columns))
    expected = dense(whole, x_IM) @ x_IM
    np.testing.assert_array_equal(dense(other, x_IM), dense(whole, x_IM))
    np.testing.assert_allclose(_times(other, x_IM), expected, atol=2e-4)
    # planted: each scale applied to the next group
    axis = -1 if form == "rows" else -3 if other.scale.shape[-3] > 1 else -2
    wrong = dataclasses.replace(other, scale=jnp.roll(other.scale, 1, axis=axis))
    assert float(jnp.abs(_times(wrong, x_IM) - expected).max()) > 0.3


@pytest.mark.parametrize("form", ["rows", "blocks"])
def test_bfloat16_columns_lose_no_more_than_by_the_dequantised_matrix(form):
    whole = matrix("int8", 64, 256)
    x_IM = jax.random.normal(jax.random.key(4), (256, 4))
    exact, narrow = dense(whole, x_IM) @ x_IM, x_IM.astype(jnp.bfloat16)
    after = _times(_arranged(whole, form), narrow)
    before = _times(whole, narrow)
    assert after.dtype == before.dtype == jnp.bfloat16

    def error(out):
        return float(jnp.abs(out.astype(jnp.float32) - exact).mean())

    assert 0 < error(after) < 1.1 * error(before)


@pytest.mark.parametrize("form", ["rows", "blocks"])
def test_a_stack_of_matrices_keeps_its_form(form):
    stack = quantise(jax.random.normal(jax.random.key(0), (3, 8, 128)), "int4", 32)
    x_IM = jax.random.normal(jax.random.key(1), (128, 4))
    other = arranged(stack, form, stacked=True)
    assert pick(other, 1).form == form and other.values.dtype == jnp.int4
    np.testing.assert_allclose(times(pick(other, 1), x_IM), times(other, x_IM)[1], atol=1e-4)
    assert sum(stored_bytes(x) for x in jax.tree.leaves(other)) == 3 * 8 * (64 + 4 * 4)


@pytest.mark.parametrize("columns", [1, 8])
@pytest.mark.parametrize(("form", "first"), [("rows", False), ("blocks", False), ("whole", True)])
def test_integers_enter_a_product_without_their_scales(monkeypatch, form, first, columns):
    """Planted: the form for CPUs, whose product takes the scaled matrix."""
    taken = []
    real = jnp.einsum

    def einsum(how, *arrays, **settings):
        taken.extend(x for x in arrays if x.size >= OUTPUTS * 256)
        return real(how, *arrays, **settings)

    monkeypatch.setattr(quantised.jnp, "einsum", einsum)
    times(arranged(matrix("int8", 64, 256), form), jnp.ones((256, columns), jnp.bfloat16))
    scaled = [bool((x != jnp.round(x)).any()) for x in taken]
    # A few columns of "rows" have no product, but sums.
    assert scaled == ([] if form == "rows" else [first])


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_decoding_with_the_forms_of_other_platforms_writes_the_same(platform):
    whole = target_of()
    layers = [
        jax.jit(quantise_layer, static_argnums=(1, 2))(layer, "int8", 8)
        for layer in whole.params["layers"]
    ]

    def write(layers):
        target = dataclasses.replace(whole, params={**whole.params, "layers": layers})
        return SpeculativeDecoder(target).generate([[5, 17, 60, 3]], max_new_tokens=16)[0].tokens

    assert write([arranged_layer(layer, platform) for layer in layers]) == write(layers)


def loaded():
    weights = {name: np.ones(shape, np.float32) for name, (_, shape) in param_table(SMALL).items()}
    take = SimpleNamespace(take=lambda params, _: quantise_layer(params["layers"][0], "int4", 8))
    dtype = jnp.dtype("float32")
    return fill_params(SMALL, Held(weights.items()), dtype, "x", quantiser=take, join=True)


@pytest.mark.parametrize(("backend", "form"), [("cpu", "whole"), ("tpu", "blocks")])
def test_a_target_is_loaded_in_the_form_of_its_backend(monkeypatch, backend, form):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert loaded()["layers"][0]["o_DF"].form == form


@pytest.mark.parametrize("form", ["whole", "rows", "blocks"])
def test_joined_projections_are_separated_in_every_form(form):
    """Also planted: outputs listed in another order."""
    layer = {key: matrix("int4", 32, 256) for key in ("gate_FD", "up_FD")}
    layer["up_FD"] = dataclasses.replace(layer["up_FD"], scale=2 * layer["up_FD"].scale)
    together = join_layer(layer, TINY)["gate_up_2FD"]
    other = arranged(together, form)
    x_IM = jax.random.normal(jax.random.key(4), (256, 3))
    np.testing.assert_allclose(_times(other, x_IM), _times(together, x_IM), atol=2e-4)
    apart = separate_layer({"gate_up_2FD": other})
    for key, expected in layer.items():
        np.testing.assert_array_equal(dense(apart[key], x_IM), dense(expected, x_IM))
    if form == "blocks":
        turned = dataclasses.replace(other, outputs=other.outputs[::-1])
        assert _times(turned, x_IM).shape != _times(together, x_IM).shape


def test_a_plan_has_the_arrays_that_are_loaded():
    params, alone = loaded(), decoding_mesh(ONE_DEVICE, SMALL.num_kv_heads)

    def planned(kind, mesh=alone):
        settings = TargetConfig(source="x", dtype="float32", quantize=kind, group_size=8)
        config = Config(target=settings, draft=DraftConfig(path="lookup"))
        return abstract_round(config, SMALL, ROOT_ONLY, mesh).target.params

    made = planned("int4")
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    assert held_bytes(made) == sum(stored_bytes(x) for x in jax.tree.leaves(params))
    # planted: the plan of another kind, and of a target that is not quantised
    assert held_bytes(planned("none")) > held_bytes(planned("int8")) > held_bytes(made)
    with pytest.raises(UserError, match="is for one device, but the mesh has 2"):
        planned("int4", AbstractMesh((1, 1, 2, 1), alone.axis_names))


HLO = """
%only_names (q: bf16[8,4]) -> bf16[32] {
  %q = bf16[8,4]{1,0} parameter(0)
  ROOT %b = bf16[32]{0} bitcast(%q)
}

%fused (p: bf16[8,4], w: s4[64]) -> bf16[32] {
  %p = bf16[8,4]{1,0} parameter(0)
  %w = s4[64]{0} parameter(1)
  %named = bf16[32]{0} fusion(%p), kind=kLoop, calls=%only_names
  %part = s4[32]{0} slice(%w), slice={[0:32]}
  %wide = bf16[32]{0} convert(%part)
  ROOT %m = bf16[32]{0} multiply(%named, %wide)
}

%body (t: (bf16[8,4], s4[64])) -> (bf16[8,4], s4[64]) {
  %t = (bf16[8,4]{1,0}, s4[64]{0}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%t), index=0
  %y = s4[64]{0} get-tuple-element(%t), index=1
  %f = bf16[32]{0:S(1)} fusion(%x, %y), kind=kLoop, calls=%fused
  %z = bf16[8,4]{1,0} copy(%f)
  ROOT %r = (bf16[8,4]{1,0}, s4[64]{0}) tuple(%z, %y)
}

ENTRY %main (a: (bf16[8,4], s4[64])) -> (bf16[8,4], s4[64]) {
  %a = (bf16[8,4]{1,0}, s4[64]{0}) parameter(0)
  ROOT %loop = (bf16[8,4]{1,0}, s4[64]{0}) while(%a), condition=%only_names, body=%body
}
"""


def test_bytes_of_a_program_are_those_that_leave_and_reach_the_chip():
    """A slice of int4 counts by half a byte; what is on the chip, `S(1)`, is not read again."""
    fused, copied = operations(HLO, loop=True)
    assert (fused.bytes_read, fused.bytes_written) == (2 * 32 + 32 // 2, 0)
    assert (copied.bytes_read, copied.bytes_written) == (0, 2 * 32)
    # planted: the result of the fusion is not on the chip
    fused, copied = operations(HLO.replace("{0:S(1)}", "{0}"), loop=True)
    assert fused.bytes_written == copied.bytes_read == 2 * 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "topology"), [("jax_cuda13_plugin", "h100"), ("libtpu", "v5e:1")]
)
def test_compiled_products_read_the_integers_and_write_no_matrix(package, topology):
    pytest.importorskip(package, reason="needs the compiler of these devices")
    settings = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "quantised_cases.py"), topology],
        env={
            **os.environ,
            **settings,
            "PYTHONPATH": f"{TESTS.parent}:{os.environ.get('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout)
    weight = 2 * 8192 * 8192  # bytes in bfloat16
    for columns in (1, 8):
        plain = measured[f"none {columns}"]["read"]
        for kind, share in (("int8", 0.6), ("int4", 0.4)):
            made = measured[f"{kind} {columns}"]
            assert made["written"] < weight
            assert made["read"] < share * plain
    assert measured["planted 8"]["written"] >= weight


def test_platforms_without_a_form_of_their_own_dequantise():
    assert set(FORMS.values()) == {"rows", "blocks"}
    layer = {"q_FD": matrix("int4", 64, 256), "input_norm_D": jnp.ones(3)}
    assert arranged_layer(layer, "cpu")["q_FD"] is layer["q_FD"]

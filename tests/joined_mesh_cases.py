"""Joined projections on meshes of eight virtual devices.

python tests/joined_mesh_cases.py OUT.json            # of attention and of a plain MLP
python tests/joined_mesh_cases.py OUT.json experts
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from conftest import TINY
from gguf_files import llama_tensors
from mesh_cases import mesh_of
from weight_cases import LLAMA, Held

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.model import experts as experts_module
from beagle_jax.model import joined as joined_module
from beagle_jax.model import target as target_module
from beagle_jax.model.experts import Experts
from beagle_jax.model.joined import join_layer
from beagle_jax.model.masks import causal_mask
from beagle_jax.model.target import TargetSpec, forward
from beagle_jax.program import program_of
from beagle_jax.sharding import decoding_mesh, place
from beagle_jax.weights.orbax_target import abstract_params
from beagle_jax.weights.target import Target, fill_params

WIDE = dataclasses.replace(TINY, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=4)


def params_of(spec):
    """Random float32 parameters, with stacks of experts too."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(spec, jnp.dtype("float32"), None)

    def filled(x):
        return jnp.asarray((len(x.shape) == 1) + 0.3 * rng.standard_normal(x.shape), jnp.float32)

    return jax.tree.map(filled, shapes)


def joined(params, spec, **how):
    return {**params, "layers": [join_layer(layer, spec, **how) for layer in params["layers"]]}


def states(params, spec, count=7):
    tokens_BT = np.random.default_rng(0).integers(0, spec.vocab_size, (2, count))
    positions_BT = jnp.broadcast_to(jnp.arange(count), (2, count))
    return forward(
        params, spec, tokens_BT, positions_BT, causal_mask(jnp.full(2, count), count)
    ).states_BTD


def equal(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def compiled(params, mesh):
    """The program of `states` with these parameters' shapes."""
    return jax.jit(partial(states, spec=WIDE)).lower(place(params, mesh)).compile()


def in_order(key, parts, spec):
    """Planted: all queries, then all keys, then all values."""
    if not key.startswith("qkv"):
        return jnp.stack(parts)
    rows = jnp.concatenate(parts)
    return rows.reshape(spec.num_kv_heads, -1, spec.head_dim, *rows.shape[1:])


def shapes_of(layer, *keys):
    return {key: layer[key].addressable_shards[0].data.shape for key in keys}


def loaded(size: int) -> list:
    """Whether heads are joined, the shape of a part, and whether all values are right."""
    spec, opened = TargetSpec.from_hf_config(LLAMA, "test"), Held(llama_tensors().items())
    fill = partial(fill_params, spec, opened, jnp.dtype("float32"), "here")
    params, apart = fill(mesh_of((1, 1, size)), None, True), fill()
    heads = "qkv_KGHD" in params["layers"][1]
    equal(params, joined(apart, spec, heads=heads))
    return [size, heads, *shapes_of(params["layers"][1], "gate_up_2FD").values(), True]


def experts_on_a_mesh() -> dict[str, list[float]]:
    """How far each form of experts on eight devices is from the loop on one; then planted."""
    spec = dataclasses.replace(WIDE, experts=Experts(3, 2, 24, True, (), ("mlp.gate", *"gud")))
    params, mesh = params_of(spec), decoding_mesh(mesh_of((2, 2, 2)), WIDE.num_kv_heads)
    layer = params["layers"][0]
    planted = {**params, "layers": [{**layer, "up_EFD": jnp.roll(layer["up_EFD"], 1, axis=0)}]}
    expected = np.asarray(states(params, spec))
    measured = {}
    for form in ("one_by_one", "few", "every", "grouped"):
        routed = getattr(experts_module, f"_{form}", None)
        with mock.patch.object(target_module, "routed", routed):
            run = jax.jit(partial(states, spec=spec))
            measured[form] = [
                float(np.abs(run(place(joined(x, spec, turned=not routed), mesh)) - expected).max())
                for x in (params, planted)
            ]
    return measured


def main(out: str) -> None:
    params = params_of(WIDE)
    together, expected = joined(params, WIDE), np.asarray(states(params, WIDE))
    measured: dict = {"forward": [], "loaded": [loaded(2), loaded(4)]}
    for shape in ((2, 2, 2), (1, 1, 4)):
        mesh = decoding_mesh(mesh_of(shape), WIDE.num_kv_heads)
        spread = place(together, mesh)
        program = compiled(together, mesh)
        difference = float(np.abs(np.asarray(program(spread)) - expected).max())
        parts = shapes_of(spread["layers"][0], "qkv_KGHD", "gate_up_2FD")
        measured["forward"].append([*shape[1:], parts, difference])
    measured["sent"] = [
        program_of(made.as_text(), loop=False).collectives
        for made in (program, compiled(params, mesh))
    ]
    with mock.patch.object(joined_module, "_join", in_order):
        wrong = np.asarray(program(place(joined(params, WIDE), mesh)))
    measured["in order"] = float(np.abs(wrong - expected).max())
    target = Target(WIDE, together, tokenizer=None, eos_ids=(), source="")
    layer = SpeculativeDecoder(target, mesh=mesh_of((1, 1, 8)))._round.target.params["layers"][0]
    measured["wide"] = shapes_of(layer, "q_FD", "k_FD", "gate_up_2FD")
    Path(out).write_text(json.dumps(measured))


if __name__ == "__main__":
    if sys.argv[2:] == ["experts"]:
        Path(sys.argv[1]).write_text(json.dumps(experts_on_a_mesh()))
    else:
        main(sys.argv[1])

"""Joined projections against separate ones: numbers, loading, fingerprints, exports and meshes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, environment
from gguf_files import llama_tensors, write_llama
from joined_mesh_cases import WIDE, equal, joined, params_of, states
from safetensors.numpy import save_file
from test_tensors import PROJECTIONS, SPECS
from weight_cases import LLAMA, Held

from beagle_jax.data.fingerprint import fingerprints
from beagle_jax.model import joined as joined_module
from beagle_jax.model.joined import (
    TURNED,
    heads_apart,
    join_layer,
    separate_layer,
    separated,
    turns_experts,
)
from beagle_jax.model.quantised import Quantised, dense, quantise_layer
from beagle_jax.model.target import TargetSpec
from beagle_jax.model.tensors import ARRAYS, JOINED
from beagle_jax.sharding import joins_heads
from beagle_jax.weights import target as target_module
from beagle_jax.weights.gguf import GGUFFile
from beagle_jax.weights.target import fill_params, load_target

FORMS = SPECS | {
    "windows": dataclasses.replace(TINY, windows=(3, None), qk_norm=True, rotary_dim=4),
    "some biases": dataclasses.replace(TINY, biases=PROJECTIONS[:2]),
}
each_form = pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS)


@each_form
def test_parts_come_back_as_they_were(spec):
    params = params_of(spec)
    together = joined(params, spec)
    equal(separated(together), params)
    equal(heads_apart(together), joined(params, spec, heads=False))
    assert sum(x.size for x in jax.tree.leaves(together)) == sum(
        x.size for x in jax.tree.leaves(params)
    )
    keys = {key for layer in together["layers"] for key in layer}
    assert ("qkv_KGHD" in keys) == (spec.biases != PROJECTIONS[:2])
    assert "gate_up_2FD" in keys and keys <= ARRAYS.keys() | JOINED.keys()


@each_form
def test_states_are_those_of_separate_projections(spec):
    params = params_of(spec)
    # 1e-5: a matrix of other sizes may be summed in another order
    np.testing.assert_allclose(
        states(joined(params, spec), spec), states(params, spec), atol=1e-5, rtol=0
    )


def swapped(key, x):
    """Planted: keys and values, or gate and up, in each other's place."""
    return reversed([x[0], x[1]]) if key.startswith("gate") else _heads(x, (0, 2, 1))


def _heads(x, order):
    parts = (x[:, :-2], x[:, -2:-1], x[:, -1:])
    return [parts[index].reshape(-1, *x.shape[3:]) for index in order]


@pytest.mark.parametrize("key", ["qkv_KGHD", "gate_up_2FD"])
def test_planted_bug_parts_in_each_others_place(key, monkeypatch):
    params = params_of(TINY)
    expected = states(params, TINY)
    together = joined(params, TINY)
    right = joined_module.split
    monkeypatch.setattr(
        "beagle_jax.model.target.split",
        lambda name, x: (swapped if name == key else right)(name, x),
    )
    assert float(jnp.abs(states(together, TINY) - expected).max()) > 0.1


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_projections_join_codes_and_scales(kind):
    layer = {key: params_of(TINY)["layers"][0][key] for key in JOINED["qkv_KGHD"].parts}
    layer = jax.jit(quantise_layer, static_argnums=(1, 2))(layer, kind, 8)
    together = join_layer(layer, TINY)
    assert together.keys() == {"qkv_KGHD"} and isinstance(together["qkv_KGHD"], Quantised)
    equal(separate_layer(together), layer)
    plain = jax.jit(lambda x: dense(x, jnp.ones(())))
    rows_FD = jnp.concatenate([plain(x) for x in separate_layer(together).values()])
    one_head_FD = plain(together["qkv_KGHD"])[0, -1]  # values of the first KV head
    np.testing.assert_array_equal(one_head_FD, rows_FD[-16:-8])


def test_stacks_of_experts_turn_and_come_back():
    """Turned on TPUs alone, and never when they are quantised."""
    spec = SPECS["experts"]
    layer = next(x for x in params_of(spec)["layers"] if "gate_EFD" in x)
    turned = join_layer(layer, spec, turned=True)
    assert turned.keys() >= set(TURNED) and not turned.keys() & {"gate_EFD", "up_EFD", "down_EDF"}
    np.testing.assert_array_equal(turned["down_EFD"][1], layer["down_EDF"][1].T)
    equal(separate_layer(turned), layer)
    params = {**params_of(spec), "layers": [turned]}
    assert heads_apart(params)["layers"][0].keys() >= set(TURNED)
    small = jax.jit(quantise_layer, static_argnums=(1, 2))(layer, "int8", 8)
    assert "gate_EFD" in join_layer(small, spec, turned=True)
    assert not turns_experts(small, "tpu")


@pytest.mark.parametrize(("width", "expected"), [(384, True), (96, False)])
def test_experts_turn_where_a_devices_part_fills_registers(width, expected):
    part = SimpleNamespace(shard_shape=lambda shape: (shape[0], width, shape[2]))
    layer = {"gate_EFD": SimpleNamespace(shape=(8, 768, 64), sharding=part)}
    assert turns_experts(layer, "tpu") is expected
    assert not turns_experts(layer, "cpu") and not turns_experts({}, "tpu")


# Loading


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One model as a GGUF file and as a Hugging Face folder."""
    root = tmp_path_factory.mktemp("joined")
    write_llama(root / "tiny.gguf", llama_tensors())
    opened, folder = GGUFFile(root / "tiny.gguf"), root / "folder"
    opened.tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**opened.config(), "eos_token_id": 2}))
    save_file(llama_tensors(), folder / "model.safetensors")
    return {"gguf": root / "tiny.gguf", "folder": folder}


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_a_target_is_loaded_joined_and_has_the_fingerprint_of_its_files(sources, kind):
    target = load_target(sources[kind], "float32", "unused", join=True)
    apart = load_target(sources[kind], "float32", "unused", join=False)
    equal(target.params, joined(apart.params, target.spec))
    assert all({"qkv_KGHD", "gate_up_2FD"} <= layer.keys() for layer in target.params["layers"])
    assert fingerprints(target.params, target.tokenizer) == fingerprints(
        apart.params, apart.tokenizer
    )


def test_the_fingerprint_of_a_known_target_is_what_it_was():
    """Texts on disk are bound to it."""

    class Words:
        chat_template = "{{ messages }}"

        def get_vocab(self):
            return {"a": 0}

        def encode(self, text):
            return [len(text)]

    spec = TargetSpec.from_hf_config(LLAMA, "test")
    tensors = llama_tensors()
    for join in (False, True):
        params = fill_params(
            spec, Held(tensors.items()), jnp.dtype("float32"), "here", None, None, join
        )
        assert fingerprints(params, Words())["target_sha256"] == KNOWN
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1.01
    params = fill_params(
        spec, Held(tensors.items()), jnp.dtype("float32"), "here", None, None, True
    )
    assert fingerprints(params, Words())["target_sha256"] != KNOWN


KNOWN = "aa226f529aefdaf8ab8aad8eb013453684b710cbd50da366927c7bdd011ddec5"  # by version 0.1.0


def test_no_layer_stays_apart_while_the_next_is_loaded(monkeypatch):
    spec, seen, real = TargetSpec.from_hf_config(LLAMA, "test"), [], target_module._read_array

    def read(source, names, *more):
        seen.append(names[0])
        return real(source, names, *more)

    def join(layer, spec, mesh):
        seen.append("joined")
        return join_layer(layer, spec)

    monkeypatch.setattr(target_module, "_read_array", read)
    monkeypatch.setattr(target_module, "_joined", join)
    fill_params(spec, Held(llama_tensors().items()), jnp.dtype("float32"), "here", None, None, True)
    at = [place for place, name in enumerate(seen) if name == "joined"]
    assert len(at) == 2 and at[1] == len(seen) - 1
    assert all(name.startswith("model.layers.1.") for name in seen[at[0] + 1 : at[1]])


# Meshes


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """What `joined_mesh_cases.py` measures on eight virtual devices."""
    return _measured(tmp_path_factory.mktemp("meshes") / "out.json")


def _measured(out, *what):
    script = Path(__file__).parent / "joined_mesh_cases.py"
    variables = environment(8) | {"PYTHONPATH": str(script.parent.parent)}
    subprocess.run([sys.executable, str(script), str(out), *what], env=variables, check=True)
    return json.loads(out.read_text())


def test_each_device_has_the_projections_of_its_own_heads(meshes):
    for fsdp, tensor, parts, difference in meshes["forward"]:
        D, H, F = WIDE.hidden_size // fsdp, WIDE.head_dim, WIDE.intermediate_size // tensor
        assert parts == {
            "qkv_KGHD": [WIDE.num_kv_heads // tensor, 2 + 2, H, D],
            "gate_up_2FD": [2, F, D],
        }
        assert difference < 1e-5


def test_splitting_a_joined_product_sends_nothing(meshes):
    joined, apart = meshes["sent"]
    assert joined == apart > 0


def test_planted_bug_joined_without_the_order_of_the_heads(meshes):
    """All queries, then all keys, then all values: a device has others than its own."""
    assert meshes["in order"] > 0.1


def test_more_devices_than_heads_have_queries_apart(meshes):
    D = WIDE.hidden_size
    assert meshes["wide"] == {
        "q_FD": [WIDE.head_dim, D],
        "k_FD": [WIDE.head_dim, D],
        "gate_up_2FD": [2, WIDE.intermediate_size // 8, D],
    }


@pytest.mark.slow
def test_experts_on_eight_devices_are_those_of_one(tmp_path):
    """Also planted: the weights of another expert."""
    measured = _measured(tmp_path / "out.json", "experts")
    assert measured.keys() == {"one_by_one", "few", "every", "grouped"}
    for difference, planted in measured.values():
        assert difference < 1e-5 and planted > 0.01


def test_loading_joins_on_the_devices_of_a_mesh(meshes):
    for size, heads, part, same in meshes["loaded"]:
        assert heads == (size == 2) and part == [2, 96 // size, 64] and same


@pytest.mark.parametrize("key", JOINED)
def test_a_joined_array_is_split_as_its_parts_are(key):
    parts = [ARRAYS[part] for part in JOINED[key].parts]
    letters = key.rpartition("_")[2]
    assert len(JOINED[key].axes) == len(letters)
    # queries are split further than keys and values where there are more devices than KV heads
    split = {axis for axis in JOINED[key].axes if axis}
    assert split == {axis for part in parts[-1:] for axis in part.axes if axis}


@pytest.mark.parametrize(("platform", "expected"), [("cpu", True), ("tpu", True), ("gpu", False)])
def test_gpus_keep_queries_keys_and_values_apart(platform, expected):
    class Mesh:
        devices = np.array([SimpleNamespace(platform=platform)])
        axis_names, shape = ("tensor",), {"tensor": 1}

    assert joins_heads(Mesh(), 2) is expected
    Mesh.shape = {"tensor": 4}  # more devices than KV heads
    assert joins_heads(Mesh(), 2) is False

"""The declaration of the target's arrays, against the tables that read it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY

from beagle_jax.model.experts import Experts
from beagle_jax.model.tensors import ARRAYS, param_table, tensors
from beagle_jax.weights.orbax_target import abstract_params

ROUTED = tuple(f"mlp.experts.{{}}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
# Together they have every array.
SPECS = {
    "plain": dataclasses.replace(TINY, tie_embeddings=False, biases=PROJECTIONS),
    "norms everywhere": dataclasses.replace(TINY, qk_norm=True, post_norms=True),
    "norms after": dataclasses.replace(TINY, qk_norm_whole=True, pre_norms=False, post_norms=True),
    "experts": dataclasses.replace(
        TINY, experts=Experts(3, 2, 24, True, (0,), ("mlp.gate", *ROUTED))
    ),
}


def test_every_declared_array_is_some_targets():
    declared = {tensor.path[-1] for spec in SPECS.values() for tensor in tensors(spec)}
    assert declared == ARRAYS.keys()


@pytest.mark.parametrize("key", ARRAYS)
def test_sizes_and_axes_go_with_the_letters_of_the_name(key):
    letters, array = re.fullmatch(r"\w+?_([A-Z]+)", key)[1], ARRAYS[key]
    meant = {"vocabulary": "V", "model": "D", "head": "H", "experts": "E"}
    assert "".join(meant.get(size, "F") for size in array.sizes) == letters
    assert len(array.axes) == len(letters)
    # Matrices of layers are split and quantised; all else is whole, but for the vocabulary.
    split = bool({"inner", "kv", "expert"} & set(array.axes))
    assert array.quantisable == split == (set(letters[-2:]) == {"D", "F"})


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_each_file_name_has_one_array_or_one_slice_of_one(spec):
    table = param_table(spec)
    assert len(table) == sum(len(tensor.names) for tensor in tensors(spec))
    for tensor in tensors(spec):
        for number, name in enumerate(tensor.names):
            place = tensor.path if len(tensor.names) == 1 else (*tensor.path, number)
            shape = tensor.shape if len(tensor.names) == 1 else tensor.shape[1:]
            assert table[name] == (place, shape)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_abstract_shapes_and_shardings_are_of_the_same_tree(spec):
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(spec, jnp.dtype("int8"), mesh))
    shapes = {
        tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path): leaf
        for path, leaf in leaves
    }
    assert {path: leaf.shape for path, leaf in shapes.items()} == {
        tensor.path: tensor.shape for tensor in tensors(spec)
    }
    assert tuple(shapes["layers", 1, "k_FD"].sharding.spec) == ("tensor", "fsdp")
    assert tuple(shapes["layers", 0, "down_DF"].sharding.spec) == ("fsdp", "tensor")

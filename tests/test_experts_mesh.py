"""Whole experts on the devices of a mesh (`mesh.expert`): parts of the sum, programs, tokens.

tests/expert_mesh_cases.py runs on eight virtual devices, in a process of its own.
"""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from expert_mesh_cases import CASES, ONE_LAYER, SPECS
from jax.sharding import AbstractMesh
from test_decoding_mesh import run
from test_experts import COUNT, EXPERTS, FORMS, D, F, M, _by_hand, each_form

from beagle_jax.config import MeshConfig
from beagle_jax.decoding import cost
from beagle_jax.errors import UserError
from beagle_jax.model import experts as experts_module
from beagle_jax.model.experts import Choice, choose
from beagle_jax.sharding import (
    check_no_experts,
    check_split,
    decoding_mesh,
    make_mesh,
    mesh_for_decoding,
    own_part,
    sharding_of,
    with_experts,
)

pytestmark = pytest.mark.timeout(1800)


# One process: the parts of the sum


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(1)
    shapes = (COUNT, F, D), (COUNT, F, D), (COUNT, D, F)
    return (
        rng.standard_normal((COUNT, D), np.float32),
        [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes],
        rng.standard_normal((D, M), np.float32),
    )


def outputs(arrays, form, parts, columns=M):
    """What devices with experts `first` to `first + count` add to the sum."""
    router_ED, stacks, y_DM = arrays
    choice = choose(router_ED, EXPERTS, y_DM[:, :columns], columns)

    @jax.jit
    def run(stacks, y_DM):
        owned = [[stack[first : first + count] for stack in stacks] for first, count in parts]
        return [
            FORMS[form](choice.among(first, count), own, jax.nn.silu, y_DM)
            for (first, count), own in zip(parts, owned, strict=True)
        ]

    return [np.asarray(out_DM) for out_DM in run(stacks, y_DM[:, :columns])]


@each_form
def test_the_outputs_of_all_devices_add_up(arrays, form):
    """Also planted: the experts of one device are left out."""
    router_ED, stacks, y_DM = arrays
    [whole_DM, *parts] = outputs(arrays, form, [(0, COUNT), (0, 2), (2, 2), (4, 1)])
    expected_DM = _by_hand(router_ED, stacks, y_DM, EXPERTS)
    np.testing.assert_allclose(whole_DM, expected_DM, atol=1e-4)
    np.testing.assert_allclose(sum(parts), expected_DM, atol=1e-4)
    assert all(np.abs(part).max() > 0.1 for part in parts)
    assert np.abs(sum(parts[1:]) - expected_DM).max() > 0.1


@each_form
def test_what_a_device_computes_in_place_of_other_experts_does_not_count(arrays, form):
    """Its own experts overflow in a column that chose none of them; planted: in one that did."""
    router_ED, stacks, y_DM = arrays
    router_ED = 0.01 * router_ED  # shares far from 0 and 1
    chosen = np.asarray(choose(router_ED, EXPERTS, 100 * y_DM[:, :1], 1).expert_Mk[0]).tolist()
    other = min(set(range(COUNT)) - set(chosen))
    large = [stacks[0], stacks[1] * 3e38, stacks[2]]
    [other_DM, own_DM] = outputs(
        (router_ED, large, 100 * y_DM), form, [(other, 1), (chosen[0], 1)], columns=1
    )
    assert not other_DM.any()
    assert not np.isfinite(own_DM).all()


def test_few_columns_read_no_expert_that_nobody_chose(arrays, monkeypatch):
    """A GPU's form reads a chosen expert again in place of another device's.

    Planted: without `partial`, the last expert of the device is read there.
    """
    _, stacks, y_DM = arrays
    pick = experts_module.pick

    @jax.jit
    def read():
        numbers = []
        monkeypatch.setattr(
            experts_module, "pick", lambda stack, index: numbers.append(index) or pick(stack, index)
        )
        choice = Choice(jnp.full((1, 2), 0.5), jnp.array([[2, 0]]), COUNT).among(2, 3)
        own = [stack[2:] for stack in stacks]
        for each in (choice, choice._replace(partial=False)):
            experts_module._few(each, own, jax.nn.silu, jnp.asarray(y_DM[:, :1]))
        return numbers[0], numbers[-1]

    right_R, planted_R = read()
    assert right_R.tolist() == [0, 0] and planted_R.tolist() != [0, 0]


# Meshes and messages


class Device:
    """Stands for a device where there is one; a mesh is made of them."""

    def __init__(self, number: int):
        self.id = number


def devices(count: int) -> list[Device]:
    return [Device(number) for number in range(count)]


@pytest.mark.parametrize(
    ("sizes", "heads", "expected"),
    [
        ({"expert": 8}, 4, {"expert": 4, "expert_copies": 2, "tensor": 1, "copies": 1}),
        (
            {"expert": 4, "tensor": 2},
            2,
            {"expert": 2, "expert_copies": 2, "tensor": 1, "copies": 2},
        ),
        (
            {"expert": 2, "tensor": 4},
            8,
            {"expert": 2, "expert_copies": 1, "tensor": 4, "copies": 1},
        ),
        ({"tensor": 8}, 4, {"tensor": 4, "copies": 2}),
    ],
)
def test_devices_share_kv_heads_along_both_axes(sizes, heads, expected):
    mesh = make_mesh(MeshConfig(data=1, **sizes), devices(8))
    split = decoding_mesh(mesh, heads)
    assert dict(split.shape) == {"data": 1, "fsdp": 1} | expected
    assert [device.id for device in split.devices.flat] == list(range(8))
    assert ("expert" in mesh.shape) == ("expert" in sizes)
    assert own_part(mesh) is mesh  # with one process


def test_a_mesh_says_who_has_which_experts():
    mesh = decoding_mesh(make_mesh(MeshConfig(data=1, expert=4, tensor=2), devices(8)), 2)
    plain = make_mesh(MeshConfig(data=1, tensor=8), devices(8))
    split = with_experts(ONE_LAYER, mesh)
    spread = split.experts.spread
    assert spread.mesh is mesh and hash(split)
    assert spread.experts == ("expert", "expert_copies") and spread.widths == ("tensor", "copies")
    assert with_experts(split, None) is split and with_experts(split, plain) == ONE_LAYER
    assert with_experts(TINY, plain) is TINY
    shape = (8, 40, 32)
    parts = sharding_of(("experts", "expert", "model"), shape, mesh).shard_shape(shape)
    assert parts == (2, 20, 32)


def test_what_cannot_be_split_is_refused():
    mesh = AbstractMesh((1, 1, 3, 1), ("data", "fsdp", "expert", "tensor"))
    with pytest.raises(UserError, match=r"mesh.expert is 3, but the target has no experts; set"):
        with_experts(TINY, mesh)
    with pytest.raises(
        UserError, match=r"mesh.expert is 3, which does not divide the target's 8 experts; choose"
    ):
        with_experts(ONE_LAYER, mesh)
    with pytest.raises(
        UserError,
        match=r"mesh.expert is 3, which splits whole experts .* but train splits each expert; set "
        "mesh.expert=1, and mesh.tensor or mesh.fsdp to 3",
    ):
        check_no_experts(mesh, "train")
    check_no_experts(AbstractMesh((1, 1, 3), ("data", "fsdp", "tensor")), "train")
    with pytest.raises(UserError, match=r"mesh.expert x mesh.tensor is 3, which divides none of"):
        check_split(mesh, (32, 64), 32)
    with pytest.raises(UserError, match=r"mesh.expert=64, mesh.tensor=1 needs 64 devices, but"):
        mesh_for_decoding(MeshConfig(expert=64), 1, "generate")


def test_the_least_bytes_are_those_of_the_device_with_most_experts():
    """Four of 16 experts on two devices: one has at least two of its eight. Two of 8 on 8: one."""
    for name, parts, expected in (("qwen3 moe", 2, 2 / 8), ("mixtral", 8, 1.0)):
        experts = SPECS[name].experts
        part = SimpleNamespace(shard_shape=lambda shape, parts=parts: (shape[0] // parts,))
        stack = SimpleNamespace(shape=(experts.count,), sharding=part)
        assert cost._read_share(stack, experts) == expected


# Eight virtual devices


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("experts") / "out.json"
    run("expert_mesh_cases.py", str(out))
    return json.loads(out.read_text())


def test_eight_devices_compute_the_states_of_one(measured):
    assert measured["difference"] < 1e-5
    assert measured["planted: left out"] > 0.01


def test_no_expert_is_sent(measured):
    """One sum for attention, one for the experts, and one for the embeddings of the tokens."""
    assert measured["sent"] == [] and measured["all-reduces"] == 3
    assert measured["planted: no axis in the program"] != []


def test_each_device_holds_whole_experts_and_its_part_of_the_rest(measured):
    assert measured["parts"] == {
        "router_ED": [8, 32],
        "gate_EFD": [1, 40, 32],
        "down_EDF": [1, 32, 40],
        "q_FD": [4, 32],
        "k_FD": [4, 32],  # one of two KV heads
    }


@pytest.fixture(scope="module")
def decoding(tmp_path_factory):
    out = tmp_path_factory.mktemp("decoding") / "out.json"
    run("expert_mesh_cases.py", str(out), "decoding")
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_experts_write_what_one_device_does(decoding, case):
    single, many = decoding[str(case)]
    assert many == single and all(len(tokens) == 6 for tokens, _ in single)
    assert decoding["planted"] != decoding[str(CASES[0])][0]


@pytest.mark.slow
def test_a_round_sends_no_expert(decoding):
    assert decoding["sent"] == []


@pytest.mark.slow
def test_every_form_on_every_mesh(decoding):
    assert len(decoding["forms"]) == 12
    assert max(decoding["forms"].values()) < 1e-5


@pytest.mark.slow
def test_each_expert_is_read_for_its_device_alone(decoding):
    assert decoding["loaded"] == {
        "each expert once": True,
        "parts": [[1, 96, 64]] * 2,
        "right": [True, True],
        "states sent": [],
    }

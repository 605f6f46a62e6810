"""Meshes: the same step on 1, 2 and 8 devices, no logits sent, and sizes that do not fit."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import environment
from mesh_cases import ALL_AXES, REST

from beagle_jax.config import MeshConfig
from beagle_jax.errors import UserError
from beagle_jax.sharding import check_rows, make_mesh, shardings

# A dozen programs and more are compiled, unless the cache has them.
pytestmark = pytest.mark.timeout(600)
TESTS = Path(__file__).parent


def measured(folder: Path, *which: str) -> dict:
    """Runs tests/mesh_cases.py on eight virtual devices; returns its results by stage and mesh."""
    variables = environment(8) | {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }
    command = [sys.executable, str(TESTS / "mesh_cases.py"), str(folder / "found.json"), *which]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def by_stage(tmp_path_factory) -> dict:
    return measured(tmp_path_factory.mktemp("meshes"))


@pytest.fixture(scope="module")
def rest(tmp_path_factory) -> dict:
    return measured(tmp_path_factory.mktemp("rest"), "rest")


def same_numbers(single: dict, many: dict) -> None:
    """Compares losses and updates of two steps and the first gradient, to 1e-5."""
    np.testing.assert_allclose(many["losses"], single["losses"], rtol=1e-5)
    np.testing.assert_allclose(many["grad_norm"], single["grad_norm"], rtol=1e-5)
    assert many["agree"] == single["agree"]
    for kind in ("first_gradient", "updates"):
        for ours, theirs in zip(many[kind], single[kind], strict=True):
            size = np.abs(theirs).max()
            # Adam divides a small gradient by its own size, so updates (of 1e-3 a step) are
            # compared as they stand.
            np.testing.assert_allclose(
                ours, theirs, rtol=0, atol=1e-5 if kind == "updates" else 1e-5 * size, err_msg=kind
            )
            assert size > 1e-6


def check_mesh(of_stage: dict, shape: tuple[int, int, int]) -> None:
    single, many = of_stage["(1, 1, 1)"], of_stage[str(shape)]
    same_numbers(single, many)
    assert np.sum(single["agree"]) > 0
    assert (
        single["logits"] == many["logits"] == []
        and many["vocabulary_sent"] == []
        and many["on_fewer_devices"] == []
        and many["not_donated"] == 0
    )
    # Matrices are split as soon as fsdp or tensor is.
    assert (many["whole"] == []) == (shape != (8, 1, 1))


@pytest.mark.parametrize("stage", ["early", "late"])
def test_a_mesh_along_all_axes_computes_the_same_step(by_stage, stage):
    check_mesh(by_stage[stage], ALL_AXES)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["early", "late"])
@pytest.mark.parametrize("shape", REST, ids=str)
def test_every_other_mesh_of_eight_computes_the_same_step(rest, stage, shape):
    check_mesh(rest[stage], shape)


@pytest.mark.slow
def test_muon_computes_the_same_step_too(rest):
    same_numbers(rest["early"]["muon (1, 1, 1)"], rest["early"]["muon (2, 2, 2)"])
    with pytest.raises(AssertionError):
        same_numbers(rest["early"]["(1, 1, 1)"], rest["early"]["muon (2, 2, 2)"])


@pytest.mark.slow
def test_eagle_computes_the_same_step_too(rest):
    single, many = (rest["late"][f"eagle {shape}"] for shape in ("(1, 1, 1)", "(2, 2, 2)"))
    same_numbers(single, many)
    assert (
        many["vocabulary_sent"] == many["on_fewer_devices"] == many["whole"] == []
        and many["not_donated"] == 0
        and np.sum(single["agree"]) > 0
    )
    with pytest.raises(AssertionError):
        same_numbers(rest["late"]["(1, 1, 1)"], many)


def test_planted_bug_each_device_alone_with_its_part_of_the_vocabulary(by_stage):
    with pytest.raises(AssertionError):
        same_numbers(by_stage["early"]["(1, 1, 1)"], by_stage["early"]["planted parts"])


def test_planted_bug_logits_put_together(by_stage):
    sent, logits = by_stage["early"]["planted gather"]
    assert sent != [] and logits == ["88,464"]


@pytest.mark.parametrize(
    "sizes", [dict(data=2), dict(fsdp=3, tensor=2), dict(data=3, fsdp=3, tensor=-1)]
)
def test_sizes_that_do_not_fit_the_devices(sizes):
    with pytest.raises(
        UserError,
        match="does not fit 8 devices: the product of the sizes must be their number",
    ):
        make_mesh(MeshConfig(**sizes), jax.devices()[:1] * 8)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (dict(), (8, 1, 1)),
        (dict(tensor=2), (4, 1, 2)),
        (dict(data=2, fsdp=-1), (2, 4, 1)),
        (dict(data=1, fsdp=2, tensor=4), (1, 2, 4)),
    ],
)
def test_the_rest_goes_to_the_axis_that_is_left_open(sizes, shape):
    class Device:
        """Stands for eight devices where there is one; only their number matters."""

    mesh = make_mesh(MeshConfig(**sizes), [Device() for _ in range(8)])
    assert tuple(mesh.shape.values()) == shape and tuple(mesh.shape) == ("data", "fsdp", "tensor")


def test_parameters_are_born_in_parts(by_stage):
    """Each device makes only its part; together they equal what one device makes."""
    (parts, difference) = by_stage["early"]["born"]
    assert parts["q_proj"] == parts["o_proj"] == [8, 8] and parts["input_layernorm"] == [16]
    assert difference < 1e-6


def test_rows_that_the_mesh_cannot_split():
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    check_rows(12, mesh)
    with pytest.raises(
        UserError,
        match=r"train.batch is 10, but the mesh splits rows over 4 devices .*a multiple of 4",
    ):
        check_rows(10, mesh)


def test_an_array_of_the_target_without_axes_is_refused():
    mesh = jax.sharding.AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"))
    layer = {key: jax.ShapeDtypeStruct((8, 8), jnp.float32) for key in ("q_FD", "new_FD")}
    with pytest.raises(ValueError, match=r"the target's array new_FD has no axes; declare it in"):
        shardings({"layers": [layer]}, mesh)
    del layer["new_FD"]
    [of_layer] = shardings({"layers": [layer]}, mesh)["layers"]
    assert tuple(of_layer["q_FD"].spec) == ("tensor", "fsdp")


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = jax.sharding.AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"))
    shapes = {"q_proj": (6, 8), "down_proj": (6, 7), "head_VD": (61, 8), "input_layernorm": (8,)}
    by_name = shardings(
        {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}, mesh
    )
    assert {name: tuple(sharding.spec) for name, sharding in by_name.items()} == {
        "q_proj": ("tensor", "fsdp"),
        "down_proj": (None, None),
        "head_VD": (None, None),
        "input_layernorm": (),
    }

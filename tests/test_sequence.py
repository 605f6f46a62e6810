"""`mesh.sequence`: rows split over eight devices give what one device gives, or are refused."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import environment
from sequence_cases import MESHES, REST

from beagle_jax.config import MeshConfig
from beagle_jax.errors import UserError
from beagle_jax.sharding import check_positions, make_mesh, mesh_for_decoding

TESTS = Path(__file__).parent


def run(folder: Path, *which: str) -> dict:
    """Runs tests/sequence_cases.py on eight virtual devices."""
    variables = environment(8) | {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }
    out = folder / "found.json"
    command = [sys.executable, str(TESTS / "sequence_cases.py"), str(out), *which]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("sequence"))


@pytest.fixture(scope="module")
def rest(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("sequence"), "rest")


def same(single: dict, many: dict) -> None:
    """Compares losses and gradients to 1e-5 of the largest number of each array."""
    assert (many["count"], many["agree"]) == (single["count"], single["agree"])
    np.testing.assert_allclose(many["loss"], single["loss"], rtol=1e-5)
    for name, gradient in single["gradient"].items():
        size = np.abs(gradient).max()
        assert size > 1e-6
        np.testing.assert_allclose(many["gradient"][name], gradient, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize(
    ("stage", "sizes"), [(stage, sizes) for stage, meshes in MESHES.items() for sizes in meshes]
)
def test_split_rows_give_the_same_loss_and_gradients(measured, stage, sizes):
    same(measured[stage]["{}"], measured[stage][str(sizes)])
    assert np.sum(measured[stage]["{}"]["agree"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sizes"), [(stage, sizes) for stage, meshes in REST.items() for sizes in meshes]
)
def test_so_do_other_meshes(rest, stage, sizes):
    same(rest[stage]["{}"], rest[stage][str(sizes)])


def test_planted_bug_a_device_that_sees_its_own_part_alone(measured):
    with pytest.raises(AssertionError):
        same(measured["early"]["{}"], measured["early"]["planted"])


def test_no_device_computes_the_activations_of_a_whole_row(measured):
    early = measured["early"]
    assert 13 in early["{}"]["positions_a_device"]
    assert early["{'sequence': 8}"]["positions_a_device"] == [2]  # an eighth of 16


def test_rows_that_cannot_be_split_evenly_are_refused():
    mesh = jax.sharding.AbstractMesh((1, 1, 4, 1), ("data", "fsdp", "sequence", "tensor"))
    check_positions(224, mesh)
    with pytest.raises(
        UserError,
        match=r"train.row_tokens is 226, but mesh.sequence splits each row into 4 parts; set it "
        "to a multiple of 4",
    ):
        check_positions(226, mesh)


def test_a_decoder_has_no_such_axis():
    with pytest.raises(
        UserError,
        match=r"mesh.sequence is 2, which splits the rows of training, but generate decodes; set "
        "mesh.sequence=1",
    ):
        mesh_for_decoding(MeshConfig(sequence=2), 1, "generate")


def test_the_axis_is_there_only_where_it_splits():
    class Device:
        """Stands for eight devices where there is one; only their number matters."""

    devices = [Device() for _ in range(8)]
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=2), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}
    assert "sequence" not in make_mesh(MeshConfig(fsdp=2), devices).shape

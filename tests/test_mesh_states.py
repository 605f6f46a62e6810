"""States that a mesh computes are those of one device, and are written while the target runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, environment
from state_mesh_cases import BUG, DTYPES, MESHES, REST, ROWS, TAPS, TOKENS
from test_loader import rows_of_lengths

from beagle_jax.data import states, target_forward
from beagle_jax.data.states import keep_states, store_states, target_states

TESTS = Path(__file__).parent


def written(params, folder, dtype: str, tokens: int = TOKENS) -> list[np.ndarray]:
    """The states of ROWS from a new file of one device."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{dtype}.states"
    store_states(params, TINY, [(path, ROWS)], dtype, TAPS, tokens)
    return read(params, path, dtype)


def read(params, path, dtype: str) -> list[np.ndarray]:
    return [np.asarray(x) for x in target_states(params, TINY, ROWS, path, dtype, TAPS)]


def check_same(alone, together, dtype: str) -> None:
    """Checks that two lists of states are equal up to rounding.

    1e-4: two layers in another order of summation, also where batches have other shapes; int8: one
    step of its grid.
    """
    for first, second in zip(alone, together, strict=True):
        largest = np.abs(first).max(axis=1, keepdims=True)
        step = {"float32": 1e-4, "int8": 1 / 127}[dtype] * largest
        assert (np.abs(first - second) <= step + 1e-4).all()


@pytest.fixture(scope="module")
def alone(tiny_params, tmp_path_factory) -> dict[str, list[np.ndarray]]:
    """The states of one device, by dtype."""
    folder = tmp_path_factory.mktemp("alone")
    return {dtype: written(tiny_params, folder, dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def meshes(tmp_path_factory) -> Path:
    """The folder with the files of eight virtual devices."""
    return _run(tmp_path_factory.mktemp("meshes"))


@pytest.fixture(scope="module")
def rest(tmp_path_factory) -> Path:
    return _run(tmp_path_factory.mktemp("rest"), "rest")


def _run(folder: Path, *which: str) -> Path:
    variables = environment(8) | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }
    command = [sys.executable, str(TESTS / "state_mesh_cases.py"), str(folder), *which]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_writes_the_states_of_one_device(tiny_params, meshes, alone, mesh, dtype):
    check_same(alone[dtype], read(tiny_params, meshes / mesh / f"{dtype}.states", dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mesh", REST)
def test_other_meshes_write_them_too(tiny_params, rest, alone, mesh, dtype):
    check_same(alone[dtype], read(tiny_params, rest / mesh / f"{dtype}.states", dtype), dtype)


def test_rows_on_the_wrong_device_are_seen(tiny_params, meshes, alone):
    with pytest.raises(AssertionError):
        test_a_mesh_writes_the_states_of_one_device(tiny_params, meshes, alone, BUG, "float32")


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_and_weights_are_split(meshes, mesh):
    """Each device computes its part of the rows, from its part of the weights."""
    check_split(meshes, mesh, MESHES[mesh])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", REST)
def test_rows_and_weights_are_split_on_other_meshes(rest, mesh):
    check_split(rest, mesh, REST[mesh])


def check_split(folder: Path, mesh: str, sizes: dict[str, int]) -> None:
    sizes = {"fsdp": 1, "tensor": 1} | sizes
    batches = json.loads((folder / "shapes.json").read_text())[mesh]
    share_of_rows = 1 / (sizes["data"] * sizes["fsdp"])
    assert batches
    for held in batches:
        assert held["tokens"] == held["states"] == [share_of_rows]
        assert held["gate"] == [1 / (sizes["fsdp"] * sizes["tensor"])]


@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_the_size_of_a_forward_pass_changes_nothing(tiny_params, tmp_path, alone, tokens):
    together = written(tiny_params, tmp_path, "float32", tokens)
    check_same(alone["float32"], together, "float32")


def test_forward_passes_have_as_many_tokens_as_are_allowed(tiny_params, monkeypatch):
    def shapes(rows: int) -> list[tuple[int, int]]:
        batches = target_forward._batches(tiny_params, rows_of_lengths(*[31] * rows), 128)
        return [tokens_BL.shape for _, tokens_BL, _ in batches]

    assert shapes(9) == [(4, 32), (4, 32), (1, 32)]
    monkeypatch.setattr(target_forward, "row_parts", lambda mesh: 8)  # of eight devices
    assert shapes(99) == [(32, 32), (32, 32), (32, 32), (8, 32)]


def test_int8_of_the_device_is_that_of_the_host(tiny_params, tmp_path, alone):
    """Answers keep states that the host rounds, other rows those that the device rounds."""
    path = tmp_path / "part-0000.states"
    keep_states(path, ROWS, alone["float32"], "int8", TAPS)
    # One step of the grid: XLA may multiply by 1 / 127 where numpy divides by 127.
    check_same(read(tiny_params, path, "int8"), alone["int8"], "int8")


def test_the_next_batch_runs_while_the_rows_of_one_are_taken(tiny_params, monkeypatch):
    right, started = target_forward._stored, []

    def counted(*arguments):
        started.append(len(started))
        return right(*arguments)

    monkeypatch.setattr(target_forward, "_stored", counted)
    batches = target_forward.compute(tiny_params, TINY, ROWS, (), "float32", 128)
    running = [len(started) for _ in batches]
    assert running[0] == 2 and running[-1] == len(started) > 2


def test_the_log_says_how_long_the_target_waited(tiny_params, tmp_path, caplog):
    caplog.set_level("INFO", "beagle_jax")
    paths = [(tmp_path / f"part-000{n}.states", ROWS[n::2]) for n in (0, 1)]
    share = store_states(tiny_params, TINY, paths)
    assert share is not None and 0 <= share <= 1
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if f"the target waited for the disk {share:.1%} of" in line]
    assert store_states(tiny_params, TINY, paths) is None


def test_an_error_of_a_write_ends_the_run_and_leaves_no_part(tiny_params, tmp_path, monkeypatch):
    right = states._write

    def broken(path, *arguments, **more):
        if path.name.startswith("part-0001"):
            raise OSError("no space left")
        right(path, *arguments, **more)

    monkeypatch.setattr(states, "_write", broken)
    paths = [(tmp_path / f"part-000{n}.states", ROWS[n::3]) for n in (0, 1, 2)]
    with pytest.raises(OSError, match="no space left"):
        store_states(tiny_params, TINY, paths)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["part-0000.states", "part-0000.states.json"]

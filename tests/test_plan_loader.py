"""What `plan` says of the loader and of rematerialisation, by hand and on files of states."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from beagle_jax.commands import plan as plan_command
from beagle_jax.commands.plan import _verdict, stage_figures
from beagle_jax.commands.plan_loader import least_seconds, loader, loader_rate, readers, verdict
from beagle_jax.config import Config, DataConfig, MeshConfig, TargetConfig, TrainConfig
from beagle_jax.data import disk_rate
from beagle_jax.data.disk_rate import read_rate
from beagle_jax.hardware import CHIPS
from beagle_jax.sharding import make_mesh
from beagle_jax.training.cost import StageCost

KIND = "NVIDIA H100 80GB HBM3"
COST = StageCost(2e15, 1, 2, 3, 4, 5, 6, 100, "", 0.1)


def config_of(folder, **train) -> Config:
    return Config(
        target=TargetConfig(source="x"),
        data=DataConfig(folder=str(folder)),
        train=TrainConfig(batch=8, row_tokens=100, **train),
    )


def mesh_of(processes: int, rows: int = 8):
    """Returns a stand-in for a mesh of eight H100 of several hosts."""
    devices = [
        SimpleNamespace(device_kind=KIND, platform="gpu", process_index=index * processes // 8)
        for index in range(8)
    ]
    shape = {"data": 1, "fsdp": rows, "tensor": 8 // rows}
    return SimpleNamespace(
        devices=np.array(devices, object), size=8, shape=shape, axis_names=tuple(shape)
    )


def test_the_rate_is_the_batch_over_the_least_time_of_a_step(tmp_path):
    config = config_of(tmp_path)
    seconds = least_seconds(config, mesh_of(1), 2e15)
    assert seconds == pytest.approx(2e15 / (8 * CHIPS[KIND].bfloat16))
    in_float32 = least_seconds(
        config.changed(train=config.train.changed(dtype="float32")), mesh_of(1), 2e15
    )
    assert in_float32 == pytest.approx(2e15 / (8 * CHIPS[KIND].float32))
    for processes in (1, 2):
        loading = loader(config, mesh_of(processes), 8192)
        assert loading["batch_bytes"] == 8 * 100 * 8192 and loading["disk_rate"] is None
        assert loader_rate(seconds, loading) == pytest.approx(8 * 100 * 8192 / seconds / processes)
    # Two hosts whose devices hold the same rows read all of them.
    assert (readers(mesh_of(2, rows=1)), readers(mesh_of(2, rows=2))) == (1, 2)
    assert loader_rate(None, loading) is None
    cpu_mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert least_seconds(config, cpu_mesh, 1e9) is None  # a CPU's peak is not published


def test_states_on_the_disk_are_read(tmp_path, monkeypatch):
    assert read_rate(tmp_path / "none") is None and read_rate(tmp_path) is None
    (tmp_path / "part-0000.states").write_bytes(b"")
    assert read_rate(tmp_path) is None
    (tmp_path / "part-0001.states").write_bytes(bytes(300))
    (tmp_path / "part-0002.states").write_bytes(bytes(500))
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(disk_rate.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(disk_rate, "_SECONDS", 1.0)
    assert read_rate(tmp_path) == 300 / 2  # the limit comes after the first file
    monkeypatch.setattr(disk_rate, "_SECONDS", 1e9)
    clock = iter([0.0, 1.0, 2.0, 4.0])
    assert read_rate(tmp_path) == 800 / 4
    monkeypatch.setattr(disk_rate, "_PIECE", 100)
    monkeypatch.setattr(disk_rate, "_MOST", 400)
    clock = iter(float(second) for second in range(100))
    assert read_rate(tmp_path) == 400 / 4


def test_the_verdict_names_what_to_do(tmp_path):
    loading = {"folder": "d", "readers": 1, "batch_bytes": 8e9, "disk_rate": 1e9}
    assert verdict(loading, [0.9e9, None]).endswith("the disk of d gives 1.00 GB/s")
    assert "gives 1.00 GB/s: steps may wait; store int8" in verdict(loading, [0.5e9, 1.1e9])
    assert "unknown" in verdict(loading, [None])
    assert "d has no states yet" in verdict(loading | {"disk_rate": None}, [1e9])
    assert "data.states: online" in verdict(loading | {"batch_bytes": 0}, [0.0])


def test_a_step_that_does_not_fit_is_compiled_with_remat_too(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_command, "memory_of", lambda device: 60)
    remats = []

    def cost_of(name, config):
        remats.append(config.train.remat)
        return COST._replace(compiler_total=100 if config.train.remat == "none" else 50)

    mesh, config = mesh_of(1), config_of(tmp_path)
    loading = loader(config, mesh, 8192)
    made = stage_figures(config, "early", mesh, loading, cost_of)
    assert remats == ["none", "block"] and made["fits"] is False
    assert made["with_remat"] == {"compiler_total": 50, "fits": True}
    assert "early: does NOT fit, but with train.remat=block it takes" in _verdict(("early", made))
    both = made | {"with_remat": {"compiler_total": 90, "fits": False}}
    assert "early: compiles and does NOT fit; lower train.batch" in _verdict(("early", both))
    assert made["loader_rate"] == pytest.approx(loading["batch_bytes"] / made["least_seconds"])
    monkeypatch.setattr(plan_command, "memory_of", lambda device: 200)
    made = stage_figures(config, "early", mesh, loading, cost_of)
    assert made["fits"] and made["with_remat"] is None and remats == ["none", "block", "none"]
    monkeypatch.setattr(plan_command, "memory_of", lambda device: 10)
    made = stage_figures(config_of(tmp_path, remat="block"), "early", mesh, loading, cost_of)
    assert made["fits"] is False and made["with_remat"] is None

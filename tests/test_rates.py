"""What a log record says of rates: tokens, learning rate, clipping, waiting, utilisation."""

import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE
from loop_cases import SPEC, Breaking, config_for, lines_of, loader_of, train_stage
from step_cases import three_rows

from beagle_jax.config import EarlyStage, LateStage, LogConfig
from beagle_jax.hardware import CHIPS
from beagle_jax.training import rates as rates_module
from beagle_jax.training.cost import row_flops
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.rates import CLOCKED, Rates
from beagle_jax.training.step import Metrics

V, D = 11, 16
NONE = LateStage(steps=0)


class Clock:
    """A clock that moves only where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(rates_module, "time", SimpleNamespace(perf_counter=lambda: self.now))


def rates_of(folder, **changes) -> Rates:
    frozen = FrozenTarget(jnp.zeros((V, D)), jnp.zeros((V, D)))
    return Rates("early", config_for(folder, **changes), SPEC, frozen, ONE_DEVICE, padding=0.25)


def metrics_of(supervised: float, norm: float) -> Metrics:
    zeros = Metrics(*[np.float32(0)] * len(Metrics._fields))
    return zeros._replace(supervised=np.float32(supervised), grad_norm=np.float32(norm))


def test_a_record_has_the_rates_of_its_interval(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    rates = rates_of(tmp_path, accumulate=3, clip_norm=0.5, late=NONE)
    steps = [metrics_of(10, 0.25), metrics_of(30, 4.0)]

    def slow():
        for batch in (three_rows(3, 3, 3), three_rows(3, 3, 3)):
            clock.now += 1.0  # read
            yield batch

    for metrics, _ in zip(steps, rates.fed(slow()), strict=False):
        clock.now += 2.0  # trained
        rates.add(metrics)
    with rates.saving():
        clock.now += 4.0
    line = rates.record(6, steps)
    assert line == {
        # batches 3 to 5 form the second update; the warm-up has two batches
        "learning_rate": 0.01,
        "grad_norm": 2.125,
        "grad_norm_clipped": 0.375,
        "tokens_per_second": 4.0,
        "tokens_per_second_per_device": 4.0,
        "data_wait": 0.2,
        "checkpoint_wait": 0.4,
    }
    clock.now += 1.0
    rates.add(metrics_of(7, 1.0))
    again = rates.record(7, [metrics_of(7, 1.0)])
    assert again["tokens_per_second"] == 7.0 and again["data_wait"] == 0.0


def test_utilisation_is_of_the_chip_s_published_rate(tmp_path, monkeypatch):
    """By formula, for the tokens that are there: 4 rows of 9 tokens, 20 of 40 queries."""
    clock = Clock(monkeypatch)
    rate = CHIPS["TPU v5 lite"].bfloat16
    monkeypatch.setattr(rates_module, "peak_rate", lambda config, mesh: rate)
    rates = rates_of(tmp_path)
    clock.now += 1e-9
    for _ in range(2):
        rates.add(metrics_of(20, 1.0))
    stage = EarlyStage(steps=12, learning_rate=1e-2, warmup=2, window=3)
    expected = 2 * 4 * row_flops(SPEC, stage, V, 9, 5) / (1e-9 * rate)
    assert rates.record(2, [metrics_of(20, 1.0)])["utilisation"] == pytest.approx(
        expected, abs=5e-5
    )
    assert expected > 1e-3  # else rounding would hide it


def test_peaks_are_those_of_the_dtype_and_all_chips(tmp_path, monkeypatch):
    devices = np.array([SimpleNamespace(device_kind="NVIDIA L4", platform="gpu")] * 4)
    mesh = SimpleNamespace(devices=devices, size=4)
    config, chip = config_for(tmp_path), CHIPS["NVIDIA L4"]
    assert rates_module.peak_rate(config, mesh) == 4 * chip.bfloat16
    config = config_for(tmp_path, dtype="float32")
    assert rates_module.peak_rate(config, mesh) == 4 * chip.float32
    assert rates_module.peak_rate(config, ONE_DEVICE) is None  # a CPU has no published peak here


def test_a_run_logs_them_and_a_slow_loader_is_seen(tmp_path, tiny_params):
    def slow(batch):
        time.sleep(0.5)
        return batch

    frozen = FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"])
    config = config_for(tmp_path).changed(log=LogConfig(every=1))
    train_stage(config, frozen, Breaking(loader_of(20, 1), 9, slow))
    lines = {line["step"]: line for line in lines_of(config)}
    of_accelerators = {"utilisation", "memory_peak"}
    assert set(CLOCKED) - of_accelerators <= lines[3].keys()
    assert [lines[step]["learning_rate"] for step in (1, 2, 12)] == [0.005, 0.01, 0.01]
    assert all(line["grad_norm_clipped"] <= 0.5 for line in lines.values())
    waits = {step: line["data_wait"] for step, line in lines.items()}
    assert max(waits[step] for step in (9, 10, 11)) > 0.3  # the batch of step 10 came late

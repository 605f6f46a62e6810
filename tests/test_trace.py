"""`log.profile`: which steps are traced, and where the trace is."""

import pytest
from loop_cases import config_for, loader_of, train_stage

from beagle_jax.config import LogConfig
from beagle_jax.training import trace as trace_module
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.trace import Trace


class Profiler:
    """Stands for jax.profiler: records which steps it has seen."""

    def __init__(self, monkeypatch):
        self.calls: list[str] = []
        of_jax = trace_module.jax.profiler
        monkeypatch.setattr(of_jax, "start_trace", lambda to: self.calls.append(f"start {to}"))
        monkeypatch.setattr(of_jax, "stop_trace", lambda: self.calls.append("stop"))


@pytest.mark.parametrize(
    ("steps", "of_stage", "expected"),
    [
        (2, 6, [0, 1, "start", 2, 3, "stop", 4, 5]),
        (9, 4, [0, 1, "start", 2, 3, "stop"]),  # the stage ends first
        (3, 2, [0, 1]),
        (0, 4, [0, 1, 2, 3]),
    ],
)
def test_steps_after_the_first_two_are_traced(tmp_path, monkeypatch, steps, of_stage, expected):
    profiler = Profiler(monkeypatch)
    config = config_for(tmp_path).changed(log=LogConfig(profile=steps))
    trace = Trace(config, "early")
    for step in range(of_stage):
        trace.before(step)
        profiler.calls.append(step)
        trace.after(step, ())
    trace.close()
    folder = tmp_path / "profile" / "early"
    assert profiler.calls == [f"start {folder}" if x == "start" else x for x in expected]


def test_a_run_leaves_a_trace_that_tensorboard_reads(tmp_path, tiny_params):
    frozen = FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"])
    config = config_for(tmp_path).changed(log=LogConfig(profile=2))
    train_stage(config, frozen, loader_of(20, 1))
    assert list((tmp_path / "profile" / "early").glob("plugins/profile/*/*.xplane.pb"))

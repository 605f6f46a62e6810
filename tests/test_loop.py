"""Running a stage: progress, log, checkpoints, resuming and stopping."""

import json
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY
from loop_cases import (
    SPEC,
    Breaking,
    L,
    after_each_step,
    config_for,
    infinite_state,
    interrupt,
    lines_of,
    loader_of,
    same_params,
    saved_steps,
    train_stage,
)

from beagle_jax.config import EarlyStage, LogConfig, TargetConfig
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.prefetch import AHEAD
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.training import loop
from beagle_jax.training.checkpoint import StageCheckpoints
from beagle_jax.training.loop import run_stage
from beagle_jax.training.metrics import Log
from beagle_jax.training.progress import Progress, summary
from beagle_jax.training.step import Metrics

pytestmark = pytest.mark.usefixtures("shared_steps")


@pytest.fixture(scope="module")
def start() -> dict:
    return init_draft(SPEC, jax.random.key(3))


@pytest.fixture(scope="module")
def stage(frozen, start):
    """Runs a stage of a config, from the same parameters every time."""

    def stage(config, training=None, held_out=None):
        return train_stage(config, frozen, training, params=start, held_out=held_out)

    return stage


def test_a_part_of_a_line_that_a_killed_run_left_is_taken_away(tmp_path):
    config, path = config_for(tmp_path), tmp_path / "log.jsonl"
    for left, steps in (('{"step": 1}\n{"st', [1]), ('{"st', []), ('{"step": 1}\n', [1]), ("", [])):
        path.write_text(left)
        Log(config).write({"step": 2})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*steps, 2]


@pytest.fixture(scope="module")
def whole(stage, tmp_path_factory):
    """Config and parameters of an early stage of 12 steps that nothing interrupted."""
    config = config_for(tmp_path_factory.mktemp("whole"))
    return config, stage(config)


def test_the_loss_goes_down_and_is_logged(stage, tmp_path):
    config = config_for(
        tmp_path,
        early=EarlyStage(steps=60, learning_rate=1e-2, warmup=2, window=3),
        checkpoint_every=30,
    )
    stage(config, held_out=loader_of(8, 2))
    lines = [line for line in lines_of(config) if "split" not in line]
    assert [line["step"] for line in lines] == list(range(3, 61, 3))
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    for line in lines:
        assert line["stage"] == "early" and len(line["top1_by_offset"]) == 3
        # 1e-3: the log rounds to five digits
        assert line["loss"] == pytest.approx(line["ploss"] + 10 * line["vloss"], rel=1e-3)
        assert line["tokens_per_second"] > 0 < line["grad_norm"] and all(
            0 <= share <= 1 for share in line["top1_by_offset"]
        )
    held_out = [line for line in lines_of(config) if line.get("split") == "held_out"]
    assert [line["step"] for line in held_out] == [30, 60] and held_out[1]["loss"] < held_out[0][
        "loss"
    ]


def test_the_newest_two_checkpoints_stay_and_the_callers_parameters_too(whole, start):
    config, params = whole
    assert saved_steps(config) == [10, 12]
    assert all(np.isfinite(array).all() for array in start.values())
    with pytest.raises(AssertionError):
        same_params(params, start)


def test_a_finished_stage_is_skipped(whole, stage):
    config, params = whole
    before = lines_of(config)
    same_params(stage(config, training=Breaking(loader_of(20, 1), 0, interrupt)), params)
    assert lines_of(config) == before


def interrupted_then_resumed(stage, folder, step: int):
    config = config_for(folder)
    with pytest.raises(KeyboardInterrupt):
        stage(config, training=Breaking(loader_of(20, 1), step, interrupt))
    assert saved_steps(config)[-1] == step // 5 * 5
    return config, stage(config)


def test_every_step_takes_its_own_batch_once(stage, tmp_path):
    config, broken, resumed = (
        config_for(tmp_path),
        Breaking(loader_of(20, 1), 8, interrupt),
        Breaking(loader_of(20, 1)),
    )
    with pytest.raises(KeyboardInterrupt):
        stage(config, training=broken)
    stage(config, training=resumed)
    # The next batches are read ahead.
    assert broken.requested[:9] == list(range(9)) and resumed.requested == list(range(5, 12))


def test_stop_and_resume_is_bit_equal(whole, stage, tmp_path):
    config, params = interrupted_then_resumed(stage, tmp_path, 8)
    same_params(params, whole[1])
    # Steps 6 to 8 were run twice.
    assert [line["step"] for line in lines_of(config)] == [
        3,
        6,
        6,
        9,
        12,
    ]


@pytest.mark.parametrize("lost", ["optimizer", "step"])
def test_a_resume_that_loses_something_is_seen(whole, stage, tmp_path, monkeypatch, lost):
    restore = StageCheckpoints.restore

    def forgetful(self, fresh):
        restored = restore(self, fresh)
        if restored is None:
            return None
        state, waiting = restored
        # Zeroed in place: a new array would lie elsewhere and compile the step again.
        if lost == "optimizer":
            return state._replace(opt_state=jax.tree.map(lambda x: x * 0, state.opt_state)), waiting
        return state._replace(step=state.step + 1), waiting

    monkeypatch.setattr(StageCheckpoints, "restore", forgetful)
    _, params = interrupted_then_resumed(stage, tmp_path, 8)
    with pytest.raises(AssertionError):
        same_params(params, whole[1])


def test_an_infinite_loss_stops_the_run_and_keeps_the_last_checkpoint(whole, stage, tmp_path):
    config = config_for(tmp_path)
    message = (
        r"early stage, step 8: the loss is (nan|inf), .* the last checkpoint is kept. Its "
        r"batch is number 2 of epoch 1; its row 0 has states that are not finite \(row 0 "
        r"begins with the tokens \[\d+, .*\]\): delete the states in data.folder"
    )
    with pytest.raises(UserError, match=message):
        stage(config, training=Breaking(loader_of(20, 1), 7, infinite_state))
    assert saved_steps(config) == [5]
    same_params(stage(config), whole[1])


def test_a_broken_step_is_never_saved(stage, tmp_path):
    config = config_for(tmp_path)
    with pytest.raises(UserError, match="early stage, step 5: the loss is"):
        stage(config, training=Breaking(loader_of(20, 1), 4, infinite_state))
    assert saved_steps(config) == []


def test_an_infinite_gradient_stops_the_run_too(stage, tmp_path, monkeypatch):
    def infinite(state, metrics):
        return metrics._replace(grad_norm=jnp.where(state.step == 5, jnp.inf, metrics.grad_norm))

    after_each_step(monkeypatch, lambda state, metrics: (state, infinite(state, metrics)))
    config = config_for(tmp_path)
    with pytest.raises(
        UserError,
        match=r"step 5: the loss is \d.*, the norm of its gradient inf; .*, and its states are "
        r"finite: lower train.early.learn",
    ):
        stage(config)
    assert saved_steps(config) == []


def test_shares_by_offset_are_of_what_was_counted():
    def batch(*agree):
        return Metrics(1.0, 1.0, 1.0, 5, np.array([4, 1]), np.array(agree), 1.0)

    line = summary([batch([1, 2, 3], [0, 1, 1]), batch([0, 0, 3], [1, 1, 1])])
    shares = {
        "top1_by_offset": [0.125, 0.5],
        "top4_by_offset": [0.25, 1.0],
        "top10_by_offset": [0.75, 1.0],
    }
    assert {key: line[key] for key in line if key.startswith("top")} == shares


class Counting:
    """Stands for the stage's rates, which this test does not read."""

    def add(self, metrics: Metrics) -> None:
        pass


def test_states_that_the_step_makes_are_not_called_finite(tmp_path):
    training = BatchLoader([Row([1, 2, 3], [True] * 3)] * 4, None, batch=4, row_tokens=L, seed=1)
    progress = Progress("early", config_for(tmp_path), None, training, 0, [], Counting())
    message = (
        r"Its batch is number 0 of epoch 6. Lower train.early.learning_rate. If that does not "
        r"help, the target's states, which this step computes"
    )
    with pytest.raises(UserError, match=message):
        progress.add(7, Metrics(*[np.float32("nan")] * len(Metrics._fields)))


def reads_ahead(stage, config, patience: float, monkeypatch) -> bool:
    """Whether later batches are requested while a step runs, within `patience` seconds."""
    training, filled = Breaking(loader_of(20, 1)), []

    def look(state, metrics):
        end = time.monotonic() + patience
        while not filled and len(training.requested) < 1 + AHEAD and time.monotonic() < end:
            time.sleep(0.01)
        filled.append(len(training.requested) >= 1 + AHEAD)
        return state, metrics

    after_each_step(monkeypatch, look)
    stage(config, training=training)
    return filled[0]


def test_the_next_batches_are_read_while_a_step_is_under_way(stage, tmp_path, monkeypatch):
    assert reads_ahead(stage, config_for(tmp_path / "a"), 20, monkeypatch)

    def when_the_step_is_over(batch_at, steps, place):
        return map(place, map(batch_at, steps))

    monkeypatch.setattr(loop, "read_ahead", when_the_step_is_over)
    assert not reads_ahead(stage, config_for(tmp_path / "b"), 0, monkeypatch)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 3}, "train.seed: 42 there, 3 now"),
        ({"noise": "none"}, "train.noise: 'uniform' there, 'none' now"),
        ({"vloss_weight": 1.0}, "train.vloss_weight: 10.0 there, 1.0 now"),
        (
            {"early": EarlyStage(steps=13, learning_rate=1e-2, warmup=2, window=3)},
            "train.early.steps: 12 there, 13 now",
        ),
        (
            {"early": EarlyStage(steps=12, learning_rate=1e-2, warmup=2, window=4)},
            "train.early.window: 3 there, 4 now",
        ),
    ],
)
def test_a_folder_with_other_settings_is_refused(whole, stage, changes, named):
    config, _ = whole
    with pytest.raises(
        UserError,
        match=f"checkpoints/early holds a run with other settings .{named}.; delete it, set "
        "another",
    ):
        stage(config.changed(train=config.train.changed(**changes)))


def test_another_target_is_refused_by_name(whole, frozen):
    """Its state does not even fit; the message names the target."""
    config, _ = whole
    spec = BeagleSpec.from_target(replace(TINY, intermediate_size=16))
    other = config.changed(target=TargetConfig(source="other"))
    with pytest.raises(UserError, match=r"target.source: 'tiny' there, 'other' now"):
        run_stage(
            "early",
            other,
            spec,
            init_draft(spec, jax.random.key(3)),
            frozen,
            ONE_DEVICE,
            loader_of(20, 1),
            None,
            Log(config),
        )


def test_settings_that_change_no_number_are_free(whole, stage):
    config, params = whole
    late = config.train.late.changed(steps=99)
    freed = config.changed(
        train=config.train.changed(late=late, checkpoint_every=7, loss_rows=99),
        log=LogConfig(every=1),
    )
    same_params(stage(freed), params)

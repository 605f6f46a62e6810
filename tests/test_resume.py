"""Resuming after a kill, a cut, a full disk or other settings: bit for bit, or not at all."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loop_cases import (
    SPEC,
    Breaking,
    after_each_step,
    broken_at,
    config_for,
    infinite_state,
    interrupt,
    lines_of,
    loader_of,
    same_params,
    saved_steps,
    train_stage,
)

from beagle_jax.config import Config, LateStage, LogConfig
from beagle_jax.errors import UserError
from beagle_jax.model.beagle import init_draft
from beagle_jax.training.checkpoint import StageCheckpoints
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.loop import check_settings, settings_of, steps_done
from beagle_jax.training.metrics import Log
from beagle_jax.training.rates import CLOCKED
from beagle_jax.training.stop import StopSignal

pytestmark = pytest.mark.usefixtures("shared_steps")

LATE = LateStage(steps=6, learning_rate=1e-2, warmup=2, window=2, simulation_steps=2)


def config_of(folder, **changes) -> Config:
    return config_for(folder, late=LATE, **changes)


def both_stages(config: Config, frozen: FrozenTarget, training=None) -> dict:
    """Runs the early and the late stage as the train command does, from fixed parameters."""
    early = train_stage(config, frozen, training)
    return train_stage(config, frozen, training, stage="late", params=early)


def test_the_late_stage_goes_on_with_the_batches_after_the_early_one(frozen, tmp_path):
    config, training = config_of(tmp_path), Breaking(loader_of(20, 1))
    early = train_stage(config, frozen, training)
    done, training.requested = steps_done("early", config), []
    assert done == config.train.early.steps and steps_done("late", config) == 0
    train_stage(config, frozen, training, stage="late", params=early, start=done)
    steps = config.train.late.steps
    assert training.requested == list(range(done, done + steps))
    assert steps_done("late", config) == steps


def test_a_batch_is_named_by_its_place_in_the_text_not_in_the_stage(frozen, tmp_path):
    """The third batch of the late stage is the last of the third epoch of five batches."""
    config, training = config_of(tmp_path), Breaking(loader_of(20, 1), 14, infinite_state)
    params = init_draft(SPEC, jax.random.key(3))
    with pytest.raises(UserError, match=r"late stage, step 3: .* number 4 of epoch 2; its row 0"):
        train_stage(config, frozen, training, stage="late", params=params, start=12)


def figures_of(config: Config) -> dict[tuple[str, int], dict]:
    """Returns the last log record of every step, without what depends on the clock."""
    return {
        (line["stage"], line["step"]): {**line, **dict.fromkeys(CLOCKED)}
        for line in lines_of(config)
    }


@pytest.fixture(scope="module")
def whole(frozen, tmp_path_factory):
    """Config and parameters of an uninterrupted run of both stages."""
    config = config_of(tmp_path_factory.mktemp("whole"))
    return config, both_stages(config, frozen)


def stopped_at(stage: str, step: int, config: Config, frozen: FrozenTarget, how) -> None:
    """Runs until `how` strikes at a step of a stage."""
    params = None
    for name in ("early", "late"):
        training = Breaking(loader_of(20, 1), step, how) if name == stage else None
        params = train_stage(config, frozen, training, stage=name, params=params)


def kill(batch):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_outright_and_started_again_is_bit_equal(whole, frozen, tmp_path):
    """A real kill of a separate process, in the middle of an epoch and of a log interval."""
    tests = Path(__file__).parent
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import conftest, test_resume as t;p = "
        "conftest.random_params(conftest.TINY);t.stopped_at('early', 11, "
        "t.config_of(sys.argv[2]), t.FrozenTarget(p['embed_VD'], p['embed_VD']), "
        "t.kill)"
    )
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}", "TQDM_DISABLE": "1"}
    died = subprocess.run(
        [sys.executable, "-c", program, str(tests), str(tmp_path)],
        env=environment,
        capture_output=True,
        timeout=240,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    config = config_of(tmp_path)
    # Batches may be read ahead of their step.
    assert lines_of(config)[-1]["step"] > 5 and saved_steps(config)[-1:] != [12]
    same_params(both_stages(config, frozen), whole[1])
    assert figures_of(config) == figures_of(whole[0])


@pytest.mark.parametrize(("stage", "step"), [("early", 11), ("late", 0), ("late", 3)])
def test_stopped_anywhere_is_bit_equal(whole, frozen, tmp_path, stage, step):
    config = config_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped_at(stage, step, config, frozen, interrupt)
    same_params(both_stages(config, frozen), whole[1])
    assert figures_of(config) == figures_of(whole[0])


def test_a_log_that_forgets_the_steps_before_the_checkpoint_is_seen(
    whole, frozen, tmp_path, monkeypatch
):
    restore = StageCheckpoints.restore
    monkeypatch.setattr(
        StageCheckpoints,
        "restore",
        lambda self, fresh: (restored := restore(self, fresh)) and (restored[0], []),
    )
    config = config_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped_at("early", 8, config, frozen, interrupt)
    same_params(both_stages(config, frozen), whole[1])
    assert figures_of(config) != figures_of(whole[0])


def terminate(batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch


def test_sigterm_saves_the_step_under_way_and_ends_with_0(whole, frozen, tmp_path, capsys):
    config = config_of(tmp_path)
    with pytest.raises(SystemExit) as end:
        stopped_at("early", 6, config, frozen, terminate)
    # The step under way; the batch that brought the signal may have been read ahead of it.
    last = saved_steps(config)[-1]
    assert end.value.code == 0 and 5 <= last <= 7
    assert (
        f"early stage: stopped by SIGTERM after step {last}, which is saved"
        in capsys.readouterr().out
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    same_params(both_stages(config, frozen), whole[1])
    assert figures_of(config) == figures_of(whole[0])


def press_ctrl_c(batch):
    os.kill(os.getpid(), signal.SIGINT)
    return batch


def test_ctrl_c_saves_the_step_under_way_and_a_second_one_ends_at_once(
    whole, frozen, tmp_path, capsys
):
    config = config_of(tmp_path)
    with pytest.raises(SystemExit) as end:
        stopped_at("early", 6, config, frozen, press_ctrl_c)
    last = saved_steps(config)[-1]
    assert end.value.code == 130 and 5 <= last <= 7
    assert f"early stage: stopped by Ctrl-C after step {last}, which" in capsys.readouterr().out
    same_params(both_stages(config, frozen), whole[1])
    # A shell that starts a program in the background lets it ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignal() as stop:
            press_ctrl_c(None)
            assert stop.requested()
            with pytest.raises(KeyboardInterrupt):
                press_ctrl_c(None)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_while_a_stage_s_last_checkpoint_is_written_ends_with_0_too(
    whole, frozen, tmp_path, monkeypatch
):
    """After the last step no other step looks at the signal.

    It must neither wait for the next stage nor end the write.
    """
    config, leave = config_of(tmp_path), StageCheckpoints.__exit__

    def signalled(self, *exception):
        os.kill(os.getpid(), signal.SIGTERM)
        leave(self, *exception)

    before = signal.signal(
        signal.SIGTERM, lambda *_: pytest.fail("the signal would have ended the program")
    )
    try:
        with monkeypatch.context() as patch:
            patch.setattr(StageCheckpoints, "__exit__", signalled)
            with pytest.raises(SystemExit) as end:
                both_stages(config, frozen)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (
        end.value.code == 0
        and saved_steps(config) == [10, 12]
        and not (tmp_path / "checkpoints" / "late").exists()
    )
    same_params(both_stages(config, frozen), whole[1])


# Checkpoints that are not whole


@pytest.fixture
def half_done(frozen, tmp_path):
    """A run with checkpoints of steps 5 and 10, stopped at step 11."""
    config = config_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped_at("early", 10, config, frozen, interrupt)
    assert saved_steps(config) == [5, 10]
    return config, tmp_path / "checkpoints" / "early"


def largest_of(folder: Path) -> Path:
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_checkpoint_that_was_cut_off_is_set_aside_and_the_one_before_used(
    whole, frozen, half_done, capsys, how
):
    config, folder = half_done
    (folder / "cut-10" / "state").mkdir(parents=True)  # it has happened before
    largest = largest_of(folder / "10")
    largest.write_bytes(largest.read_bytes()[:100]) if how == "cut" else largest.unlink()
    same_params(both_stages(config, frozen), whole[1])
    printed = "".join(capsys.readouterr())
    assert (
        f"warning: {folder}/10: this checkpoint is not complete" in printed
        and "continues from step 5 of 12" in printed
    )
    assert f"has {100 if how == 'cut' else 0} bytes of" in printed and (folder / "cut-10").is_dir()


def test_a_checkpoint_whose_list_of_sizes_is_damaged_is_set_aside(whole, frozen, half_done, capsys):
    config, folder = half_done
    note = folder / "5" / "sizes.json"
    for damaged in (folder / "10", folder / "5"):
        (damaged / "sizes.json").write_text(note.read_text()[:20])
    same_params(both_stages(config, frozen), whole[1])
    printed = "".join(capsys.readouterr())
    assert (
        f"warning: {folder}/10: this checkpoint is not complete ({folder}/10/sizes.json: not JSON"
        in printed
    )
    assert (folder / "cut-5").is_dir() and "continues from" not in printed.partition("late stage")[
        0
    ]


def test_a_checkpoint_whose_settings_are_damaged_is_named(frozen, half_done):
    config, folder = half_done
    settings_file(folder).write_text("{")
    (folder / "10" / "sizes.json").unlink(missing_ok=True)
    with pytest.raises(
        UserError,
        match=r"early/10: this state does not fit the run, or is damaged .*remove this checkpoint "
        r"to continue",
    ):
        both_stages(config, frozen)


def test_a_checkpoint_that_was_being_written_is_ignored_with_a_warning(
    whole, frozen, half_done, capsys
):
    config, folder = half_done
    (folder / "10").rename(folder / "10.orbax-checkpoint-tmp")  # what a kill leaves
    same_params(both_stages(config, frozen), whole[1])
    printed = "".join(capsys.readouterr())
    assert (
        "10.orbax-checkpoint-tmp: the writing of this checkpoint was interrupted; it is ignored"
        in printed
    )
    assert "continues from step 5 of 12" in printed


@contextmanager
def small_disk(limit: int):
    """Limits the size of files, as on a full disk. limit: bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# A thread of orbax that has lost its event loop says so when the write it waited for has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(whole, frozen, tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped_at("early", 8, config, frozen, interrupt)
    message = (
        r"checkpoints/early: a checkpoint could not be written \(.*File too large.*\); the "
        r"last complete one is that of step 5"
    )
    with small_disk(4000), pytest.raises(UserError, match=message):
        both_stages(config, frozen)
    assert saved_steps(config) == [5]
    same_params(both_stages(config, frozen), whole[1])


# Numbers that are not finite


def test_a_broken_parameter_after_a_finite_loss_is_never_saved(frozen, tmp_path, monkeypatch):
    """Both moments and the gradient are finite; only the update overflows."""
    after_each_step(monkeypatch, broken_at(10, jnp.inf))
    config = config_of(tmp_path)
    with pytest.raises(
        UserError,
        match=r"step 10: a parameter .* is not finite although the loss was.* \(that of step 5\) "
        r"is kept",
    ):
        both_stages(config, frozen)
    assert saved_steps(config) == [5]


# Other settings


def test_changes_are_refused_by_key_and_accepted_when_told(frozen, half_done, capsys):
    config, _ = half_done
    # Neither is part of a step's program.
    changed = config.changed(train=config.train.changed(seed=7), data=config.data.changed(seed=3))
    for run in (lambda: both_stages(changed, frozen), lambda: check_settings(changed)):
        with pytest.raises(
            UserError,
            match=r"data.seed: 0 there, 3 now; train.seed: 42 there, 7 "
            r"now.*train.accept_changes=true",
        ):
            run()
    check_settings(config)
    accepting = changed.changed(train=changed.train.changed(accept_changes=True))
    both_stages(accepting, frozen)
    said = "".join(capsys.readouterr())
    assert "warning: " in said and " was made with other settings (" in said
    assert "train.seed: 42 there, 7 now" in said


def test_changes_that_make_another_state_say_so(frozen, half_done):
    config, _ = half_done
    muon = config.changed(train=config.train.changed(optimizer="muon", accept_changes=True))
    with pytest.raises(UserError, match="checkpoints/early/10: this state does not fit the run"):
        both_stages(muon, frozen)


def settings_file(folder: Path) -> Path:
    return folder / "10" / "settings" / "metadata"


@pytest.mark.parametrize(("value", "fits"), [("default", True), ("other", False)])
def test_a_key_that_an_old_checkpoint_does_not_know_counts_as_its_default(
    whole, frozen, half_done, value, fits
):
    config, folder = half_done
    settings = json.loads(settings_file(folder).read_text())
    del settings["train.vloss_weight"]  # as if it had been added since
    settings_file(folder).write_text(json.dumps(settings))
    (folder / "10" / "sizes.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "10" / "log")  # nor did it keep the steps since the last line of the log
    if fits:
        same_params(both_stages(config, frozen), whole[1])
        return
    changed = config.changed(train=config.train.changed(vloss_weight=1.0))
    with pytest.raises(UserError, match=r"train.vloss_weight: 10.0 there, 1.0 now"):
        both_stages(changed, frozen)


def test_settings_name_what_decides_and_nothing_else():
    early, late = (settings_of(name, config_of("x")).now for name in ("early", "late"))
    assert "train.early.steps" in early and "data.seed" in early and "draft.hot_tokens" in early
    assert (
        not [key for key in early if key.startswith("train.late")] and late["train.late.steps"] == 6
    )
    for free in ("train.folder", "train.checkpoint_every", "train.accept_changes", "draft.path"):
        assert free not in late
    elsewhere = config_of("y", checkpoint_every=1).changed(log=LogConfig(every=99))
    assert settings_of("late", elsewhere).now == late


# Where figures go


def test_optional_writers_say_what_is_missing(tmp_path, monkeypatch):
    for name, key, value in (("tensorboardX", "tensorboard", True), ("wandb", "wandb", "beagle")):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        config = config_of(tmp_path).changed(log=LogConfig(**{key: value}))
        with pytest.raises(
            UserError,
            match=rf"log.{key} is .*, but {name} is not installed: pip install 'beagle-jax\[log\]'",
        ):
            Log(config)


def test_optional_writers_get_the_same_figures(tmp_path, monkeypatch):
    written = []

    class Fake:
        """Stands for both packages, as much of them as is used."""

        SummaryWriter = staticmethod(lambda folder: Fake())
        init = staticmethod(lambda **settings: Fake())
        add_scalar = staticmethod(
            lambda name, value, step: written.append(("board", name, value, step))
        )
        log = staticmethod(lambda figures: written.append(("run", figures)))
        flush = close = finish = staticmethod(lambda: None)

    monkeypatch.setitem(sys.modules, "tensorboardX", Fake)
    monkeypatch.setitem(sys.modules, "wandb", Fake)
    log = Log(config_of(tmp_path).changed(log=LogConfig(tensorboard=True, wandb="beagle")))
    log.write(
        {
            "stage": "late",
            "step": 4,
            "split": "held_out",
            "loss": 1.5,
            "top1_by_offset": [0.5, 0.25],
        }
    )
    log.close()
    figures = {
        "late/held_out/loss": 1.5,
        "late/held_out/top1_by_offset_1": 0.5,
        "late/held_out/top1_by_offset_2": 0.25,
    }
    assert written == [
        *(("board", name, value, 4) for name, value in figures.items()),
        ("run", {"late/step": 4, **figures}),
    ]
    assert json.loads((tmp_path / "log.jsonl").read_text())["loss"] == 1.5


def test_a_log_on_a_full_disk_is_named(tmp_path):
    log = Log(config_of(tmp_path))
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"log.jsonl: the log cannot be written .*No space left.*free some space"
    ):
        log.write({"stage": "late", "step": 4, "loss": 1.5})


def test_tensorboard_files_appear(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the log extra")
    log = Log(config_of(tmp_path).changed(log=LogConfig(tensorboard=True)))
    log.write({"stage": "late", "step": 4, "loss": np.float64(1.5)})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"late/loss" in file.read_bytes()

"""Several processes, one run: how they find each other."""

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, environment, free_port
from loop_cases import (
    Breaking,
    config_for,
    interrupt,
    lines_of,
    loader_of,
    saved_steps,
    train_stage,
)
from process_cases import ASKED_AT

from beagle_jax.config import MeshConfig
from beagle_jax.data.share import Share
from beagle_jax.errors import UsageError, UserError
from beagle_jax.processes import add_distributed, is_first, join
from beagle_jax.sharding import make_mesh, share_of_rows
from beagle_jax.training.stop import StopSignal

pytestmark = pytest.mark.usefixtures("shared_steps")

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
)


@pytest.fixture
def joined(monkeypatch):
    """Returns what jax.distributed is called with, given flags and variables.

    None if it is not called.
    """

    def joined(*flags: str, **variables: str) -> dict | None:
        calls = []
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(
            jax.distributed, "initialize", lambda **settings: calls.append(settings)
        )
        made = ArgumentParser()
        add_distributed(made)
        join(made.parse_args(flags))
        return calls[0] if calls else None

    return joined


def test_a_lone_process_joins_nobody(joined):
    assert joined() is None
    assert joined(SLURM_NTASKS="8") is None  # a batch script's own shell
    assert joined(SLURM_NTASKS="1", SLURM_STEP_NODELIST="a1") is None
    assert is_first()


def test_clusters_and_flags_are_seen(joined):
    assert joined("--distributed") == {}
    assert joined(SLURM_NTASKS="8", SLURM_STEP_NODELIST="a[1-4]") == {}
    assert joined(JAX_COORDINATOR_ADDRESS="a1:1234", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1") == {
        "num_processes": 2,
        "process_id": 1,
    }


def test_a_number_that_is_none_is_named(joined):
    with pytest.raises(UsageError, match="JAX_PROCESS_ID is 'one'; expected a number"):
        joined(JAX_COORDINATOR_ADDRESS="a1:1234", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="one")


def test_processes_that_do_not_find_each_other_say_what_to_set(joined, monkeypatch):
    def nobody(**settings):
        raise ValueError("coordinator_address should be defined.")

    joined()
    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    with pytest.raises(
        UserError, match=r"did not find each other .*coordinator_address.*JAX_PROCESS_ID=0, 1"
    ):
        join(Namespace(distributed=True))


# Two processes on this machine, one device each


def run_in(count: int, *argv: str, copies: Path | None = None) -> list[tuple[str, str]]:
    """Runs process_cases.py in `count` processes of one device; returns stdout and stderr of each.

    All must end with status 0. copies: below it each has a folder of its own for copies of URLs.
    """
    tests = Path(__file__).parent
    variables = environment(1) | {
        "PYTHONPATH": f"{tests.parent}:{tests}",
        "TQDM_DISABLE": "1",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(tests / "process_cases.py"), *argv],
            env=variables
            | {"JAX_PROCESS_ID": str(number), "BEAGLE_JAX_REMOTE": f"{copies}/{number}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    ended = [process.communicate(timeout=280) for process in started]
    assert [process.returncode for process in started] == [0] * count, "\n".join(
        stderr[-2000:] for _, stderr in ended
    )
    return ended


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A run of two processes, which SIGTERM ended in its early stage.

    Returns its config, what each process said, after which step it stopped, and the tokens of a
    batch that each process holds on a mesh along `tensor`.
    """
    folder = tmp_path_factory.mktemp("together")
    ended = run_in(2, str(folder))
    said = [line for stdout, _ in ended for line in stdout.splitlines()]
    stops = [
        int(line.partition("stopped by SIGTERM after step ")[2].split(",")[0])
        for line in said
        if "stopped by SIGTERM" in line
    ]
    held = {
        name: [json.loads(line.partition(" ")[2]) for line in said if line.startswith(f"{name} ")]
        for name in ("rows", "planted")
    }
    return (
        config_for(folder),
        [line.split()[1:] for line in said if line.startswith("process ")],
        stops,
        held,
    )


@pytest.fixture(scope="module")
def alone(frozen, tmp_path_factory):
    """The same run in one process on one device to its end, and a function that runs another."""

    def run(config) -> dict:
        return train_stage(config, frozen)

    config = config_for(tmp_path_factory.mktemp("alone"))
    return config, run(config), run


def test_two_processes_share_devices_numbers_and_parameters(together):
    half = [str(TINY.hidden_size), str(TINY.hidden_size // 2)]
    assert together[1] == [
        ["0", "2", "False", "7.0", "True", *half],
        ["1", "2", "True", "7.0", "True", *half],
    ]


def test_two_processes_train_the_losses_of_one(together, alone):
    """The first process writes the one log; each reads its half of every batch."""
    actual, expected = lines_of(together[0])[:2], lines_of(alone[0])[:2]
    assert [line["step"] for line in actual] == [line["step"] for line in expected] == [3, 6]
    for together_line, other in zip(actual, expected, strict=True):
        for name in ("loss", "ploss", "vloss", "grad_norm"):
            # The log rounds to five digits.
            assert together_line[name] == pytest.approx(other[name], rel=1e-5, abs=2e-5), name
        assert together_line["top1_by_offset"] == other["top1_by_offset"]


def test_sigterm_to_one_process_stops_and_saves_all_after_the_same_step(together):
    config, _, (first, second), _ = together
    # Batches are read ahead of their steps.
    assert first == second == saved_steps(config)[-1] and ASKED_AT - 2 < first < 12


def test_processes_agree_on_a_number_that_only_grows(monkeypatch):
    """jax stops all processes at a future step number.

    A number that starts again in each stage might never be reached.
    """
    numbers = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        "beagle_jax.training.stop.multihost_utils.reached_preemption_sync_point",
        lambda number: numbers.append(number) or len(numbers) == 4,
    )
    said = []
    for _ in ("early", "late"):
        with StopSignal() as stop:
            said += [stop.requested(), stop.requested()]
    assert said == [False, False, False, True] and stop.seen
    assert numbers == list(range(numbers[0], numbers[0] + 4))


def test_processes_read_different_halves_of_the_batch():
    halves = [loader_of(20, 1, Share(number, 2)).batch_at(0) for number in (0, 1)]
    whole = loader_of(20, 1).batch_at(0)
    np.testing.assert_array_equal(
        np.concatenate([half.tokens_BL for half in halves]), whole.tokens_BL
    )
    assert not np.array_equal(halves[0].tokens_BL, halves[1].tokens_BL)


def check_held(parts: list) -> None:
    whole = loader_of(20, 1).batch_at(0).tokens_BL.tolist()
    assert parts == [whole, whole]


def test_processes_along_the_tensor_axis_hold_the_same_rows(together):
    """Each process reads the whole batch.

    By its process number alone each would read another half and take it for the whole.
    """
    check_held(together[3]["rows"])
    with pytest.raises(AssertionError):
        check_held(together[3]["planted"])


@dataclass(frozen=True)
class Device:
    """A device, as much of it as a mesh reads."""

    id: int
    process_index: int


@pytest.mark.parametrize(
    ("data", "tensor", "of_each", "shares"),
    [
        (4, 1, 1, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (4, 2, 4, [(0, 2), (1, 2)]),
        (2, 4, 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (1, 4, 1, [(0, 1)] * 4),
    ],
)
def test_which_rows_a_process_reads(monkeypatch, data, tensor, of_each, shares):
    assert [
        shared(monkeypatch, data, tensor, of_each, process) for process in range(len(shares))
    ] == shares


def shared(monkeypatch, data: int, tensor: int, of_each: int, process: int) -> tuple[int, int]:
    """Returns a process's share on a mesh whose devices belong to processes in order."""
    devices = [Device(number, number // of_each) for number in range(data * tensor)]
    monkeypatch.setattr(jax, "process_index", lambda: process)
    return share_of_rows(make_mesh(MeshConfig(data=data, tensor=tensor), devices))


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_share_some_rows_only_are_refused(monkeypatch, process):
    with pytest.raises(
        UserError,
        match=r"mesh.tensor is 2, which splits a row over devices of several processes unevenly; "
        r"set it to a divisor",
    ):
        shared(monkeypatch, 3, 2, 3, process)


def test_what_two_processes_saved_goes_on_in_one(together, alone):
    """Another number of processes and devices: equal to 1e-6 of the largest weight.

    Sums are taken in another order.
    """
    config, *_ = together
    assert saved_steps(config)[-1] < 12
    _, expected, run = alone
    params = run(config)
    for name in expected:
        scale = np.abs(np.asarray(expected[name])).max()
        np.testing.assert_allclose(params[name], expected[name], atol=1e-6 * scale, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_what_one_process_saved_goes_on_in_more(frozen, tmp_path, count):
    """As above, the other way round: batches of six rows, two or three of them in each process."""
    whole = config_for(tmp_path / "whole", batch=6)
    expected = train_stage(whole, frozen, loader_of(20, 1, batch=6))
    config = config_for(tmp_path / "cut", batch=6)
    with pytest.raises(KeyboardInterrupt):
        train_stage(config, frozen, Breaking(loader_of(20, 1, batch=6), 8, interrupt))
    assert saved_steps(config)[-1] == 5
    run_in(count, config.train.folder, "6")
    assert saved_steps(config)[-1] == 12
    losses = [{line["step"]: line["loss"] for line in lines_of(of)} for of in (whole, config)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=2e-5)
    actual = train_stage(config, frozen, loader_of(20, 1, batch=6))  # nothing is left to do
    for name in expected:
        scale = np.abs(np.asarray(expected[name])).max()
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-6 * scale, err_msg=name)


@pytest.mark.slow
def test_processes_without_a_common_disk_go_on_where_they_stopped(frozen, tmp_path):
    """Each has a folder of its own for copies, and only the URL in common."""
    whole = config_for(tmp_path / "whole")
    train_stage(whole, frozen)
    url = f"shelf:/{tmp_path}/run"
    run_in(2, url, copies=tmp_path / "first")
    run = config_for(tmp_path / "run")
    stopped = saved_steps(run)[-1]
    assert ASKED_AT - 2 < stopped < 12
    run_in(2, url, "4", copies=tmp_path / "second")
    assert saved_steps(run)[-1] == 12
    losses = [{line["step"]: line["loss"] for line in lines_of(of)} for of in (whole, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=2e-5)

"""Several processes, one run: how they find each other."""

from argparse import ArgumentParser, Namespace

import jax
import pytest

from beagle_jax.errors import UsageError, UserError
from beagle_jax.processes import add_distributed, is_first, join

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS")


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed is asked for, given flags and variables; None when it is not asked at all."""

    def joined(*flags: str, **variables: str) -> dict | None:
        asked = []
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: asked.append(settings))
        made = ArgumentParser()
        add_distributed(made)
        join(made.parse_args(flags))
        return asked[0] if asked else None

    return joined


def test_a_lone_process_joins_nobody(joined):
    assert joined() is None
    assert joined(SLURM_NTASKS="8") is None  # a batch script's own shell
    assert joined(SLURM_NTASKS="1", SLURM_STEP_NODELIST="a1") is None
    assert is_first()


def test_clusters_and_flags_are_seen(joined):
    assert joined("--distributed") == {}
    assert joined(SLURM_NTASKS="8", SLURM_STEP_NODELIST="a[1-4]") == {}
    assert joined(JAX_COORDINATOR_ADDRESS="a1:1234", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1") == {"num_processes": 2, "process_id": 1}


def test_a_number_that_is_none_is_named(joined):
    with pytest.raises(UsageError, match="JAX_PROCESS_ID is 'one'; expected a number"):
        joined(JAX_COORDINATOR_ADDRESS="a1:1234", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="one")


def test_processes_that_do_not_find_each_other_say_what_to_set(joined, monkeypatch):
    def nobody(**settings):
        raise ValueError("coordinator_address should be defined.")

    joined()
    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    with pytest.raises(UserError, match="did not find each other .*coordinator_address.*JAX_PROCESS_ID=0, 1"):
        join(Namespace(distributed=True))

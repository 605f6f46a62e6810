"""States computed in the step and states from disk give the same losses and updates."""

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ONE_DEVICE, TINY, random_params
from step_cases import CLEAN, EARLY, LATE, SPEC, L

from beagle_jax.config import MeshConfig
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.states import target_states
from beagle_jax.data.target_forward import states_in_memory
from beagle_jax.data.template import Row
from beagle_jax.model.beagle import init_draft
from beagle_jax.sharding import make_mesh, place, place_rows
from beagle_jax.training import step
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.step import make_steps

# Losses here are near 60. Half a step of the grid of bfloat16 is 1/512 of each number, of int8
# 1/254 of a token's largest.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 2e-2}


TESTS = Path(__file__).parent


def some_rows() -> list[Row]:
    rng = np.random.default_rng(2)
    return [
        Row(rng.integers(0, TINY.vocab_size, n).tolist(), [i >= 3 for i in range(n)])
        for n in (14, 9, 6, 11)
    ]


@pytest.fixture(scope="module")
def loaders(tiny_params, tmp_path_factory):
    """One loader per way to get the states; None is online."""
    rows = some_rows()
    folder, settings = tmp_path_factory.mktemp("states"), dict(batch=4, row_tokens=L, seed=0)
    made = {None: BatchLoader(rows, None, **settings)}
    for dtype in TOLERANCE:
        made[dtype] = BatchLoader(
            rows, target_states(tiny_params, TINY, rows, folder / dtype, dtype), **settings
        )
    return made


steps_of = lru_cache(make_steps)


def whole(tiny_params) -> FrozenTarget:
    return FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"], tiny_params, TINY)


def stepped(loader, params, tiny_params, stage, mesh=ONE_DEVICE, steps_of=steps_of):
    """Returns metrics and parameters after one step."""
    train_step, _, init = steps_of(SPEC, CLEAN, stage, mesh)
    frozen = place(
        whole(tiny_params),
        mesh,
    )
    state, metrics = train_step(init(params), frozen, place_rows(loader.batch_at(0), mesh), 0)
    return jax.device_get(metrics), jax.device_get(state.params)


def check_same(online, disk, tolerance: float) -> None:
    for name in ("objective", "ploss", "vloss", "grad_norm"):
        np.testing.assert_allclose(
            getattr(online[0], name), getattr(disk[0], name), rtol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("stage", [EARLY, LATE], ids=["early", "late"])
def test_online_and_stored_states_give_the_same_losses(stage, loaders, tiny_draft, tiny_params):
    online = stepped(loaders[None], tiny_draft, tiny_params, stage)
    for dtype, tolerance in TOLERANCE.items():
        disk = stepped(loaders[dtype], tiny_draft, tiny_params, stage)
        check_same(online, disk, tolerance)
        if dtype == "float32":
            for name in online[
                1
                # 1e-4: AdamW's first step has the size of the learning rate, 1e-3, whatever the
                # gradient's
            ]:
                np.testing.assert_allclose(online[1][name], disk[1][name], atol=1e-4, err_msg=name)


def on_eight_devices() -> None:
    """Compares stored states with the target's forward, split over the step's mesh.

    The stored states are one device's.
    """
    params, draft, rows = random_params(TINY), init_draft(SPEC, jax.random.key(1)), some_rows()
    settings = dict(batch=4, row_tokens=L, seed=0)
    online = BatchLoader(rows, None, **settings)
    everything = next(online.samples(1, 4 * L))
    states = states_in_memory(params, TINY, everything.tokens_BL, everything.length_BC)
    by_tokens = {
        tuple(tokens[:length]): states_LD[:length]
        for tokens, length, states_LD in zip(
            everything.tokens_BL, everything.length_BC[:, 0], states, strict=True
        )
    }
    disk = BatchLoader(rows, [by_tokens[tuple(row.tokens)] for row in rows], **settings)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check_same(
        stepped(online, draft, params, EARLY, mesh),
        stepped(disk, draft, params, EARLY),
        TOLERANCE["float32"],
    )


def test_the_target_runs_on_the_mesh_of_the_step():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
    }
    command = [sys.executable, "-c", "from test_online import on_eight_devices; on_eight_devices()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_states_of_the_wrong_tokens_are_seen(loaders, tiny_draft, tiny_params, monkeypatch):
    disk = stepped(loaders["float32"], tiny_draft, tiny_params, EARLY)
    right = step.states_at
    monkeypatch.setattr(
        step,
        "states_at",
        lambda params, spec, tokens_BL, *rest: right(params, spec, tokens_BL ^ 1, *rest),
    )
    with pytest.raises(AssertionError):
        check_same(
            stepped(loaders[None], tiny_draft, tiny_params, EARLY, steps_of=make_steps),
            disk,
            TOLERANCE["int8"],
        )


def test_a_sample_in_memory_is_what_the_disk_holds(loaders, tiny_params):
    sample = next(loaders[None].samples(1, 4 * L))
    found_BLD = states_in_memory(tiny_params, TINY, sample.tokens_BL, sample.length_BC)
    live_BL1 = np.arange(L)[None, :, None] < sample.length_BC[:, :, None]
    # 1e-4: rows of another padded length are summed in another order
    np.testing.assert_allclose(
        np.where(live_BL1, found_BLD, 0),
        next(loaders["float32"].samples(1, 4 * L)).inputs_BLI,
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_target_is_computed_once_and_not_differentiated(loaders, tiny_draft, tiny_params):
    """The compiled step has the target's products once: no gradient flows through it."""
    train_step, _, init = steps_of(SPEC, CLEAN, EARLY, ONE_DEVICE)
    frozen = whole(tiny_params)
    text = train_step.lower(init(tiny_draft), frozen, loaders[None].batch_at(0), 0).as_text(
        debug_info=True
    )
    assert "target" in text and "transpose(target)" not in text and "jvp(target)" not in text

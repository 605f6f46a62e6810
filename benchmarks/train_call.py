"""A training step as a call that can be timed, and a batch for it. Needs no torch."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from beagle_jax.config import MeshConfig, StageConfig, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.kinds import fresh_params
from beagle_jax.sharding import make_mesh, place, place_rows
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.step import make_steps


def batch_of(rows: int, width: int, hidden: int, vocab: int, prompt: int | None = None) -> Batch:
    """Makes a batch of random tokens and states.

    The first `prompt` tokens (None: a third) are not supervised.
    """
    rng = np.random.default_rng(0)
    counts = np.zeros((rows, width), bool)
    counts[:, width // 3 if prompt is None else prompt : -1] = True
    states = rng.standard_normal((rows, width, hidden), dtype=np.float32)
    tokens = rng.integers(0, vocab, (rows, width), np.int32)
    return Batch(
        tokens, states, counts, np.full((rows, 1), width, np.int32), np.zeros((rows, 1), np.int32)
    )


def step_call(
    spec: BeagleSpec,
    batch: Batch,
    frozen: FrozenTarget,
    config: TrainConfig,
    stage: StageConfig,
) -> Callable[[], Any]:
    """Returns a call that runs one training step on the first device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step, _, init = make_steps(spec, config, stage, mesh)
    frozen, batch = place(frozen, mesh), place_rows(batch, mesh)
    state = init(fresh_params(spec, jax.random.key(0)))

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, frozen, batch, 0)
        return jax.block_until_ready(metrics)

    return run

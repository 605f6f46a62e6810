"""Short runs of a stage, loaders that fail at a step, and readers of what a run left."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from conftest import ONE_DEVICE, TINY

from beagle_jax.config import Config, EarlyStage, LogConfig, TargetConfig, TrainConfig
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.share import ALONE, Share
from beagle_jax.data.template import Row
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.training import loop
from beagle_jax.training.best import Best
from beagle_jax.training.checkpoint import Settings, StageCheckpoints
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.metrics import Log

SPEC = BeagleSpec.from_target(TINY)
L = 12


def config_for(folder, **changes) -> Config:
    stage = EarlyStage(steps=12, learning_rate=1e-2, warmup=2, window=3)
    # noise_scale: rows this short would get noise of width 9 at the default.
    settings = {
        "batch": 4,
        "row_tokens": L,
        "loss_rows": 16,
        "noise_scale": 0.002,
        "checkpoint_every": 5,
    }
    train = TrainConfig(folder=str(folder), **settings | {"early": stage} | changes)
    return Config(target=TargetConfig(source="tiny"), train=train, log=LogConfig(every=3))


def loader_of(count: int, seed: int, share: Share = ALONE, batch: int = 4) -> BatchLoader:
    """Makes a loader of rows that can be learned: states depend on the tokens."""
    rng = np.random.default_rng(seed)
    table_VD = (
        np.random.default_rng(0)
        .standard_normal((TINY.vocab_size, TINY.hidden_size))
        .astype(np.float32)
    )
    lengths = rng.integers(L - 4, L + 3, count)
    rows = [
        Row(rng.integers(0, TINY.vocab_size, n).tolist(), [position >= 2 for position in range(n)])
        for n in lengths
    ]
    return BatchLoader(
        rows, [table_VD[row.tokens] for row in rows], batch=batch, row_tokens=L, seed=1, share=share
    )


def train_stage(
    config: Config,
    frozen: FrozenTarget,
    training=None,
    *,
    stage: str = "early",
    params: dict | None = None,
    held_out=None,
    best: Best | None = None,
    start: int = 0,
) -> dict:
    """Runs a stage on one device and returns the draft's parameters.

    Without `params` every call begins with the same ones, without `training` it reads the same 20
    rows.
    """
    if params is None:
        params = init_draft(SPEC, jax.random.key(3))
    if training is None:
        training = loader_of(20, 1)
    log = Log(config)
    return loop.run_stage(
        stage, config, SPEC, params, frozen, ONE_DEVICE, training, held_out, log, best, start
    )


class Breaking:
    """A loader that fails at one step and records the requested steps."""

    def __init__(self, loader: BatchLoader, step: int | None = None, how=None):
        self._loader, self._step, self._how, self.requested = loader, step, how, []
        self.padding = loader.padding

    def batch_at(self, step: int):
        self.requested.append(step)
        self.steps_per_epoch = self._loader.steps_per_epoch
        batch = self._loader.batch_at(step)
        return self._how(batch) if step == self._step else batch


def interrupt(batch):
    raise KeyboardInterrupt


def infinite_state(batch):
    batch.inputs_BLI[0, 3] = np.inf
    return batch


def lines_of(config) -> list[dict]:
    with open(f"{config.train.folder}/log.jsonl", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def saved_steps(config) -> list[int]:
    with StageCheckpoints(
        f"{config.train.folder}/checkpoints/early", Settings({}, {})
    ) as checkpoints:
        return checkpoints.steps()


def same_params(actual, expected) -> None:
    """Compares parameters bit for bit."""
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def after_each_step(monkeypatch, change) -> None:
    """Lets `change(state, metrics)` decide what a training step returns."""

    def make_steps(*arguments, **keywords):
        train_step, eval_step, init = true_steps(*arguments, **keywords)
        return lambda *inputs: change(*train_step(*inputs)), eval_step, init

    true_steps = loop.make_steps
    monkeypatch.setattr(loop, "make_steps", make_steps)


def broken_at(step: int, value: float):
    """Makes a change that sets a parameter to `value` after a step, whatever the loss was."""

    def change(state, metrics):
        broken = {"q_proj": jnp.where(state.step == step, value, state.params["q_proj"])}
        return state._replace(params=state.params | broken), metrics

    return change

"""Training loop of a stage: reads batches, writes checkpoints and the log, shows progress."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from beagle_jax.config import Config, Identity, StageConfig
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.prefetch import read_ahead
from beagle_jax.model.draft import DraftSpec
from beagle_jax.processes import host_copy, is_first
from beagle_jax.remote import local, publish
from beagle_jax.sharding import place_rows
from beagle_jax.training.best import Best
from beagle_jax.training.checkpoint import Settings, StageCheckpoints, checkpoint_folder
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.metrics import Log
from beagle_jax.training.page import write_page
from beagle_jax.training.progress import Progress
from beagle_jax.training.rates import Rates
from beagle_jax.training.step import Metrics, TrainState, exported, make_steps
from beagle_jax.training.stop import StopSignal
from beagle_jax.training.trace import Trace

_log = logging.getLogger(__name__)

_INTERRUPTED = 130  # exit status after Ctrl-C


def run_stage(
    name: str,
    config: Config,
    spec: DraftSpec,
    params: dict[str, jax.Array],
    frozen: FrozenTarget,
    mesh: Mesh,
    training: BatchLoader,
    held_out: BatchLoader | None,
    log: Log,
    best: Best | None = None,
    start: int = 0,
) -> dict[str, jax.Array]:
    """Trains one stage from `params`, or from its newest checkpoint; returns the parameters.

    name: a key of `config.train.named_stages`. best: measures tau, may stop the stage early with
    its best parameters. start: batches that the stages before have read; this stage goes on
    after them, so that no row is read more often than another. On SIGTERM or Ctrl-C a checkpoint
    is saved and the program exits.

    Raises:
        UserError: the loss or a parameter is not finite. The last checkpoint is kept.
    """
    stage = config.train.named_stages[name]
    train_step, eval_step, init = make_steps(spec, config.train, stage, mesh)
    # Both signals are handled until the last write finishes.
    with StopSignal() as stop, _checkpoints(name, config) as checkpoints:
        state, waiting = _restored(checkpoints, init(params), name, stage)
        first = int(state.step)
        rates = Rates(name, config, spec, frozen, mesh, training.padding)
        progress = Progress(name, config, log, training, first, waiting, rates, start)
        measure = partial(_held_out, eval_step, frozen, held_out, mesh)
        results = _Results(name, config, checkpoints, progress, rates, best, measure)
        trace = Trace(config, name)
        stopping, finished = False, best is not None and best.exhausted(name, first)
        steps = () if finished else range(first, stage.steps)
        places = [start + step for step in steps]  # in the loader
        for step, batch in zip(steps, rates.fed(_placed(training, places, mesh)), strict=True):
            trace.before(step - first)
            state, metrics = train_step(state, frozen, batch, config.train.seed)
            trace.after(step - first, metrics)
            done = step + 1
            progress.took(done, metrics)
            stopping, looking = stop.requested(), best is not None and best.due(done, stage.steps)
            saving = stopping or done % config.train.checkpoint_every == 0 or done == stage.steps
            if not (saving or looking):
                continue
            progress.settle()
            checkpoints.check(state, done)  # once for everything that reads this state
            finished = (looking and results.look(done, state)) or done == stage.steps
            if saving or finished:
                results.save(done, state, measured=not stopping)
            if finished or stopping:
                break
        trace.close()
        progress.close()
    if stop.seen:  # the signal may have arrived after the last step
        _leave(name, int(state.step), by_hand=stop.by_hand)
    return exported(state) if best is None else best.weights(name, int(state.step), exported(state))


def _restored(
    checkpoints: StageCheckpoints, fresh: TrainState, name: str, stage: StageConfig
) -> tuple[TrainState, list]:
    """Returns the newest saved state and its unlogged metrics; without one, `fresh` and none."""
    state, waiting = checkpoints.restore(fresh) or (fresh, [])
    if first := int(state.step):
        _log.info(f"{name} stage: continues from step {first} of {stage.steps}")
    return state, waiting


def _leave(name: str, step: int, *, by_hand: bool) -> NoReturn:
    by = "Ctrl-C" if by_hand else "SIGTERM"
    _log.info(
        f"{name} stage: stopped by {by} after step {step}, which is saved; the same command "
        "continues from there"
    )
    raise SystemExit(_INTERRUPTED if by_hand else 0)


def steps_done(name: str, config: Config) -> int:
    """Returns how many batches a stage has read, as its newest checkpoint says; 0 without one."""
    if not checkpoint_folder(_folder(name, config)).exists():
        return 0
    with _checkpoints(name, config) as checkpoints:
        return max(checkpoints.steps(), default=0)


def check_settings(config: Config) -> None:
    """Checks that the checkpoints in `train.folder` were written with these settings.

    Call it before the expensive work of a run.

    Raises:
        UserError: a checkpoint was written with other settings.
    """
    for name in config.train.stages_to_run:
        if not config.train.accept_changes and checkpoint_folder(_folder(name, config)).exists():
            with _checkpoints(name, config) as checkpoints:
                checkpoints.newest()


def has_checkpoints(config: Config) -> bool:
    """Returns whether `train.folder` holds a checkpoint of any stage."""
    return any(checkpoint_folder(f"{config.train.folder}/checkpoints").glob("*/*"))


def _folder(name: str, config: Config) -> str:
    return f"{config.train.folder}/checkpoints/{name}"


def _checkpoints(name: str, config: Config) -> StageCheckpoints:
    return StageCheckpoints(
        _folder(name, config), settings_of(name, config), config.train.accept_changes
    )


def settings_of(name: str, config: Config) -> Settings:
    """Returns the settings that decide what a stage computes; later stages are not among them."""
    default = Config(target=config.target)
    return Settings(
        Identity.of(config, "stage", stage=name).values,
        Identity.of(default, "stage", stage=name).values,
    )


class _Results:
    """What a stage leaves on its way: checkpoints, held-out figures, the best draft."""

    def __init__(
        self,
        name: str,
        config: Config,
        checkpoints: StageCheckpoints,
        progress: Progress,
        rates: Rates,
        best: Best | None,
        measure: Callable[[TrainState], list[Metrics]],
    ) -> None:
        """measure: returns metrics of the held-out batches, none if no rows are held out."""
        self._name, self._config = name, config
        self._checkpoints, self._progress = checkpoints, progress
        self._rates, self._best, self._measure = rates, best, measure
        self._measured: tuple[int, dict[str, Any]] = (-1, {})

    def look(self, done: int, state: TrainState) -> bool:
        """Measures the draft and keeps the best; returns whether the stage ends early."""
        assert self._best is not None
        params = host_copy(exported(state))
        if self._best.by_loss:
            loss = self._held_out(done, state)["loss"]
            self._best.look(self._name, done, params, {"held_out_loss": loss})
        else:
            figures = self._best.look(self._name, done, params)
            self._progress.aside(done, "decoding", figures, f"tau {figures['tau']:.3f}")
        return self._best.exhausted(self._name, done)

    def save(self, done: int, state: TrainState, *, measured: bool) -> None:
        """Saves a checkpoint and draws the page; logs held-out figures if measured is true."""
        with self._rates.saving():
            self._checkpoints.save(state, done, self._progress.waiting)
        if measured:
            self._held_out(done, state)
        write_page(self._config)
        if is_first():
            publish(local(self._config.train.folder) / "log.jsonl")
        self._rates.restart()

    def _held_out(self, done: int, state: TrainState) -> dict[str, Any]:
        """Logs loss and agreement on the held-out rows, once for a step."""
        if self._measured[0] != done:
            metrics = self._measure(state)
            self._measured = done, self._progress.held_out(done, metrics) if metrics else {}
        return self._measured[1]


def _held_out(
    eval_step: Callable[..., Metrics],
    frozen: FrozenTarget,
    rows: BatchLoader | None,
    mesh: Mesh,
    state: TrainState,
) -> list[Metrics]:
    if rows is None:
        return []
    batches = _placed(rows, range(rows.steps_per_epoch), mesh)
    return [eval_step(exported(state), frozen, batch) for batch in batches]


def _placed(loader: BatchLoader, steps: Iterable[int], mesh: Mesh) -> Iterator[Any]:
    """Yields the batches of these steps on the devices; read in advance."""
    return read_ahead(loader.batch_at, steps, partial(place_rows, mesh=mesh))

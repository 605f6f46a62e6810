"""Checkpoints of one stage, written by orbax.

A checkpoint holds three items: `state`, the draft's parameters, optimizer state and step
(`step.TrainState`); `settings`, every setting that decides the stage; and `log`, the metrics of the
steps since the last log record, so that a resumed run writes the same records. It never holds the
frozen target. Orbax writes in the background under a temporary name and renames at the end, so a
killed run keeps its previous checkpoint. When a checkpoint is complete, the sizes of all its files
are recorded. They reveal a checkpoint that was truncated later (an interrupted copy, a damaged
disk).

Processes on a common disk, or on a store that orbax opens, write a checkpoint together. Under other
URLs they have no common folder: the first process collects the state, writes it to its local copy
and uploads it; on restart each process reads a copy of its own.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from beagle_jax.config import Identity
from beagle_jax.data.share import wait_for_all
from beagle_jax.errors import UserError
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json
from beagle_jax.processes import host_copy, is_first
from beagle_jax.remote import check_url, fetch, is_url, publish
from beagle_jax.training.step import TrainState

_KEPT = 2  # newest checkpoints kept per stage
_SIZES = "sizes.json"
_STORES = ("gs://",)  # orbax writes there itself; it takes s3:// for a relative path
# A failed write raises one UserError. Without this line orbax also logs a traceback per thread.
logging.getLogger("absl").setLevel(logging.CRITICAL)
_log = logging.getLogger(__name__)


class Settings(NamedTuple):
    """All settings that decide what a stage computes, as JSON values by dotted key."""

    now: Mapping[str, Any]
    default: Mapping[str, Any]  # values for keys that an older checkpoint does not have


class StageCheckpoints:
    """Checkpoints of one stage of one run.

    A context manager: its exit waits for the last write.
    """

    def __init__(
        self, folder: str | Path, settings: Settings, accept_changes: bool = False
    ) -> None:
        """Opens the folder of a stage.

        settings: those of this run. Checkpoints that were written with other settings are refused,
        or accepted with a warning if `accept_changes` is true.
        """
        self._folder = checkpoint_folder(folder)
        self._name = str(folder)  # a URL, or the folder
        self._settings, self._accept_changes = settings, accept_changes
        self._apart = _apart(self._name)
        if self._apart:
            self._folder.mkdir(parents=True, exist_ok=True)  # orbax does so only for all processes
            wait_for_all("every process has a copy of the checkpoints")
        self._manager = ocp.CheckpointManager(self._folder, options=_options(self._apart))
        self._saved = set(self._manager.all_steps())  # by this process or before it
        self._unsealed: int | None = None  # the step whose file sizes are not recorded yet

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._writing():
            self._manager.wait_until_finished()
            self._seal()
            self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, step: int, log: list[dict]) -> None:
        """Starts to write a checkpoint and returns before the write is complete.

        Does nothing if this step is already saved. log: metrics of the steps since the last log
        record (`progress.Progress.waiting`). Call `check` before: what is saved must be finite.

        Raises:
            UserError: this write or the previous one failed.
        """
        if step in self._saved:
            return
        self._saved.add(step)
        items = _items(state)
        if self._apart:
            items = host_copy(items)
        if is_first() or not self._apart:
            self._write(items, step, log)
        if self._apart:
            wait_for_all("a checkpoint is uploaded")

    def _write(self, items: dict[str, Any], step: int, log: list[dict]) -> None:
        with self._writing():
            self._manager.wait_until_finished()
            self._seal()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(items),
                    settings=ocp.args.JsonSave(dict(self._settings.now)),
                    log=ocp.args.JsonSave(log),
                ),
            )
        self._unsealed = step
        if is_url(self._name):  # a machine that is taken away keeps nothing
            with self._writing():
                self._manager.wait_until_finished()
                self._seal()

    def check(self, state: TrainState, step: int) -> None:
        """Raises UserError if a value of the state is not finite."""
        if not bool(_finite(state)):
            raise UserError(
                f"step {step}: a parameter or its optimizer state is not finite although the "
                f"loss was; this state is not saved, the last checkpoint ({self._last()}) is "
                "kept. Lower the stage's learning_rate"
            )

    def restore(self, fresh: TrainState) -> tuple[TrainState, list[dict]] | None:
        """Returns the newest complete state and its log; None if there is no checkpoint.

        fresh: a state that gives the structure and the shardings.

        Raises:
            UserError: the checkpoint was written with other settings, or cannot be read.
        """
        for left in sorted(self._folder.glob("*.orbax-checkpoint-tmp")):
            _log.warning(f"{left}: the writing of this checkpoint was interrupted; it is ignored")
        # `newest` compares the settings first: the state of another target may not even fit.
        step = self.newest()
        if step is None:
            return None
        like = _on_host if self._apart else ocp.utils.to_shape_dtype_struct
        items = {"state": ocp.args.StandardRestore(jax.tree.map(like, _items(fresh)))}
        if (self._folder / str(step) / "log").exists():  # older versions did not save a log
            items["log"] = ocp.args.JsonRestore()
        restored = self._read(step, **items)
        state = restored["state"]
        if self._apart:
            state = jax.tree.map(_placed, state, _items(fresh))
        return TrainState(**state), restored["log"] if "log" in items else []

    def newest(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None if there is none.

        Raises:
            UserError: the checkpoint was written with other settings.
        """
        step = self._newest_whole()
        if step is not None:
            self._compare(self._read(step, settings=ocp.args.JsonRestore())["settings"])
        return step

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        """Reads the named items of a checkpoint."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:  # invalid JSON raises ValueError too
            raise UserError(
                f"{self._folder}/{step}: this state does not fit the run, or is damaged "
                f"({error}); set another train.folder, or remove this checkpoint to continue "
                "from the one before it"
            ) from error

    def _newest_whole(self) -> int | None:
        whole = None
        for step in reversed(self.steps()):
            problem = self._cut_off(step)
            # No process may still look at a folder that the first one sets aside.
            wait_for_all("a checkpoint is checked")
            if problem is None:
                whole = step
                break
            aside = self._folder / f"cut-{step}"
            _log.warning(
                f"{self._folder}/{step}: this checkpoint is not complete ({problem}); "
                f"it is moved to {aside.name}, and the one before it is used"
            )
            if is_first():
                if aside.exists():  # an earlier truncated checkpoint of this step
                    aside.rmtree()
                (self._folder / str(step)).rename(aside)
        wait_for_all("checkpoints set aside")
        self._manager.reload()
        return whole

    def _cut_off(self, step: int) -> str | None:
        """Describes what is missing from a checkpoint; None if nothing is.

        Also None if the run was killed before the file sizes were recorded.
        """
        folder = self._folder / str(step)
        note = folder / _SIZES
        try:
            sizes = read_json(note, "") if note.exists() else {}
        except UserError as error:
            return str(error)
        if not sizes and is_url(self._name):
            return f"its {_SIZES} is missing, which is uploaded last"
        for name, size in sizes.items():
            stored = (folder / name).stat().length if (folder / name).exists() else 0
            if stored != size:
                return f"{name} has {stored} bytes of {size}"
        return None

    def _seal(self) -> None:
        """Records the sizes of a checkpoint's files, after it has been written."""
        folder = self._folder / str(self._unsealed)
        if self._unsealed is not None and is_first() and folder.exists():
            sizes = {str(file.relative_to(folder)): file.stat().length for file in _files(folder)}
            text = json.dumps(sizes)
            if is_url(folder):
                (folder / _SIZES).write_text(text)
            else:
                publish(Path(folder))
                write_text(Path(folder / _SIZES), text)
                publish(Path(self._folder))  # deletes the older ones
        self._unsealed = None

    def _compare(self, stored: Mapping[str, Any]) -> None:
        now, default = self._settings
        changed = Identity(now).diff(Identity.read(stored), default)
        listed = "; ".join(
            f"{key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items()
        )
        if not listed:
            return
        if not self._accept_changes:
            raise UserError(
                f"{self._folder} holds a run with other settings ({listed}); delete it, set "
                "another train.folder, or continue with the changes: train.accept_changes=true"
            )
        _log.warning(f"{self._folder} was made with other settings ({listed}); training continues")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore raises ValueError
            raise UserError(
                f"{self._folder}: a checkpoint could not be written ({error}); the last complete "
                f"one is {self._last()}. Free some space (python -m beagle_jax.plan shows how "
                "much is needed), then run again"
            ) from error

    def _last(self) -> str:
        steps = self.steps()
        return f"that of step {steps[-1]}" if steps else "none"


def _items(state: TrainState) -> dict[str, Any]:
    """Returns the state's parts by name; without an average there is no such part."""
    return {name: part for name, part in state._asdict().items() if part is not None}


def checkpoint_folder(name: str | Path) -> epath.Path:
    """Returns the folder in which orbax writes: itself, a store, or the copy of a URL.

    Raises:
        UserError: the URL cannot be read.
    """
    if is_url(name) and jax.process_count() > 1 and not _apart(str(name)):
        check_url(str(name))
        return epath.Path(str(name))
    return epath.Path(fetch(name).absolute())


def _apart(name: str) -> bool:
    """Whether there are several processes, and no common folder for what they write."""
    return jax.process_count() > 1 and is_url(name) and not name.startswith(_STORES)


def _options(apart: bool) -> ocp.CheckpointManagerOptions:
    """apart: each process has a manager of its own, which waits for no other."""
    if not apart:
        return ocp.CheckpointManagerOptions(max_to_keep=_KEPT)
    number = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=number, active_processes={number}, barrier_sync_key_prefix=f"process {number}"
    )
    return ocp.CheckpointManagerOptions(
        max_to_keep=_KEPT, create=False, multiprocessing_options=alone
    )


def _on_host(leaf: jax.Array) -> np.ndarray:
    """Returns an array for orbax to fill; its pages are not touched before."""
    return np.empty(leaf.shape, leaf.dtype)


def _placed(values: np.ndarray, like: jax.Array) -> jax.Array:
    """Distributes values that every process holds."""
    return jax.make_array_from_callback(values.shape, like.sharding, lambda index: values[index])


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields all files below a folder; epath has no rglob."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


@jax.jit
def _finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]))

"""Checkpoints of one stage through orbax: the draft's parameters, optimizer and step, never the frozen target."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from beagle_jax.errors import UserError
from beagle_jax.training.step import TrainState

_KEPT = 2  # newest checkpoints kept per stage


class StageCheckpoints:
    """The checkpoints of one stage of one run. A context manager: leaving it waits for the last write."""

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        """settings: what the run was made with; a folder written with other settings is refused."""
        self._folder = Path(folder).absolute()
        self._settings = settings
        self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=_KEPT))

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, state: TrainState, step: int) -> None:
        """Starts writing; returns before it is done. A step that is already saved is left alone."""
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), settings=ocp.args.JsonSave(self._settings))
        self._manager.save(step, args=items)

    def restore(self, fresh: TrainState) -> TrainState | None:
        """The newest state, or None when there is none. `fresh` gives structure and placement."""
        step = self._manager.latest_step()
        if step is None:
            return None
        # The settings first: the state of another target may not even fit.
        found = self._manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore()))["settings"]
        different = [key for key in self._settings if found.get(key) != self._settings[key]]
        if different:
            listed = "; ".join(f"{key}: {found.get(key)!r} there, {self._settings[key]!r} now" for key in different)
            raise UserError(f"{self._folder} holds a run with other settings ({listed}); delete it or set another train.folder")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh._asdict())
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return TrainState(**restored["state"])

"""Metric writers: log.jsonl always, TensorBoard and Weights & Biases on request."""

import json
import os
from pathlib import Path
from typing import Any

from beagle_jax.config import Config
from beagle_jax.errors import UserError
from beagle_jax.processes import is_first
from beagle_jax.remote import local, publish


class Log:
    """Writes metrics to every writer that section `log` of the config enables.

    Only the first process writes.
    """

    def __init__(self, config: Config) -> None:
        """Opens the writers.

        Raises:
            UserError: a package that `log` needs is not installed.
        """
        self._folder, self._writes = local(config.train.folder), is_first()
        self._path = self._folder / "log.jsonl"
        self._board = self._run = None
        if not self._writes:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        _end_with_a_line(self._path)
        if config.log.tensorboard:
            self._board = _tensorboard().SummaryWriter(str(self._folder / "tensorboard"))
        if config.log.wandb:
            self._run = _wandb(config).init(
                project=config.log.wandb, dir=str(self._folder), config=config.model_dump()
            )

    def write(self, line: dict[str, Any]) -> None:
        """Writes one record.

        line: "stage", "step", optionally "split", and metrics, each a number or a list of numbers.

        Raises:
            UserError: log.jsonl cannot be written.
        """
        if not self._writes:
            return
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(
                f"{self._path}: the log cannot be written ({error}); free some space, then run "
                "again"
            ) from error
        if self._board is not None:
            for name, value in _scalars(line):
                self._board.add_scalar(name, value, line["step"])
            self._board.flush()
        if self._run is not None:
            # Steps restart in each stage; wandb's own step counter may not decrease.
            self._run.log({f"{line['stage']}/step": line["step"], **dict(_scalars(line))})

    def publish(self) -> None:
        """Uploads the log if `train.folder` is a URL."""
        if self._writes and self._path.exists():
            publish(self._path)
            if self._board is not None:
                publish(self._folder / "tensorboard")

    def close(self) -> None:
        """Closes the optional writers."""
        self.publish()
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()


def _end_with_a_line(path: Path) -> None:
    """Removes an incomplete last line, which a killed run may leave in the log."""
    text = path.read_bytes() if path.exists() else b""
    if not text.endswith(b"\n") and text:
        os.truncate(path, text.rfind(b"\n") + 1)


def _scalars(line: dict[str, Any]) -> list[tuple[str, float]]:
    """Returns scalar metrics by name, "late/held_out/loss"; list items are numbered from 1."""
    prefix = "/".join(line[key] for key in ("stage", "split") if key in line)
    scalars = []
    for key, value in line.items():
        if isinstance(value, list):
            scalars += [(f"{prefix}/{key}_{number}", item) for number, item in enumerate(value, 1)]
        elif key not in ("stage", "split", "step"):
            scalars.append((f"{prefix}/{key}", value))
    return scalars


def check_writers(config: Config) -> None:
    """Checks that the packages that `log` needs are installed, before the work of a run.

    Raises:
        UserError: a package is not installed.
    """
    if config.log.tensorboard:
        _tensorboard()
    if config.log.wandb:
        _wandb(config)


def _tensorboard() -> Any:
    try:
        import tensorboardX
    except ImportError:
        raise UserError(
            "log.tensorboard is true, but tensorboardX is not installed: pip install "
            "'beagle-jax[log]', or set it to false; log.jsonl is written anyway"
        ) from None
    return tensorboardX


def _wandb(config: Config) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"log.wandb is {config.log.wandb!r}, but wandb is not installed: pip install "
            "'beagle-jax[log]', or set it to null; log.jsonl is written anyway"
        ) from None
    return wandb

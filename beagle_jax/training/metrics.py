"""Where the figures of a run go: log.jsonl always; TensorBoard and Weights & Biases when asked."""

import json
import os
from pathlib import Path
from typing import Any

from beagle_jax.config import Config
from beagle_jax.errors import UserError
from beagle_jax.processes import is_first


class Log:
    """One line of figures at a time, to every place that `log` of the config names. Only the first
    process writes.
    """

    def __init__(self, config: Config):
        """Raises UserError when a package that is asked for is not installed."""
        self._folder, self._writes = Path(config.train.folder), is_first()
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
                project=config.log.wandb, dir=config.train.folder, config=config.model_dump()
            )

    def write(self, line: dict[str, Any]) -> None:
        """line: "stage", "step", maybe "split", and figures: numbers or lists of numbers."""
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
            # Steps begin anew in each stage, which wandb's own counter would refuse.
            self._run.log({f"{line['stage']}/step": line["step"], **dict(_scalars(line))})

    def close(self) -> None:
        """Ends the optional writers."""
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()


def _end_with_a_line(path: Path) -> None:
    """A killed run may have left a part of a line, which the next line would continue: it is taken
    away.
    """
    text = path.read_bytes() if path.exists() else b""
    if not text.endswith(b"\n") and text:
        os.truncate(path, text.rfind(b"\n") + 1)


def _scalars(line: dict[str, Any]) -> list[tuple[str, float]]:
    """Figures by name, "late/held_out/loss"; those of a list are numbered from 1."""
    prefix = "/".join(line[key] for key in ("stage", "split") if key in line)
    found = []
    for key, value in line.items():
        if isinstance(value, list):
            found += [(f"{prefix}/{key}_{number}", one) for number, one in enumerate(value, 1)]
        elif key not in ("stage", "split", "step"):
            found.append((f"{prefix}/{key}", value))
    return found


def check_writers(config: Config) -> None:
    """Raises UserError when a package that `log` asks for is not installed: asked before the work
    that there would be to log.
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

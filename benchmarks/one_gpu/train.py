"""Trains the configured drafter on all text: python -m benchmarks.one_gpu.train OUT

Run by `__main__.py`, which sends SIGTERM when the time is over. Training then saves a checkpoint,
from which the next call continues, and exports its current state as the draft to evaluate. A run
belongs to its text: with other text files, training starts anew, in its own folder.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from beagle_jax.commands.train import (
    draft_vocabulary,
    given_draft,
    provenance,
    shuffled,
    train_draft,
    training_target,
)
from beagle_jax.config import Config, load_config
from beagle_jax.data.fingerprint import fingerprints
from beagle_jax.data.folder import read_parts
from beagle_jax.data.rows_file import Header, write_rows
from beagle_jax.data.template import Row
from beagle_jax.errors import UserError, run_main
from beagle_jax.model.kinds import fresh_params, spec_type
from beagle_jax.processes import host_copy
from beagle_jax.sharding import make_mesh
from beagle_jax.training.checkpoint import StageCheckpoints
from beagle_jax.training.loop import settings_of
from beagle_jax.training.step import make_steps
from beagle_jax.weights.draft import Draft, load_draft, save_draft
from beagle_jax.weights.target import Target
from benchmarks.one_gpu.parts import Settings, finish, read_settings
from benchmarks.one_gpu.text_files import rows_of, text_files

_ENDLESS = 10**12  # answer tokens; more than any text has


def config_of(out: Path, settings: Settings, digest: str) -> Config:
    """Returns the config of the run on the text of this digest.

    The training step computes the target's states.
    """
    folder = out / "work" / f"train-{digest[:12]}"
    ours = [f"data.folder={folder / 'data'}", f"train.folder={folder}", "data.states=online"]
    ours += [f"data.source={folder / 'text.rows'}", "data.answers=keep"]
    ours += [f"data.answer_tokens={_ENDLESS}", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1"]
    return load_config(settings.config, [*settings.overrides, *ours])


def digest_of(paths: Sequence[Path]) -> str:
    """Returns a SHA-256 of text files, in order."""
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def fill(config: Config, target: Target, paths: Sequence[Path]) -> None:
    """Writes the text to the file that training reads (`data.source`)."""
    path = Path(config.data.source)
    if path.exists():
        return
    made_for = {"target": config.target.source, **fingerprints(target.params, target.tokenizer)}
    sources = [{"name": path.name, "sha256": digest_of([path]), "revision": None} for path in paths]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        Row(text.prompt + text.answer, [False] * len(text.prompt) + [True] * len(text.answer))
        for text in rows_of(paths)
    ]
    write_rows(path, rows, Header(made_for, sources))


def newest_draft(config: Config, target: Target) -> tuple[Draft, str, int] | None:
    """Returns the draft of the newest checkpoint, with stage and step; None if there is none."""
    rows = [row for part in read_parts(config.data.folder).values() for row in part]
    rows, _ = shuffled(config.data.seed, rows, None)
    start = given_draft(config, target)
    kind = spec_type(config.draft.kind)
    spec = kind.from_target(target.spec, config.draft.init_std) if start is None else start.spec
    mesh = make_mesh(config.mesh)
    for stage in ("late", "early"):
        folder = Path(config.train.folder) / "checkpoints" / stage
        if not folder.exists():
            continue
        stage_config = config.train.named_stages[stage]
        init = make_steps(spec, config.train, stage_config, mesh)[2]
        fresh = init(fresh_params(spec, jax.random.key(0)))
        with StageCheckpoints(folder, settings_of(stage, config)) as checkpoints:
            restored = checkpoints.restore(fresh)
        if restored is not None:
            state, step = restored[0], int(restored[0].step)
            hot_ids = draft_vocabulary(config, rows, target.spec.vocab_size)
            made = provenance(config, rows, target.revision) | {"stopped": [stage, step]}
            return Draft(spec, host_copy(state.params), hot_ids, made), stage, step
    return None


def last_figures(folder: Path) -> dict[str, Any]:
    """Returns, by stage, the last log record with training figures."""
    path, last = folder / "log.jsonl", {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if "tokens_per_second" in line:
                last[line["stage"]] = line
    return last


def keep(out: Path, draft: Draft, target: Target) -> str:
    """Stores a draft as the draft of these results; returns its fingerprint."""
    fresh = out / "work" / "draft"
    shutil.rmtree(fresh, ignore_errors=True)
    save_draft(fresh, draft)
    shutil.rmtree(out / "draft", ignore_errors=True)
    fresh.rename(out / "draft")
    return load_draft(out / "draft", target.spec, type(draft.spec)).fingerprint


def run(out: Path) -> None:
    """Trains, or finishes an interrupted run."""
    settings = read_settings(out)
    paths = text_files(out, settings.text)
    if not paths:
        raise UserError(
            f"no text to train on: neither {settings.text} nor {out / 'text'} has part-*.npz "
            "files; give the phase `write` more time"
        )
    digest, clock = digest_of(paths), time.perf_counter()
    config = config_of(out, settings, digest)
    target = training_target(config)
    fill(config, target, paths)
    about = {"text_sha256": digest, "text_files": [path.name for path in paths]}
    folder = Path(config.train.folder)
    try:
        about |= train_draft(config, target)
        draft = load_draft(folder / "draft", target.spec, spec_type(config.draft.kind))
        about |= {"finished": True}
    except SystemExit:  # SIGTERM arrived; training has saved a checkpoint
        reached = newest_draft(config, target)
        if reached is None:
            raise
        draft, stage, step = reached
        about |= {"finished": False, "stopped_in": stage, "stopped_after": step}
    seconds = {"seconds": round(time.perf_counter() - clock, 1)}
    figures = {"last_figures": last_figures(folder), "fingerprint": keep(out, draft, target)}
    finish(out, "train", about | figures | seconds)


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    run(Path(argv[0]))


if __name__ == "__main__":
    sys.exit(run_main(main))

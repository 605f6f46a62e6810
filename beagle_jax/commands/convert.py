"""Drafts to PyTorch and back."""

import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beagle_jax.config import Config, TargetConfig
from beagle_jax.errors import UserError
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.draft import load_draft, save_draft
from beagle_jax.weights.target import open_source
from beagle_jax.weights.torch_export import check_parity, require_torch, write_torch_folder
from beagle_jax.weights.torch_import import read_torch_draft


def to_torch(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Writes the PyTorch folder; it appears only after torch computed from it what the JAX block computes."""
    require_torch()
    source = Path(config.draft.path or f"{config.train.folder}/draft").expanduser()
    out = _free(arguments, source)
    target = target_spec(config.target)
    draft = load_draft(source, target)
    with staged(out) as folder:
        write_torch_folder(folder, draft, target.vocab_size)
        found = check_parity(folder, draft, target.vocab_size)
    measured = ", ".join(f"{name} {value:.0e}" for name, value in found.items())
    text = (f"largest difference from the JAX block, of the scale: {measured}\n"
            f"draft written to {out}; load it with transformers.AutoModel.from_pretrained(FOLDER, trust_remote_code=True)")
    return text, {"out": str(out), "largest_difference": {name: float(value) for name, value in found.items()}}


def from_torch(config: Config, arguments: Namespace) -> tuple[str, dict]:
    """Writes the native folder, which is read back before it appears."""
    source = Path(arguments.source).expanduser()
    out = _free(arguments, source)
    target = target_spec(config.target)
    draft = read_torch_draft(source, target, config.target.source, arguments.allow_pickle)
    with staged(out) as folder:
        save_draft(folder, draft)
        load_draft(folder, target)
    return f'draft written to {out}; try: python -m beagle_jax.generate --config FILE "your prompt" draft.path={out}', {"out": str(out)}


def target_spec(config: TargetConfig) -> TargetSpec:
    """The target's shape; its weights are not read."""
    return TargetSpec.from_hf_config(open_source(config.source, Path(config.cache_dir).expanduser()).config(), config.source)


def _free(arguments: Namespace, source: Path) -> Path:
    """The output folder; raises UserError when it may not be written, or when replacing it would lose something else."""
    out = Path(arguments.out).expanduser()
    if not out.exists():
        return out
    if not out.is_dir():
        raise UserError(f"--out {out}: there is a file of this name; choose another folder")
    if not arguments.overwrite:
        raise UserError(f"--out {out}: this folder exists; choose another, or give --overwrite to replace it as a whole")
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--out {out}: the draft to convert is in this folder, and --overwrite would remove it; choose another")
    if any(out.iterdir()) and not (out / "config.json").is_file():
        raise UserError(f"--out {out}: this folder has no config.json, so it is no draft's and is not replaced; choose another")
    return out


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `out` at the end of the block; after an error nothing of it is left."""
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".partial-", dir=out.parent)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error}); choose another folder") from error
    with temporary as beside:
        # The same name as `out`: transformers names the module that it loads after the folder.
        folder = Path(beside, out.name)
        folder.mkdir()
        yield folder
        replaced = Path(beside, "replaced")
        if out.exists():
            os.replace(out, replaced)
        try:
            os.replace(folder, out)
        except OSError:
            if replaced.exists():
                os.replace(replaced, out)
            raise

"""Reads the drafts of others' formats for a target: what `load_draft` does with their folders."""

from pathlib import Path
from typing import Literal

from beagle_jax.errors import UserError
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.copies import TensorReader, tensor_reader
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.eagle_import import read_eagle_draft
from beagle_jax.weights.target import Target
from beagle_jax.weights.torch_import import read_torch_draft

_READERS = {"beagle": read_torch_draft, "eagle": read_eagle_draft}


def read_published(
    folder: Path,
    layout: Literal["beagle", "eagle"],
    target: Target | TargetSpec,
    kind: type[DraftSpec] | None = None,
    allow_pickle: bool = False,
) -> Draft:
    """Reads a folder in this format. See `load_draft` for target, kind and allow_pickle.

    Raises:
      UserError: the folder holds no draft for this target, or one of another kind.
    """
    spec, source = target, "unknown"
    read_target: TensorReader | None = None
    if isinstance(target, Target):
        spec, source = target.spec, target.source
        if target.opened is not None:
            read_target = tensor_reader(target.opened, target.spec)
    assert isinstance(spec, TargetSpec)
    draft = _READERS[layout](folder, spec, source, allow_pickle, read_target)
    if kind is not None and not isinstance(draft.spec, kind):
        raise UserError(
            f"{folder}: this is a draft of kind {draft.kind}, expected {kind.kind}; choose another "
            "folder, or set draft.kind"
        )
    return draft

"""Writes drafts in the forms that other servers load, and reads each back before it appears.

`eagle_export.py` and `eagle3_export.py` say what each server's loader asks for. What it cannot
express is refused with the reason: such loaders drop what they do not know without a word. The
folders hold no code, no pickle and no copy of the target's embedding or head.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.files import write_text
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.eagle3_export import eagle3_form
from beagle_jax.weights.eagle_export import eagle_form
from beagle_jax.weights.eagle_import import read_eagle_draft
from beagle_jax.weights.model_card import installed
from beagle_jax.weights.safetensors_file import write_tensors
from beagle_jax.weights.server_form import Form, Server

# kind -> its published form: every kind that is Served.BY_SERVERS (model/kinds.py)
_FORMS: dict[str, Callable[[Draft, TargetSpec, Server], Form]] = {
    "eagle": eagle_form,
    "eagle3": eagle3_form,
}
# Marks a folder as one of ours, and says where it comes from. No loader reads it.
RECORD = "beagle_jax.json"


def write_published(folder: Path, draft: Draft, target: TargetSpec, server: Server) -> None:
    """Fills an empty folder with a draft in a server's form, and reads it back.

    Raises:
      UserError: the server's loader cannot express the draft, or (a fault of the writer) the folder
        does not read back bit-equal.
    """
    if draft.kind not in _FORMS:
        raise UserError(
            f"a draft of kind {draft.kind!r} cannot be written for {server.title}, which knows "
            f"drafts of kind {' and '.join(_FORMS)}; convert to-torch writes it for transformers"
        )
    form = _FORMS[draft.kind](draft, target, server)
    write_tensors(folder / "model.safetensors", form.tensors)
    write_text(folder / "config.json", json.dumps(form.config, indent=1) + "\n")
    record = {
        "written_for": server.name,
        "kind": draft.kind,
        "provenance": draft.provenance,
        "versions": installed(()),
    }
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    _check_again(folder, draft, form, target, server)


def _check_again(
    folder: Path, draft: Draft, form: Form, target: TargetSpec, server: Server
) -> None:
    """Raises UserError unless our importer reads the folder back as the same draft."""
    again = read_eagle_draft(folder, target, str(draft.provenance.get("target")))
    expected = dict(form.params)
    differing = [
        name
        for name in expected.keys() | again.params.keys()
        if name not in expected
        or name not in again.params
        or not _equal(again.params[name], expected[name])
    ]
    if (form.hot_ids is None) != (again.hot_ids is None) or not _equal(
        () if form.hot_ids is None else form.hot_ids, () if again.hot_ids is None else again.hot_ids
    ):
        differing.append("the scored tokens")
    differing += [
        key
        for key, value in form.settings.items()
        if key not in ("init_std", "embed_scale") and getattr(again.spec, key) != value
    ]
    if differing:
        raise UserError(
            f"the draft that was written for {server.title} does not read back as it is "
            f"({', '.join(sorted(differing))}); nothing was written; this is a fault of the "
            "writer, please report it"
        )


def _equal(ours: Any, theirs: Any) -> bool:
    return np.array_equal(np.asarray(jnp.asarray(ours)), np.asarray(jnp.asarray(theirs)))

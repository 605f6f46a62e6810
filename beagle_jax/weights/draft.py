"""A trained draft on disk: model.safetensors (PyTorch names, [out, in]) and config.json (method.md
9.5).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.files import whole, write_text
from beagle_jax.json_file import read_json
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.kinds import KINDS
from beagle_jax.model.layers import RopeScaling
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.kinds import tensor_name
from beagle_jax.weights.safetensors_file import digest, read_tensors, write_tensors

# key of config.json: of the block's settings and tensors, so that no changed bit goes unnoticed
DIGEST = "sha256"
# int32 ids, most frequent first; absent when the draft scores the whole vocabulary
HOT_TOKENS = "hot_tokens"
_TRAIN_FIRST = "train a draft first (python -m beagle_jax.train) or set draft.path"


@dataclass(frozen=True)
class Draft:
    """A trained draft, ready to decode with."""

    spec: DraftSpec
    params: dict[str, jax.Array] = field(repr=False)
    hot_ids: jax.Array | None  # token ids that the draft scores; None: all
    provenance: dict[str, Any] = field(
        repr=False
    )  # target, data, stages: what config.json says of the training

    @property
    def kind(self) -> str:
        """The name of its kind, as config.json gives it."""
        return self.spec.kind

    @property
    def fingerprint(self) -> str:
        """A digest that changes with any weight and setting; a saved draft has it in its
        config.json.
        """
        return draft_digest(self.spec, file_tensors(self))


def save_draft(folder: str | Path, draft: Draft) -> None:
    """Writes the folder; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = file_tensors(draft)
    with whole(folder / "model.safetensors") as partial:
        write_tensors(partial, tensors)
    config = {
        "model_type": draft.spec.model_type,
        **settings(draft.spec),
        DIGEST: draft_digest(draft.spec, tensors),
        **draft.provenance,
    }
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")


def file_tensors(draft: Draft) -> dict[str, np.ndarray]:
    """Every tensor under its name in a file, which is PyTorch's; matrices are [out, in]."""
    # A transposed view would be written wrongly by safetensors, without an error.
    tensors = {
        tensor_name(draft.spec, name): np.ascontiguousarray(array)
        for name, array in draft.params.items()
    }
    if draft.hot_ids is not None:
        tensors[HOT_TOKENS] = np.ascontiguousarray(draft.hot_ids, np.int32)
    return tensors


def settings(spec: DraftSpec) -> dict[str, Any]:
    """What the files say of the block: all but the embedding's scale, which is the target's own.

    qkv_bias is there only when it is true: older files, and their digests, lack it.
    """
    return {
        key: value
        for key, value in asdict(spec).items()
        if key != "embed_scale" and (key, value) != ("qkv_bias", False)
    }


def draft_digest(spec: DraftSpec, tensors: dict[str, np.ndarray]) -> str:
    """What config.json says under DIGEST. tensors: as `file_tensors` names them."""
    return digest(tensors, json.dumps(settings(spec), sort_keys=True))


def load_draft(
    folder: str | Path, target: TargetSpec, kind: type[DraftSpec] | None = None
) -> Draft:
    """Reads a draft for this target, of the kind that its config.json says. kind: the only one that
    will do.

    Raises UserError naming the folder when a file or tensor is missing, extra or misshapen, or made
    for another target.
    """
    folder = Path(folder)
    weights_path = folder / "model.safetensors"
    config = read_json(folder / "config.json", _TRAIN_FIRST)
    spec = read_spec(config, target, folder, None if kind is None else (kind,))
    if not weights_path.exists():
        raise UserError(f"{weights_path}: no such file; {_TRAIN_FIRST}")
    tensors = dict(read_tensors(weights_path, integers=(HOT_TOKENS,)))
    hot_ids = tensors.get(HOT_TOKENS)
    params = _match(tensors, spec, weights_path)
    check_digest(config, spec, tensors, folder)
    if problem := hot_problem(hot_ids, target.vocab_size):
        raise UserError(f"{folder}: {problem}")
    provenance = {
        key: value
        for key, value in config.items()
        if key not in asdict(spec) and key not in ("model_type", DIGEST)
    }
    return Draft(spec, params, None if hot_ids is None else jnp.asarray(hot_ids), provenance)


def hot_problem(hot_ids: np.ndarray | None, vocab_size: int) -> str:
    """What is wrong with the ids of the tokens that a draft scores; empty if nothing is.

    An id that is there twice would take its probability from both: what is drawn by the ratio rule
    would no longer be distributed as the target says.
    """
    if hot_ids is None:
        return ""
    wrong = hot_ids[(hot_ids < 0) | (hot_ids >= vocab_size)]
    if wrong.size:
        return (
            f"this draft belongs to another target (it scores token {wrong[0]}, the vocabulary "
            f"ends at {vocab_size - 1})"
        )
    ids, counts = np.unique(hot_ids, return_counts=True)
    if (counts > 1).any():
        return (
            f"{HOT_TOKENS} holds token {ids[counts > 1][0]} more than once; each may be scored "
            "once only: train or export the draft again"
        )
    return ""


def check_there(folder: str | Path) -> None:
    """Raises UserError for a folder without a draft: asked before a target is loaded for it, which
    takes long.
    """
    read_json(Path(folder) / "config.json", _TRAIN_FIRST)


def other_target(draft: Draft, source: str) -> str | None:
    """The target that a draft says it was trained for, where it is another one than `source`, of
    the same shape.

    Folders and files may hold anything under any name: they are not compared.
    """
    told = str(draft.provenance.get("target"))
    (ours, _, our_revision), (theirs, _, their_revision) = (
        source.partition("@"),
        told.partition("@"),
    )
    public = all(name.startswith(("hf:", "pypi:")) for name in (ours, theirs))
    return (
        told
        if public
        and (ours != theirs or (our_revision and their_revision and our_revision != their_revision))
        else None
    )


def read_spec(
    config: dict[str, Any],
    target: TargetSpec,
    folder: Path,
    kinds: tuple[type[DraftSpec], ...] | None = None,
) -> DraftSpec:
    """The draft that a config.json describes. kinds: those that will do; None: all.

    Raises UserError unless it is of one of these kinds, for this target.
    """
    path, model_type = folder / "config.json", config.get("model_type")
    kinds = tuple(kind.spec for kind in KINDS.values()) if kinds is None else kinds
    kind = next((kind for kind in kinds if kind.model_type == model_type), None)
    if kind is None:
        raise UserError(
            f"{path}: model_type is {model_type!r}, expected "
            f"{' or '.join(repr(kind.model_type) for kind in kinds)}"
        )
    expected = kind.from_target(target)
    told = asdict(expected) | {
        key: config[key] for key in asdict(expected) if key in config and key != "embed_scale"
    }
    for key, value in asdict(expected).items():
        if isinstance(value, tuple) and isinstance(told[key], list):
            told[key] = tuple(told[key])  # JSON has no tuples
    if told.get("rope_scaling") is not None:
        told["rope_scaling"] = _scaling(told["rope_scaling"], path)
    wrong = [
        f"{key} {config.get(key)} there, {value} here"
        for key, value in asdict(expected).items()
        if key in kind.of_target and config.get(key) != value
    ]
    if wrong:
        raise UserError(f"{folder}: this draft belongs to another target ({'; '.join(wrong)})")
    for key, value in asdict(expected).items():
        if value is not None and type(told[key]) is not type(value):
            raise UserError(f"{path}: {key} is {told[key]!r}; expected a value like {value!r}")
    return kind(**told)


def _scaling(told: Any, path: Path) -> RopeScaling:
    if (
        not isinstance(told, list)
        or len(told) != len(RopeScaling._fields)
        or not all(type(value) in (int, float, type(None)) for value in told)
    ):
        raise UserError(
            f"{path}: rope_scaling is {told!r}; expected the numbers "
            f"{', '.join(RopeScaling._fields)}"
        )
    return RopeScaling(*told)


def check_digest(
    config: dict[str, Any], spec: DraftSpec, tensors: dict[str, np.ndarray], folder: Path
) -> None:
    """Raises UserError unless settings and tensors are those that config.json was written with."""
    if DIGEST not in config:
        raise UserError(
            f"{folder / 'config.json'}: lacks {DIGEST}; train or export the draft again"
        )
    if config[DIGEST] != (found := draft_digest(spec, tensors)):
        raise UserError(
            f"{folder}: settings and tensors are not those that config.json was written with "
            f"({DIGEST} {config[DIGEST]!r} there, {found} found); a file is damaged or of "
            "another draft; copy the folder again"
        )


def _match(tensors: dict[str, np.ndarray], spec: DraftSpec, where: Path) -> dict[str, jax.Array]:
    shapes = {tensor_name(spec, name): shape for name, shape in spec.param_shapes().items()}
    problems = [
        f"missing tensor {name} {list(shape)}"
        for name, shape in shapes.items()
        if name not in tensors
    ]
    problems += [
        f"extra tensor {name}" for name in tensors if name not in shapes and name != HOT_TOKENS
    ]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if HOT_TOKENS in tensors and (tensors[HOT_TOKENS].ndim != 1 or not tensors[HOT_TOKENS].size):
        problems.append(
            f"{HOT_TOKENS} has shape {list(tensors[HOT_TOKENS].shape)}, expected [count]"
        )
    if problems:
        raise UserError(f"{where}: not the weights of this draft:\n  " + "\n  ".join(problems))
    return {name: jnp.asarray(tensors[tensor_name(spec, name)]) for name in spec.param_shapes()}

"""Saves and loads trained drafts: model.safetensors and config.json (method.md 9.5).

Tensors have PyTorch's names and its [out, in] layout.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.arrays import AnyArray
from beagle_jax.config import TargetConfig
from beagle_jax.config.paths import home
from beagle_jax.errors import BadFile, UserError
from beagle_jax.files import whole, write_text
from beagle_jax.json_file import read_json
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.kinds import KINDS
from beagle_jax.model.layers import RopeScaling
from beagle_jax.model.target import TargetSpec
from beagle_jax.remote import local
from beagle_jax.weights.kinds import tensor_name
from beagle_jax.weights.safetensors_file import digest, read_tensors, write_tensors
from beagle_jax.weights.target import Target

# key of config.json: digest of the block's settings and tensors, which reveals damaged files
DIGEST = "sha256"
# int32 ids, most frequent first; absent when the draft scores the whole vocabulary
HOT_TOKENS = "hot_tokens"
CACHE_DIR: str = TargetConfig.model_fields["cache_dir"].default
_TRAIN_FIRST = "train a draft first (python -m beagle_jax.train) or set draft.path"


@dataclass(frozen=True)
class Draft:
    """A trained draft, ready to decode with."""

    spec: DraftSpec
    params: dict[str, jax.Array] = field(repr=False)
    hot_ids: AnyArray | None  # token ids that the draft scores; None: all
    provenance: dict[str, Any] = field(
        repr=False
    )  # the training's target, data and stages, as in config.json

    @property
    def kind(self) -> str:
        """Name of the draft's kind, as in config.json."""
        return self.spec.kind

    @property
    def taps(self) -> tuple[int, ...]:
        """Streams of the target that the draft reads (`DraftSpec.taps`)."""
        return self.spec.taps

    @property
    def owns_head(self) -> bool:
        """Whether the rows of the head are the draft's, and no longer the target's."""
        return self.spec.owns_head(self.params)

    @property
    def fingerprint(self) -> str:
        """Digest of all weights and settings; config.json of a saved draft holds it."""
        return draft_digest(self.spec, file_tensors(self))


def save_draft(folder: str | Path, draft: Draft) -> None:
    """Writes a draft to a folder; each file is replaced as a whole."""
    folder = local(home(str(folder)))
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
    """Returns every tensor under its name in the file; matrices are [out, in]."""
    # safetensors writes a transposed view wrongly, without an error.
    tensors = {
        tensor_name(draft.spec, name): np.ascontiguousarray(array)
        for name, array in draft.params.items()
    }
    if draft.hot_ids is not None:
        tensors[HOT_TOKENS] = np.ascontiguousarray(draft.hot_ids, np.int32)
    return tensors


def settings(spec: DraftSpec) -> dict[str, Any]:
    """Returns the draft's settings as the files store them.

    `embed_scale` is left out, because it is the target's own. `qkv_bias` and `state_layers` are
    stored only if they are set: older files lack them, and their digests were computed without.
    """
    return {
        key: value
        for key, value in asdict(spec).items()
        if key != "embed_scale" and (key, value) not in (("qkv_bias", False), ("state_layers", ()))
    }


def draft_digest(spec: DraftSpec, tensors: dict[str, np.ndarray]) -> str:
    """Computes the digest that config.json stores under DIGEST.

    tensors: with the names that `file_tensors` gives.
    """
    return digest(tensors, json.dumps(settings(spec), sort_keys=True))


@dataclass(frozen=True)
class DraftFiles:
    """The local files of a draft whose target is not known yet."""

    folder: Path
    allow_pickle: bool = False

    def read(self, target: Target | TargetSpec) -> Draft:
        """Reads the draft for this target. Raises what `load_draft` does."""
        return load_draft(self.folder, target, allow_pickle=self.allow_pickle)


@overload
def load_draft(
    source: str | Path,
    target: None = None,
    kind: None = None,
    *,
    cache_dir: str = ...,
    allow_pickle: bool = ...,
) -> DraftFiles: ...
@overload
def load_draft(
    source: str | Path,
    target: Target | TargetSpec,
    kind: type[DraftSpec] | None = ...,
    *,
    cache_dir: str = ...,
    allow_pickle: bool = ...,
) -> Draft: ...
def load_draft(
    source: str | Path,
    target: Target | TargetSpec | None = None,
    kind: type[DraftSpec] | None = None,
    *,
    cache_dir: str = CACHE_DIR,
    allow_pickle: bool = False,
) -> Draft | DraftFiles:
    """Loads a draft; config.json names its kind and format.

        draft = load_draft("hf:org/name")

    source: a folder, `hf:org/name[@revision]`, or the name of a draft that comes with the package.
    The formats are this library's, its PyTorch export, and those of published Beagle and EAGLE
    drafts. target: the target that it drafts for. None: the files are only found, or downloaded,
    and `SpeculativeDecoder` reads them for its target. Copies of the target's arrays in a published
    draft are compared with the files of a loaded `Target`. kind: the only kind to accept; None
    accepts all. cache_dir: folder for downloads. allow_pickle: reads pickled weights too, with
    PyTorch.

    Raises:
      UserError: a file or tensor is missing, extra or misshapen, the draft is of another kind, or
        it was made for another target. The message names the folder.
    """
    # Imported late: these modules import this one.
    from beagle_jax.weights.draft_source import draft_folder, published_format
    from beagle_jax.weights.published import read_published

    folder = draft_folder(source, cache_dir, allow_pickle=allow_pickle)
    config = read_json(folder / "config.json", _TRAIN_FIRST)
    if target is None:
        return DraftFiles(folder, allow_pickle)
    if layout := published_format(config):
        return read_published(folder, layout, target, kind, allow_pickle)
    return _native_draft(folder, config, _spec_of(target), kind)


def _spec_of(target: Target | TargetSpec) -> TargetSpec:
    return target if isinstance(target, TargetSpec) else target.spec


def _native_draft(
    folder: Path, config: dict[str, Any], target: TargetSpec, kind: type[DraftSpec] | None
) -> Draft:
    """Reads the draft of a folder in this library's format. Raises what `load_draft` does."""
    weights_path = folder / "model.safetensors"
    spec = read_spec(config, target, folder, None if kind is None else (kind,))
    if not weights_path.exists():
        raise UserError(f"{weights_path}: no such file; {_TRAIN_FIRST}")
    tensors = dict(read_tensors(weights_path, integers={HOT_TOKENS: ("I32",)}))
    hot_ids = tensors.get(HOT_TOKENS)
    params = _match(tensors, spec, weights_path)
    check_digest(config, spec, tensors, folder)
    rows = len(params["head_VD"]) if "head_VD" in params else None
    if problem := hot_problem(hot_ids, target.vocab_size, rows):
        raise UserError(f"{folder}: {problem}")
    provenance = {
        key: value
        for key, value in config.items()
        if key not in asdict(spec) and key not in ("model_type", DIGEST)
    }
    return Draft(spec, params, None if hot_ids is None else jnp.asarray(hot_ids), provenance)


def hot_problem(hot_ids: np.ndarray | None, vocab_size: int, rows: int | None = None) -> str:
    """Describes what is wrong with the scored token ids; returns "" if nothing is.

    A repeated id would take its probability from both entries. Tokens drawn by the ratio rule would
    then not follow the target's distribution.

    rows: of the draft's own head; None if it has none.
    """
    count = vocab_size if hot_ids is None else len(hot_ids)
    if rows not in (None, count):
        return (
            f"the draft's head has {rows} rows, and {count} tokens are scored "
            f"({HOT_TOKENS} or, without it, the vocabulary); a file is damaged or belongs to "
            "another draft"
        )
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


def check_there(source: str | Path, cache_dir: str = CACHE_DIR) -> None:
    """Checks that a draft is there, before a slow load of the target; one of the hub is downloaded.

    Raises:
      UserError: it cannot be found, or has no readable config.json.
    """
    load_draft(source, cache_dir=cache_dir)


def other_target(draft: Draft, source: str) -> str | None:
    """Returns the target that the draft was trained for, if `source` names a different one.

    Only `hf:` and `pypi:` sources are compared: a local folder or file can hold any model. Returns
    None if the two agree or cannot be compared.
    """
    trained_for = str(draft.provenance.get("target"))
    (ours, _, our_revision), (theirs, _, their_revision) = (
        source.partition("@"),
        trained_for.partition("@"),
    )
    public = all(name.startswith(("hf:", "pypi:")) for name in (ours, theirs))
    return (
        trained_for
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
    """Reads the draft's description from the contents of its config.json.

    kinds: the kinds to accept; None accepts all.

    Raises:
      UserError: the draft is of another kind, or was made for another target.
    """
    path, model_type = folder / "config.json", config.get("model_type")
    kinds = tuple(kind.spec for kind in KINDS.values()) if kinds is None else kinds
    kind = next((kind for kind in kinds if kind.model_type == model_type), None)
    if kind is None:
        raise BadFile(
            path,
            f"model_type is {model_type!r}, expected "
            f"{' or '.join(repr(kind.model_type) for kind in kinds)}",
        )
    expected = kind.from_target(target)
    values = asdict(expected) | {
        key: config[key] for key in asdict(expected) if key in config and key != "embed_scale"
    }
    for key, value in asdict(expected).items():
        if isinstance(value, tuple) and isinstance(values[key], list):
            values[key] = tuple(values[key])  # JSON has no tuples
    if values.get("rope_scaling") is not None:
        values["rope_scaling"] = _scaling(values["rope_scaling"], path)
    wrong = [
        f"{key} {config.get(key)} there, {value} here"
        for key, value in asdict(expected).items()
        if key in kind.of_target and config.get(key) != value
    ]
    if wrong:
        raise UserError(f"{folder}: this draft belongs to another target ({'; '.join(wrong)})")
    for key, value in asdict(expected).items():
        if value is not None and type(values[key]) is not type(value):
            raise BadFile(path, f"{key} is {values[key]!r}; expected a value like {value!r}")
    spec = kind(**values)
    if beyond := [tap for tap in spec.streams if not 0 <= tap <= target.num_layers]:
        raise UserError(
            f"{folder}: this draft belongs to another target (it reads the streams {beyond}, the "
            f"target has 0 to {target.num_layers})"
        )
    return spec


def _scaling(numbers: Any, path: Path) -> RopeScaling:
    if (
        not isinstance(numbers, list)
        or len(numbers) != len(RopeScaling._fields)
        or not all(type(value) in (int, float, type(None)) for value in numbers)
    ):
        raise BadFile(
            path,
            f"rope_scaling is {numbers!r}; expected the numbers {', '.join(RopeScaling._fields)}",
        )
    return RopeScaling(*numbers)


def check_digest(
    config: dict[str, Any], spec: DraftSpec, tensors: dict[str, np.ndarray], folder: Path
) -> None:
    """Checks that settings and tensors are those that config.json was written with.

    Raises:
      UserError: the digest is missing or differs.
    """
    if DIGEST not in config:
        raise UserError(
            f"{folder / 'config.json'}: lacks {DIGEST}; train or export the draft again"
        )
    if config[DIGEST] != (actual := draft_digest(spec, tensors)):
        raise UserError(
            f"{folder}: settings and tensors do not match the checksum in config.json "
            f"({DIGEST} {config[DIGEST]!r} there, {actual} found); a file is damaged or belongs "
            "to another draft; copy the folder again"
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

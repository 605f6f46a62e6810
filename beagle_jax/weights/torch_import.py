"""Imports a draft in PyTorch's form: our exported folder or a published checkpoint.

Published names are those of method.md 9.1. Tensors are identified by the end of their names, after
any single prefix. Every tensor of the file must be used: a missing, doubled, misshapen or unknown
one is an error, and so is a setting that this block cannot compute.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.kinds import KINDS, spec_type
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.copies import TensorReader, check_copies
from beagle_jax.weights.draft import (
    HOT_TOKENS,
    Draft,
    check_digest,
    hot_problem,
    read_spec,
    settings,
)
from beagle_jax.weights.kinds import kind_in_torch, tensor_name, torch_form
from beagle_jax.weights.rotary_table import check_tables
from beagle_jax.weights.torch_export import CONFIG_KEYS
from beagle_jax.weights.torch_files import Named, read_folder_config, read_weights, weight_files

_HALF = (np.dtype(np.float16), np.dtype(jnp.bfloat16))


def read_torch_draft(
    source: Path,
    target: TargetSpec,
    target_source: str,
    allow_pickle: bool = False,
    read_target: TensorReader | None = None,
) -> Draft:
    """Reads the draft in a folder or a weights file, for this target.

    read_target: reads the target's tensors, to compare copies in the files with them.

    Raises:
      UserError: a file cannot be read, is a pickle that is not allowed, does not hold exactly one
        draft block, or was made for another target. The message names the file.
    """
    files = weight_files(source, allow_pickle)
    config = read_folder_config(source)
    if config.get("model_type") in [kind.spec.model_type for kind in KINDS.values()]:
        raise UserError(f"{source}: already a draft of beagle_jax; set draft.path to it")
    kind = kind_in_torch(config.get("model_type"))
    published = BeagleSpec.from_target(target)
    spec = published if kind is None else _our_spec(kind, config, target, source)
    _check_config(config, spec, target.vocab_size, source)
    tensors = read_weights(files)
    if kind is None:
        draft = _published(published, tensors, target, source, config)
        draft = replace(draft, provenance={"target": target_source, **draft.provenance})
    else:
        draft = _ours(spec, tensors, target, source, config)
    own = [tensor_name(draft.spec, name) for name in draft.params]
    others = [pair for pair in tensors if not any(_ends(pair[0], end) for end in own)]
    check_copies(others, read_target, source)
    check_tables(others, draft.spec, source)
    return draft


def _ours(
    spec: DraftSpec, tensors: Named, target: TargetSpec, source: Path, config: dict[str, Any]
) -> Draft:
    """Reads a folder that `write_torch_folder` wrote."""
    hot_count = config.get("num_hot_tokens") or 0
    params, hot_ids = _match(tensors, spec, target.vocab_size, hot_count, source)
    check_digest(config, spec, dict(tensors), source)
    provenance = config.get("provenance")
    if not isinstance(provenance, dict):
        raise UserError(
            f"{source}: provenance in config.json is {provenance!r}, expected an object; "
            "export the draft again"
        )
    return Draft(spec, jax.tree.map(jnp.asarray, params), hot_ids, provenance)


def _published(
    spec: BeagleSpec, tensors: Named, target: TargetSpec, source: Path, config: dict[str, Any]
) -> Draft:
    """Reads a Beagle draft with published names.

    The files do not say whether queries are normed; the presence of the norm's weights does.
    """
    norm = tensor_name(spec, "input_layernorm")
    spec = replace(spec, input_norm=any(_ends(name, norm) for name, _ in tensors))
    hot_count = config.get("num_hot_tokens") or 0
    params, hot_ids = _match(tensors, spec, target.vocab_size, hot_count, source)
    # Drafts of this library are float32. Published half-precision values convert exactly.
    widened = {
        name: array.astype(np.float32) if array.dtype in _HALF else array
        for name, array in params.items()
    }
    provenance = {"imported_from": source.resolve().name}
    return Draft(spec, jax.tree.map(jnp.asarray, widened), hot_ids, provenance)


def _our_spec(kind: str, config: dict[str, Any], target: TargetSpec, where: Path) -> DraftSpec:
    """Builds the description from an exported folder's config, which has PyTorch's keys."""
    expected = spec_type(kind).from_target(target)
    values = {
        key: value if key in expected.of_target else config.get(CONFIG_KEYS[key])
        for key, value in asdict(expected).items()
        if key in settings(expected) or CONFIG_KEYS.get(key) in config
    }
    return read_spec({"model_type": expected.model_type, **values}, target, where)


def _check_config(config: dict[str, Any], spec: DraftSpec, vocab_size: int, where: Path) -> None:
    """Checks that the config describes this target and a block that can be computed.

    Raises:
      UserError: it does not.
    """
    rope = config.get("rope_parameters")
    values = {"rope_theta": rope.get("rope_theta") if isinstance(rope, dict) else None, **config}
    sizes = {
        CONFIG_KEYS[key]: value
        for key, value in settings(spec).items()
        if key not in ("init_std", "input_norm", "rope_scaling", "state_layers")
    }
    wrong = [
        f"{name} {values[name]} there, {value} here"
        for name, value in sizes.items()
        if values.get(name) is not None and values[name] != value
    ]
    if values.get("vocab_size") not in (None, vocab_size):
        wrong.append(f"vocab_size {values['vocab_size']} there, {vocab_size} here")
    if wrong:
        raise UserError(f"{where}: this draft belongs to another target ({'; '.join(wrong)})")
    if config.get("beagle_use_lower_layers"):
        raise UserError(
            f"{where}: beagle_use_lower_layers is {config['beagle_use_lower_layers']}: its "
            "queries are states of a lower layer, and those of this library's block are "
            "embeddings; it cannot be imported"
        )


def _match(
    tensors: Named, spec: DraftSpec, vocab_size: int, hot_count: int, where: Path
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Selects the block's tensors and the token ids that the draft scores.

    Raises:
      UserError: tensors do not fit. The message lists all of them.
    """
    shapes: dict[str, tuple[int, ...]] = {
        tensor_name(spec, name): shape for name, shape in spec.param_shapes().items()
    }
    matches_by_end = {
        end: [(name, array) for name, array in tensors if _ends(name, end)]
        for end in (*shapes, HOT_TOKENS)
    }
    problems, prefixes = [], set()
    for end, matches in matches_by_end.items():
        if len(matches) > 1:
            problems.append(
                f"{len(matches)} tensors match {end}: "
                f"{', '.join(name for name, _ in matches)}; expected one"
            )
        elif not matches and (end in shapes or hot_count):
            problems.append(f"missing tensor {end} {list(shapes.get(end, (hot_count,)))}")
        for name, array in matches:
            prefixes.add(name.removesuffix(end))
            problems += _misfits(name, array, shapes.get(end), hot_count, vocab_size)
    if len(prefixes) > 1:
        listed = ", ".join(map(repr, sorted(prefixes)))
        problems.append(
            f"the tensors have {len(prefixes)} different prefixes ({listed}); expected one"
        )
    matched = {name for matches in matches_by_end.values() for name, _ in matches}
    problems += [
        f"extra tensor {name} {list(array.shape)}: this block has no such part"
        for name, array in tensors
        if name not in matched and not _copied_from_target(name, prefixes)
    ]
    if problems:
        raise UserError(
            f"{where}: not the weights of one {torch_form(spec.kind).classes} block for this "
            "target:\n  " + "\n  ".join(problems)
        )
    params = {name: matches_by_end[tensor_name(spec, name)][0][1] for name in spec.param_shapes()}
    return params, matches_by_end[HOT_TOKENS][0][1] if matches_by_end[HOT_TOKENS] else None


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _misfits(
    name: str, array: np.ndarray, shape: tuple[int, ...] | None, hot_count: int, vocab_size: int
) -> list[str]:
    """Lists what is wrong with one tensor.

    shape: the expected shape of a weight; None: the tensor lists the tokens that the draft scores.
    """
    if shape is not None:
        wrong = (
            [f"{name} has shape {list(array.shape)}, expected {list(shape)}"]
            if array.shape != shape
            else []
        )
        if array.dtype not in (np.dtype(np.float32), *_HALF):
            wrong.append(f"{name} has dtype {array.dtype}, expected float32, float16 or bfloat16")
        return wrong
    if array.ndim != 1 or not array.size or hot_count not in (0, array.size):
        return [f"{name} has shape {list(array.shape)}, expected [{hot_count or 'count'}]"]
    if array.dtype != np.int32:
        return [f"{name} has dtype {array.dtype}, expected int32"]
    problem = hot_problem(array, vocab_size)
    return [f"{name}: {problem}"] if problem else []


def _copied_from_target(name: str, prefixes: set[str]) -> bool:
    """Returns whether a tensor is a copy of a frozen array of the target.

    Published files hold such copies; decoding uses the target's own arrays.
    """
    if any(
        _ends(name, end) for end in ("embed_tokens.weight", "lm_head.weight", "rotary_emb.inv_freq")
    ):
        return True
    # A norm outside the draft's own root is the target's final norm. Under that root it would be an
    # output norm of the draft, which this block does not have.
    roots = {prefix.partition("layers.")[0] for prefix in prefixes}
    return _ends(name, "norm.weight") and name.removesuffix("norm.weight") not in roots

"""Imports published EAGLE-3 drafts: SafeAILab's, SGLang's and speculators' folders (method.md 14).

What the readers of these folders compute differently is computed as the folder says, or refused by
the name of its setting. The vocabulary becomes `hot_tokens`: row v scores token v + d2t[v].
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.model.eagle3 import Eagle3Spec
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.copies import TensorReader
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.eagle3_config import SPECULATORS, Eagle3Config, read_eagle3_config
from beagle_jax.weights.kinds import tensor_name
from beagle_jax.weights.rotary_table import NAME, check_tables

Named = list[tuple[str, np.ndarray]]

_ONLY_EAGLE3 = ("midlayer.", "d2t", "t2d", "hidden_norm.", "layers.0.hidden_norm.")
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
_VOCABULARY = ("d2t", "t2d")
# SGLang's names of the norms over three streams, before it numbered them
_OLD_NORMS = ("aux_norm_low.", "aux_norm_mid.", "aux_norm_high.")

_log = logging.getLogger(__name__)


def is_eagle3(config: dict[str, Any], names: list[str]) -> bool:
    """Whether a published folder holds an EAGLE-3 draft, by its config and its tensors' names."""
    plain = [name.removeprefix("model.") for name in names]
    return config.get("speculators_model_type") == SPECULATORS or any(
        name.startswith(_ONLY_EAGLE3) for name in plain
    )


def eagle3_draft(
    source: Path,
    config: dict[str, Any],
    published: Named,
    target: TargetSpec,
    target_source: str,
    read_target: TensorReader | None,
) -> Draft:
    """Returns the draft of a folder's config and tensors, in float32.

    read_target: reads the target's tensors, to compare the draft's embedding with the target's. A
    draft keeps its embedding where it has other values, or where nothing can be compared.

    Raises:
      UserError: the folder holds something else than one EAGLE-3 draft for this target, or asks for
        something that its readers do not agree on. The message names the setting or the tensor.
    """
    tensors = _by_our_names(published, source)
    settings = read_eagle3_config(config, set(tensors), target, source)
    check_tables(published, settings.spec, source)
    spec, hot_ids = _vocabulary(settings, tensors, target, source)
    spec = _with_own_parts(spec, tensors, target, read_target, source)
    params = _matched(tensors, spec, source)
    if settings.reading:
        _log.warning("%s: %s", source, settings.reading)
    provenance = {"target": target_source, "imported_from": source.resolve().name}
    provenance |= {"reading": settings.reading} if settings.reading else {}
    return Draft(
        spec,
        {name: jnp.asarray(array, jnp.float32) for name, array in params.items()},
        None if hot_ids is None else jnp.asarray(hot_ids),
        provenance,
    )


def _by_our_names(published: Named, source: Path) -> dict[str, np.ndarray]:
    """Returns the tensors by their names in a native folder; streams' norms become one.

    Raises:
      UserError: two tensors have the same name, or norms of streams are missing between others.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, array in published:
        ours = name.removeprefix("model.")
        for prefix in ("midlayer.", "layers.0."):
            ours = ours.removeprefix(prefix)
        for number, old in enumerate(_OLD_NORMS):
            ours = ours.replace(old, f"fc_norm.{number}.")
        if ours in tensors:
            raise UserError(f"{source}: {name} stands there twice, under two names")
        if not NAME.fullmatch(ours):
            tensors[ours] = array
    norms = sorted(name for name in tensors if name.startswith("fc_norm."))
    if norms:
        order = [f"fc_norm.{number}.weight" for number in range(len(norms))]
        if norms != sorted(order):
            raise UserError(f"{source}: holds {', '.join(norms)}; expected {', '.join(order)}")
        tensors["fc_norm.weight"] = np.concatenate([tensors.pop(name) for name in order])
    return tensors


class _Vocabulary(NamedTuple):
    spec: Eagle3Spec
    hot_ids: np.ndarray | None


def _vocabulary(
    settings: Eagle3Config, tensors: dict[str, np.ndarray], target: TargetSpec, source: Path
) -> _Vocabulary:
    """Returns the description with its number of scored tokens, and their ids; removes the maps.

    Raises:
      UserError: the maps contradict each other, the config or the target.
    """
    V = target.vocab_size
    offset_V, scored_V = (tensors.pop(name, None) for name in _VOCABULARY)
    rows = len(tensors[_HEAD]) if _HEAD in tensors else V
    count = rows if settings.draft_vocab_size is None else settings.draft_vocab_size
    spec = settings.spec.scoring(count)
    if count == V and scored_V is not None and not scored_V.all():
        raise UserError(
            f"{source}: t2d says that the draft scores {int(scored_V.sum())} tokens, and config "
            f"and weights that it scores all {V}; one is damaged"
        )
    if count == V:
        # SafeAILab's reader ignores d2t then, SGLang's applies it.
        if offset_V is not None and offset_V.any():
            raise UserError(
                f"{source}: d2t maps tokens, though the draft scores all {V} of them; its readers "
                "do not agree on what that means"
            )
        return _Vocabulary(spec, None)
    if offset_V is None or offset_V.shape != (count,):
        there = "lacks d2t" if offset_V is None else f"has d2t of shape {list(offset_V.shape)}"
        raise UserError(
            f"{source}: {there}, expected [{count}]: it says which of the target's {V} tokens the "
            f"draft scores (draft_vocab_size {count})"
        )
    ids_V = np.arange(count) + offset_V
    wrong = ids_V[(ids_V < 0) | (ids_V >= V)]
    if wrong.size or len(np.unique(ids_V)) < count:
        problem = f"names token {wrong[0]}" if wrong.size else "names a token twice"
        raise UserError(f"{source}: d2t {problem}; the target's vocabulary has {V} tokens")
    if scored_V is not None and not np.array_equal(np.flatnonzero(scored_V), np.sort(ids_V)):
        raise UserError(f"{source}: d2t and t2d do not name the same tokens; one is damaged")
    return _Vocabulary(spec, ids_V.astype(np.int32))


def _with_own_parts(
    spec: Eagle3Spec,
    tensors: dict[str, np.ndarray],
    target: TargetSpec,
    read_target: TensorReader | None,
    source: Path,
) -> Eagle3Spec:
    """Returns the description with an embedding and a head of its own, where it has them.

    A copy of the target's embedding is removed from the tensors.

    Raises:
      UserError: the draft's width differs from the target's, and it lacks one of them.
    """
    parts = {"own_head": _HEAD in tensors, "own_embedding": _EMBEDDING in tensors}
    if spec.hidden_size != target.hidden_size and not all(parts.values()):
        lacking = _EMBEDDING if parts["own_head"] else _HEAD
        raise UserError(
            f"{source}: lacks {lacking}, and the target's does not fit: the draft is "
            f"{spec.hidden_size} wide, the target {target.hidden_size}"
        )
    if parts["own_embedding"] and _is_copy(tensors[_EMBEDDING], read_target):
        del tensors[_EMBEDDING]
        parts["own_embedding"] = False
    return spec.owning(**parts)


def _is_copy(array_VD: np.ndarray, read_target: TensorReader | None) -> bool:
    """Whether a draft's embedding is the target's, in the dtype that it is stored in."""
    if read_target is None:
        return False
    target_VD = read_target("model.embed_tokens.weight")
    return target_VD.shape == array_VD.shape and np.array_equal(
        target_VD.astype(array_VD.dtype), array_VD
    )


def _matched(
    tensors: dict[str, np.ndarray], spec: Eagle3Spec, source: Path
) -> dict[str, np.ndarray]:
    """Returns the tensors by parameter.

    Raises:
      UserError: one is missing, extra or misshapen.
    """
    shapes = {tensor_name(spec, name): shape for name, shape in spec.param_shapes().items()}
    problems = [f"missing tensor {name} {list(shapes[name])}" for name in shapes.keys() - tensors]
    problems += [
        f"extra tensor {name} {list(tensors[name].shape)}: the draft that config.json describes "
        "has no such part"
        for name in tensors.keys() - shapes
    ]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise UserError(
            f"{source}: not the weights of one EAGLE-3 draft for this target:\n  "
            + "\n  ".join(sorted(problems))
        )
    return {name: tensors[tensor_name(spec, name)] for name in spec.param_shapes()}

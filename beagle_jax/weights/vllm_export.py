"""Writes a Beagle draft as a folder that vLLM serves, with the plugin that computes it.

vLLM has no Beagle drafts of its own. Its EAGLE proposer hands a draft what Beagle reads, so the
plugin (`vllm_plugin/`) is a model class for that proposer. An environment needs vLLM and the
plugin, neither jax nor this library.
"""

import json
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, cast

import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.files import write_text
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.kinds import KINDS, Served
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.draft import HOT_TOKENS, Draft, file_tensors
from beagle_jax.weights.model_card import installed
from beagle_jax.weights.safetensors_file import read_tensors, write_tensors
from beagle_jax.weights.server_files import RECORD
from beagle_jax.weights.server_form import VLLM, Server, layer_config, refuse, uneven_heads

ARCHITECTURE = "BeagleForCausalLM"  # the plugin registers it
PLUGIN = "plugin"  # its folder beside the weights


def write_vllm_folder(folder: Path, draft: Draft, target: TargetSpec) -> None:
    """Fills an empty folder with weights, config, plugin and README.

    The weights are those of a native folder. The list of scored tokens is left out, because vLLM
    scores all of them.

    Raises:
      UserError: vLLM cannot compute the draft, or (a fault of the writer) the weights do not read
        back bit-equal.
    """
    served = KINDS[draft.kind].served
    if served is Served.BY_SERVERS:
        raise UserError(
            f"a draft of kind {draft.kind!r} needs no plugin in vLLM, which computes such drafts "
            "itself; convert to-eagle --for vllm writes it"
        )
    if served is not Served.BY_PLUGIN:
        raise UserError(
            f"a draft of kind {draft.kind!r} cannot be served by vLLM: neither its own classes nor "
            "the plugin compute it; generate and serve of this library decode with it"
        )
    spec = cast(BeagleSpec, draft.spec)
    refuse(Server("vllm"), [_several_states(spec), uneven_heads(spec)])
    tensors = {name: array for name, array in file_tensors(draft).items() if name != HOT_TOKENS}
    write_tensors(folder / "model.safetensors", tensors)
    again = dict(read_tensors(folder / "model.safetensors"))
    if again.keys() != tensors.keys() or not all(
        np.array_equal(again[name], array) for name, array in tensors.items()
    ):
        raise UserError(
            "the weights that were written for vLLM do not read back as they are; nothing was "
            "written; this is a fault of the writer, please report it"
        )
    write_text(folder / "config.json", _json(vllm_config(spec, target)))
    record = {
        "written_for": "vllm",
        "tried_with": VLLM,
        "kind": draft.kind,
        "scored_tokens_in_training": target.vocab_size
        if draft.hot_ids is None
        else len(draft.hot_ids),
        "provenance": draft.provenance,
        "versions": installed(()),
    }
    write_text(folder / RECORD, _json(record))
    for name, text in plugin_files():
        path = folder / PLUGIN / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    write_text(folder / "README.md", _README.format(target=draft.provenance.get("target")))


def vllm_config(spec: BeagleSpec, target: TargetSpec) -> dict[str, Any]:
    """Returns config.json: a Llama config of one layer, and what the plugin reads beside it."""
    return {
        **layer_config(spec, target),
        "architectures": [ARCHITECTURE],
        "input_norm": spec.input_norm,
        "embed_scale": spec.embed_scale,
    }


def plugin_files() -> Iterator[tuple[str, str]]:
    """Yields path and text of each file of the plugin, a Python package of its own."""
    yield from _texts(files("beagle_jax.weights") / "vllm_plugin", "")


def _texts(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir() and item.name != "__pycache__":
            yield from _texts(item, f"{prefix}{item.name}/")
        elif item.name.endswith((".py", ".toml")):
            yield prefix + item.name, item.read_text(encoding="utf-8")


def _several_states(spec: BeagleSpec) -> str:
    if not spec.state_layers:
        return ""
    return (
        f"it reads the streams that enter the layers {list(spec.state_layers)} of the target "
        "(draft.state_layers), and vLLM's EAGLE proposer hands a draft the last state alone; train "
        "one without draft.state_layers"
    )


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


_README = f"""\
# A Beagle draft for `{{target}}`, to be served by vLLM

Install the plugin once into the environment of vLLM, then name this folder as the draft:

```bash
pip install ./{PLUGIN}
vllm serve TARGET --speculative-config \\
  '{{{{"method": "eagle", "model": "THIS_FOLDER", "num_speculative_tokens": 2}}}}'
```

TARGET is the model that the draft was trained for. The draft uses its embedding and head, and
scores all tokens. The plugin needs neither jax nor beagle_jax; it was tried with {VLLM}.
`beagle_jax.json` says how the draft was trained.
"""

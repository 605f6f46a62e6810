"""Saves and loads a target as an orbax checkpoint.

The folder holds one file of settings, the tokenizer, and the parameter tree in this library's
layout. `convert to-jax` writes it once, from any source. Loading it then renames, transposes and
dequantises nothing, and each process reads only the parts of each array that its devices hold, so
that a pod starts fast.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from beagle_jax.errors import UserError
from beagle_jax.json_file import read_json
from beagle_jax.model.joined import separated
from beagle_jax.model.target import Params, TargetSpec
from beagle_jax.model.tensors import tensors
from beagle_jax.sharding import target_sharding
from beagle_jax.weights.hf import HFTokenizer

SETTINGS = "target.json"  # its presence identifies such a folder
_KIND = "beagle_target"
_ARRAYS = "arrays"


class OrbaxFolder(HFTokenizer):
    """A folder written by `save_target`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.settings = read_json(path / SETTINGS, "convert to-jax writes it")
        if self.settings.get("model_type") != _KIND or not isinstance(
            self.settings.get("crc32"), dict
        ):
            raise UserError(
                f"{path / SETTINGS}: model_type is {self.settings.get('model_type')!r}, "
                f"expected {_KIND!r} with checksums; write the folder with convert to-jax"
            )

    def params(
        self, spec: TargetSpec, dtype: jnp.dtype, mesh: Mesh | None = None
    ) -> dict[str, Any]:
        """Loads the parameter tree onto the mesh, or onto one device without a mesh.

        Each process reads only the parts that its devices hold.

        Raises:
          UserError: the arrays are not this target's, or they are stored in neither this dtype
            nor float32.
        """
        stored = self.settings.get("dtype")
        if stored != jnp.dtype(dtype).name and stored != "float32":
            raise UserError(
                f"{self.path}: its arrays are {stored}, and target.dtype is "
                f"{jnp.dtype(dtype).name}; set target.dtype={stored}, or convert again with "
                "this dtype"
            )
        wanted = abstract_params(spec, jnp.dtype(stored), mesh)
        total = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(wanted))
        try:
            with (
                ocp.StandardCheckpointer() as checkpointer,
                tqdm(
                    total=total, desc="loading target", unit="B", unit_scale=True, leave=False
                ) as bar,
            ):
                self._check_shapes(checkpointer, wanted)
                params = checkpointer.restore((self.path / _ARRAYS).absolute(), wanted)
                bar.update(total)  # orbax reads all arrays in one call and reports no progress
        except Exception as error:
            # tensorstore raises bare Exceptions for some damaged files.
            if type(error) is not Exception and not isinstance(
                error, OSError | ValueError | KeyError
            ):
                raise
            raise UserError(
                f"{self.path / _ARRAYS}: cannot be restored ({error}); write the folder again "
                "with convert to-jax"
            ) from error
        self._check_bytes(params)
        return jax.tree.map(lambda array: array.astype(dtype), params)

    def _check_shapes(self, checkpointer: ocp.StandardCheckpointer, wanted: Params) -> None:
        metadata = checkpointer.metadata((self.path / _ARRAYS).absolute()).item_metadata
        if metadata is None:
            raise UserError(
                f"{self.path / _ARRAYS}: no readable orbax checkpoint; write the folder again "
                "with convert to-jax"
            )
        held = _by_name(metadata.tree)
        expected = _by_name(wanted)
        problems = [f"missing array {name}" for name in expected if name not in held]
        problems += [f"extra array {name}" for name in held if name not in expected]
        problems += [
            f"{name} is {held[name].dtype} {list(held[name].shape)}, expected {array.dtype} "
            f"{list(array.shape)}"
            for name, array in expected.items()
            if name in held and (held[name].shape, held[name].dtype) != (array.shape, array.dtype)
        ]
        if problems:
            raise UserError(
                f"{self.path}: its arrays do not fit its config:\n  " + "\n  ".join(problems)
            )

    def _check_bytes(self, params: Params) -> None:
        """Checks the arrays that this process holds whole against their checksums."""
        wrong = [
            name
            for name, array in _by_name(params).items()
            if array.is_fully_addressable and self.settings["crc32"].get(name) != _checksum(array)
        ]
        if wrong:
            raise UserError(
                f"{self.path}: {', '.join(wrong)} changed since they were written; write the "
                "folder again with convert to-jax"
            )


def save_target(
    folder: Path,
    params: Params,
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: tuple[int, ...],
    origin: dict[str, Any],
) -> None:
    """Writes a target to an empty folder.

    params: sharded over the mesh that the parts on disk follow. origin: its dtype, source and
    revision.

    Raises:
      UserError: the folder cannot be written.
    """
    params = separated(params)
    settings = {
        "model_type": _KIND,
        **origin,
        "crc32": {name: _checksum(array) for name, array in _by_name(params).items()},
    }
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": list(eos_ids)},
        SETTINGS: settings,
    }
    try:
        tokenizer.save_pretrained(folder)
        for name, held in files.items():
            (folder / name).write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / _ARRAYS).absolute(), params)
    except Exception as error:
        # On a full disk, tokenizers raises a bare Exception and tensorstore a ValueError.
        if type(error) is not Exception and not isinstance(error, OSError | ValueError):
            raise
        raise UserError(
            f"{folder}: cannot be written ({error}); free some space or choose another folder, "
            "then run again"
        ) from error


def abstract_params(spec: TargetSpec, dtype: jnp.dtype, mesh: Mesh | None) -> dict[str, Any]:
    """Returns shape, dtype and sharding of every array."""
    tree: dict[str, Any] = {"layers": [{} for _ in range(spec.num_layers)]}
    for tensor in tensors(spec):
        node: Any = tree
        for key in tensor.path[:-1]:
            node = node[key]
        node[tensor.path[-1]] = jax.ShapeDtypeStruct(
            tensor.shape, dtype, sharding=target_sharding(tensor, mesh)
        )
    return tree


def _by_name(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _checksum(array: jax.Array) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

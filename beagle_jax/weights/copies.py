"""Copies of the target's arrays that a published draft brings along.

Decoding takes these arrays from the target itself, so a copy with other values is a part of the
draft that would be lost.
"""

from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np

from beagle_jax.errors import UserError
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.orbax_target import OrbaxFolder
from beagle_jax.weights.target import Source

# Reads one tensor of the target, by its Hugging Face name, in float32.
TensorReader = Callable[[str], np.ndarray]

# end of a copy's name -> the target's tensor
_ORIGINALS = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
}


def tensor_reader(opened: Source, spec: TargetSpec) -> TensorReader:
    """Reads single tensors of a target. A tied head is the embedding."""

    def read(name: str) -> np.ndarray:
        if name == "lm_head.weight" and spec.tie_embeddings:
            name = "model.embed_tokens.weight"
        if isinstance(opened, OrbaxFolder):
            params = opened.params(spec, jnp.dtype(opened.settings["dtype"]))
            keys = {"model.embed_tokens.weight": "embed_VD", "lm_head.weight": "head_VD"}
            return np.asarray(params[keys.get(name, "norm_D")], np.float32)
        shape = dict(opened.shapes())[name]
        return opened.read(name, tuple(map(slice, shape)), np.dtype(np.float32))

    return read


def check_copies(
    copies: Iterable[tuple[str, np.ndarray]], read: TensorReader | None, where: object
) -> None:
    """Raises UserError for a copy of the target's embedding, head or final norm of other values.

    Values are compared in the dtype of the copy, as a draft may be published in less precision.
    read: None if the target is not at hand; then any copy is refused.
    """
    for name, array in copies:
        original = next(
            (to for end, to in _ORIGINALS.items() if f".{name}".endswith(f".{end}")), None
        )
        if original is None:
            continue
        if read is None:
            raise UserError(f"{where}: {name} cannot be compared with the target's {original}")
        if not np.array_equal(read(original).astype(array.dtype), array):
            raise UserError(
                f"{where}: {name} has other values than the target's {original}: the draft was "
                "trained with an array of its own, or for another target; set target.source to "
                "the model that it was trained for, in its original precision"
            )

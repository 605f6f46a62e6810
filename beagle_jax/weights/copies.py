"""Checks the copies of target arrays that a published draft contains.

Decoding uses the target's own arrays. A copy with other values is therefore a trained part of the
draft, and ignoring it would change the draft.
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

# suffix of a copy's name -> the target's tensor
_ORIGINALS = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
}


def tensor_reader(opened: Source, spec: TargetSpec) -> TensorReader:
    """Returns a function that reads single tensors of a target.

    A tied head is read from the embedding.
    """

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
    copies: Iterable[tuple[str, np.ndarray]], read_target: TensorReader | None, where: object
) -> None:
    """Checks that copies of the target's embedding, head and final norm equal the target's.

    Values are compared in the dtype of the copy, because a draft may be published in a lower
    precision than its target.

    Args:
      copies: (name, array) of each copy. Other names are ignored.
      read_target: reads the target's tensors. None if the target is not available; any copy is
        then an error.
      where: the draft's source, for error messages.

    Raises:
      UserError: a copy differs from the target's array, or cannot be compared with it.
    """
    for name, array in copies:
        original = next(
            (to for end, to in _ORIGINALS.items() if f".{name}".endswith(f".{end}")), None
        )
        if original is None:
            continue
        if read_target is None:
            raise UserError(
                f"{where}: {name} cannot be compared with the target's {original}, because "
                "the target is not available"
            )
        if not np.array_equal(read_target(original).astype(array.dtype), array):
            raise UserError(
                f"{where}: the values of {name} differ from the target's {original}: the draft was "
                "trained with an array of its own, or for another target; set target.source to "
                "the model that it was trained for, in its original precision"
            )

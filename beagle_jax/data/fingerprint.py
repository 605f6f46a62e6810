"""Hashes that bind a folder of text and states to its target, tokenizer and chat template."""

import hashlib
import json
from typing import Any

import jax
import ml_dtypes
import numpy as np
from transformers import PreTrainedTokenizerBase

from beagle_jax.model.joined import separate_layer
from beagle_jax.model.target import Params

_SAMPLE = 64  # leading values of each tensor
# Words, numbers, spaces, accents and symbols. Two tokenizers count as equal if they have the same
# vocabulary and split this text in the same way.
_PROBE = (
    "It's 1,234.5 km\u00b2 \u2014 na\u00efve  caf\u00e9\n\tdef f(x): return x**2  # "
    "\u4f60\u597d \u2603"
)


def fingerprints(params: Params, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns hashes by name: of the target's weights, its tokenizer and its chat template.

    The hash of the weights covers their leading values, rounded to bfloat16, so that it does not
    depend on `target.dtype`. Joined projections count as the separate ones of their files.
    """
    return {"target_sha256": _weights(params)} | text_hashes(tokenizer)


def text_hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns the hashes that need no weights: of the tokenizer and of its chat template."""
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.encode(_PROBE)])
    return {
        "tokenizer_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template_sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
    }


def _weights(params: Params) -> str:
    digest = hashlib.sha256()
    layers = params["layers"]
    shapes = {**params, "layers": [jax.eval_shape(separate_layer, layer) for layer in layers]}
    first = _leading({key: array for key, array in params.items() if key != "layers"})
    first["layers"] = [_leading(layer) for layer in layers]
    for (path, array), values in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(first), strict=True
    ):
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape}".encode())
        digest.update(np.asarray(values).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


@jax.jit
def _leading(layer: Params) -> dict[str, Any]:
    """Returns the leading values of each array of a layer, with separate projections."""
    return jax.tree.map(lambda x: x[(0,) * (x.ndim - 1)][:_SAMPLE], separate_layer(layer))

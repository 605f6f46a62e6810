"""Joins the projections of a layer that multiply the same columns into one matrix.

A layer then has four products instead of seven. Targets are joined while they are loaded for
decoding, not for training (`weights/target.py`). Files, fingerprints and exports hold separate
projections (`model/tensors.py`); a joined matrix holds the rows of its parts and nothing else.

    qkv_KGHD     for each KV head, G heads: those of its queries, its keys, its values
    gate_up_2FD  the MLP's gate, then up

On a TPU, the stacks of experts are turned to [in, out]: its grouped products (`model/experts.py`)
would otherwise turn them in each program, and hold them twice (`benchmarks/experts_pass.py`).

On a mesh, each device's part of these has the queries, keys and values of its own KV heads, and the
same outputs of gate and up.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from beagle_jax.model.quantised import Quantised, by_rows
from beagle_jax.model.tensors import JOINED, bias_key

if TYPE_CHECKING:  # target.py imports this file
    from beagle_jax.model.target import Params, TargetSpec

QKV, GATE_UP = "qkv_KGHD", "gate_up_2FD"
_LANES = 128  # of a TPU's register
TURNED = ("gate_EDF", "up_EDF", "down_EFD")  # stacks of experts


def join_layer(
    layer: "Params", spec: "TargetSpec", *, heads: bool = True, turned: bool = False
) -> dict[str, Any]:
    """Returns a layer with its projections joined, quantised ones too.

    heads: join queries, keys and values; False: only gate and up. Projections of which only some
    have a bias stay separate. turned: turn stacks of experts that are not quantised.
    """
    joined = dict(layer)
    for key in (QKV, GATE_UP) if heads else (GATE_UP,):
        if _can_join(layer, key):
            for name in (key, bias_key(key)):
                if JOINED[name].parts[0] in layer:
                    parts = [joined.pop(part) for part in JOINED[name].parts]
                    joined[name] = jax.tree.map(lambda *x, at=name: _join(at, x, spec), *parts)
    for name in TURNED if turned else ():
        (part,) = JOINED[name].parts
        if part in layer and not isinstance(layer[part], Quantised):
            joined[name] = joined.pop(part).swapaxes(1, 2)
    return joined


def turns_experts(layer: "Params", platform: str) -> bool:
    """Returns whether a layer's stacks of experts are turned for a platform, such as "tpu".

    They stay where a device's part of an expert does not fill a TPU's registers, because a program
    would then copy them.
    """
    stack = layer.get("gate_EFD")
    if platform != "tpu" or stack is None or isinstance(stack, Quantised):
        return False
    return stack.sharding.shard_shape(stack.shape)[1] % _LANES == 0


def separate_layer(layer: "Params", *, heads_only: bool = False) -> dict[str, Any]:
    """Returns a layer with separate projections, as `join_layer` took it.

    heads_only: leaves gate and up joined.
    """
    separate = dict(layer)
    for key in JOINED.keys() & layer.keys():
        if key.startswith("qkv") or not heads_only:
            leaves, tree = jax.tree.flatten(by_rows(separate.pop(key)))
            parts = zip(*(split(key, leaf) for leaf in leaves), strict=True)
            arrays = (jax.tree.unflatten(tree, part) for part in parts)
            separate |= zip(JOINED[key].parts, arrays, strict=True)
    return separate


def separated(params: "Params") -> dict[str, Any]:
    """Returns a target's parameters with separate projections in every layer."""
    return {**params, "layers": [separate_layer(layer) for layer in params["layers"]]}


def heads_apart(params: "Params") -> dict[str, Any]:
    """Returns a target's parameters with separate queries, keys and values in every layer."""
    layers = [separate_layer(layer, heads_only=True) for layer in params["layers"]]
    return {**params, "layers": layers}


def split(key: str, joined: jax.Array) -> Iterator[jax.Array]:
    """Yields the parts [F, ..] of a joined array, or of columns that it has projected."""
    if key.startswith("qkv"):
        for part in (joined[:, :-2], joined[:, -2:-1], joined[:, -1:]):
            yield part.reshape(-1, *joined.shape[3:])
    elif key in TURNED:
        yield joined.swapaxes(1, 2)
    else:
        yield from (joined[0], joined[1])


def _can_join(layer: "Params", key: str) -> bool:
    parts = JOINED[key].parts
    biased = {bias_key(part) in layer for part in parts}
    return all(part in layer for part in parts) and len(biased) == 1


def _join(key: str, parts: tuple[jax.Array, ...], spec: "TargetSpec") -> jax.Array:
    """Joins arrays [F, ..] of some projections."""
    if not key.startswith("qkv"):
        return jnp.stack(parts)
    K, H = spec.num_kv_heads, spec.head_dim
    return jnp.concatenate([part.reshape(K, -1, H, *part.shape[1:]) for part in parts], axis=1)

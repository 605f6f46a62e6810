"""Declares the target's arrays: names in files, shapes, sharding axes, quantisation.

`ARRAYS` declares what is the same for every target, by key in the parameter tree; `tensors` lists
the arrays of a given spec. Loading, checking, sharding, quantisation and the abstract shapes of a
plan all read these two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # target.py imports this file
    from beagle_jax.model.target import TargetSpec

Path = tuple[str | int, ...]


class Array(NamedTuple):
    """Properties of an array of the parameter tree that are the same in every target."""

    sizes: tuple[str, ...]  # its dimensions, by their names in `_sizes`
    axes: tuple[str | None, ...]  # their logical axes (sharding.py); None: never split
    quantisable: bool = False


class Tensor(NamedTuple):
    """An array of a target: its path in the parameter tree and its names in files."""

    path: Path
    shape: tuple[int, ...]  # matrices are [out, in]
    names: tuple[str, ...]  # Hugging Face names: one, or one per expert in order
    axes: tuple[str | None, ...]
    quantisable: bool


_IN, _OUT = ("inner", "model"), ("model", "inner")  # to a layer's inner width, and back
_KV, _TABLE = ("kv", "model"), ("vocabulary", None)
_EXPERTS_IN, _EXPERTS_OUT = ("experts", "expert", "model"), ("experts", "model", "expert")
ARRAYS = {
    "embed_VD": Array(("vocabulary", "model"), _TABLE),
    "head_VD": Array(("vocabulary", "model"), _TABLE),
    "norm_D": Array(("model",), (None,)),
    # attention
    "input_norm_D": Array(("model",), (None,)),
    "q_FD": Array(("query", "model"), _IN, quantisable=True),
    "k_FD": Array(("key", "model"), _KV, quantisable=True),
    "v_FD": Array(("key", "model"), _KV, quantisable=True),
    "o_DF": Array(("model", "query"), _OUT, quantisable=True),
    "q_norm_H": Array(("head",), (None,)),
    "k_norm_H": Array(("head",), (None,)),
    "q_norm_F": Array(("query",), (None,)),
    "k_norm_F": Array(("key",), (None,)),
    "after_attention_norm_D": Array(("model",), (None,)),
    # MLP
    "mlp_norm_D": Array(("model",), (None,)),
    "gate_FD": Array(("mlp", "model"), _IN, quantisable=True),
    "up_FD": Array(("mlp", "model"), _IN, quantisable=True),
    "down_DF": Array(("model", "mlp"), _OUT, quantisable=True),
    "after_mlp_norm_D": Array(("model",), (None,)),
    # experts, instead of the MLP
    "router_ED": Array(("experts", "model"), (None, None)),
    "gate_EFD": Array(("experts", "expert", "model"), _EXPERTS_IN, quantisable=True),
    "up_EFD": Array(("experts", "expert", "model"), _EXPERTS_IN, quantisable=True),
    "down_EDF": Array(("experts", "model", "expert"), _EXPERTS_OUT, quantisable=True),
    # biases of projections, with one number per output
    "q_bias_F": Array(("query",), (None,)),
    "k_bias_F": Array(("key",), (None,)),
    "v_bias_F": Array(("key",), (None,)),
    "o_bias_D": Array(("model",), (None,)),
    "gate_bias_F": Array(("mlp",), (None,)),
    "up_bias_F": Array(("mlp",), (None,)),
    "down_bias_D": Array(("model",), (None,)),
}


class Joined(NamedTuple):
    """An array that holds the rows of several, or a stack turned (`model/joined.py`)."""

    parts: tuple[str, ...]  # keys of `ARRAYS`
    axes: tuple[str | None, ...]


JOINED = {
    "qkv_KGHD": Joined(("q_FD", "k_FD", "v_FD"), ("kv", None, None, "model")),
    "gate_up_2FD": Joined(("gate_FD", "up_FD"), (None, *_IN)),
    "qkv_bias_KGH": Joined(("q_bias_F", "k_bias_F", "v_bias_F"), (None, None, None)),
    "gate_up_bias_2F": Joined(("gate_bias_F", "up_bias_F"), (None, None)),
    # experts' matrices as [in, out]
    "gate_EDF": Joined(("gate_EFD",), _EXPERTS_OUT),
    "up_EDF": Joined(("up_EFD",), _EXPERTS_OUT),
    "down_EFD": Joined(("down_EDF",), _EXPERTS_IN),
}


def tensors(spec: TargetSpec) -> list[Tensor]:
    """Lists every array of a target's parameter tree, layer by layer."""
    arrays = [
        _tensor(spec, ("embed_VD",), "model.embed_tokens.weight"),
        _tensor(spec, ("norm_D",), "model.norm.weight"),
    ]
    if not spec.tie_embeddings:
        arrays.append(_tensor(spec, ("head_VD",), "lm_head.weight"))
    for layer in range(spec.num_layers):
        for key, names in _layer(spec, layer):
            full = (f"model.layers.{layer}.{name}" for name in names)
            arrays.append(_tensor(spec, ("layers", layer, key), *full))
    return arrays


def param_table(spec: TargetSpec) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Maps Hugging Face names to (path in the parameter tree, shape [out, in]).

    A path that ends in a number is one expert's slice of a stacked array.
    """
    table: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for tensor in tensors(spec):
        if len(tensor.shape) == 3:
            for expert, name in enumerate(tensor.names):
                table[name] = ((*tensor.path, expert), tensor.shape[1:])
        else:
            table[tensor.names[0]] = (tensor.path, tensor.shape)
    return table


def bias_key(weight_key: str) -> str:
    """Returns the key of a projection's bias: "q_FD" -> "q_bias_F"."""
    name, _, letters = weight_key.rpartition("_")
    return f"{name}_bias_{letters[:-1]}"


def _tensor(spec: TargetSpec, path: Path, *names: str) -> Tensor:
    array, sizes = ARRAYS[str(path[-1])], _sizes(spec)
    shape = tuple(sizes[size] for size in array.sizes)
    return Tensor(path, shape, names, array.axes, array.quantisable)


def _sizes(spec: TargetSpec) -> dict[str, int]:
    """Returns the target's values of the sizes that `ARRAYS` names."""
    return {
        "vocabulary": spec.vocab_size,
        "model": spec.hidden_size,
        "query": spec.num_heads * spec.head_dim,
        "key": spec.num_kv_heads * spec.head_dim,
        "head": spec.head_dim,
        "mlp": spec.intermediate_size,
        "experts": spec.experts.count if spec.experts else 0,
        "expert": spec.experts.width if spec.experts else 0,
    }


def _layer(spec: TargetSpec, layer: int) -> Iterator[tuple[str, list[str]]]:
    """Yields the keys of a layer's arrays, with the names of each in files."""
    weights = _attention(spec) | _mlp(spec, layer)
    for name, key in weights.items():
        yield key, [f"{name}.weight"]
    if spec.experts and layer not in spec.experts.dense_layers:
        router, *matrices = spec.experts.names
        yield "router_ED", [f"{router}.weight"]
        for key, name in zip(("gate_EFD", "up_EFD", "down_EDF"), matrices, strict=True):
            yield key, [f"{name.format(expert)}.weight" for expert in range(spec.experts.count)]
    for name in spec.biases:
        yield bias_key(weights[name]), [f"{name}.bias"]


def _attention(spec: TargetSpec) -> dict[str, str]:
    """Maps names of a layer's attention and norms to their keys."""
    # With norms after attention, that norm has the name that the one before the MLP has elsewhere.
    after = "after_attention_norm_D" if spec.post_norms else "mlp_norm_D"
    names = {"input_layernorm": "input_norm_D"} if spec.pre_norms else {}
    names |= {
        "self_attn.q_proj": "q_FD",
        "self_attn.k_proj": "k_FD",
        "self_attn.v_proj": "v_FD",
        "self_attn.o_proj": "o_DF",
        "post_attention_layernorm": after,
    }
    if spec.qk_norm or spec.qk_norm_whole:
        end = "F" if spec.qk_norm_whole else "H"
        names |= {f"self_attn.{name}_norm": f"{name}_norm_{end}" for name in "qk"}
    if spec.post_norms:
        names |= {"pre_feedforward_layernorm": "mlp_norm_D"} if spec.pre_norms else {}
        names["post_feedforward_layernorm"] = "after_mlp_norm_D"
    return names


def _mlp(spec: TargetSpec, layer: int) -> dict[str, str]:
    """Maps names of a layer's MLP to their keys; {} if experts replace it."""
    if spec.experts and layer not in spec.experts.dense_layers:
        return {}
    return {"mlp.gate_proj": "gate_FD", "mlp.up_proj": "up_FD", "mlp.down_proj": "down_DF"}

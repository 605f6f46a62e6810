"""Quantises a target layer by layer while it loads, and measures memory and error.

The error is measured during the load: some tokens run through both versions of each layer, so that
at most one layer is held unquantised.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from beagle_jax.errors import UserError
from beagle_jax.model.quantised import Kind, quantise_layer, stored_bytes
from beagle_jax.model.target import (
    Params,
    TargetSpec,
    causal_layer,
    embed,
    final_norm,
    logits,
)
from beagle_jax.model.tensors import tensors

_PROBE = 32  # random tokens that run through both versions


class Cost(NamedTuple):
    """Memory and error of a target's quantisation."""

    kind: str
    group: int  # inputs of a matrix that share a scale
    bytes_before: int
    bytes_after: int
    # RMS of the logits' difference, divided by the RMS of the logits around their mean
    logit_error: float
    agreement: float  # fraction of the probe's tokens with the same most likely next token

    def __str__(self) -> str:
        return (
            f"{self.kind}, groups of {self.group}: {self.bytes_before / 1e6:,.0f} MB -> "
            f"{self.bytes_after / 1e6:,.0f} MB at rest; on {_PROBE} random tokens logits are "
            f"off by {self.logit_error:.1%} of their spread, and {self.agreement:.0%} of the "
            "most likely next tokens are the same"
        )


class Quantiser:
    """Quantises one target: call `take` for each layer in order, then `cost`.

    Raises:
      UserError: the group size does not divide the inputs of a matrix.
    """

    def __init__(self, spec: TargetSpec, kind: Kind, group: int, where: str) -> None:
        check_group(spec, group, where)
        self._spec, self._kind, self._group = spec, kind, group
        self._streams: tuple[jax.Array, jax.Array] | None = None
        self._saved = 0

    def take(self, params: Params, index: int) -> dict[str, Any]:
        """Returns the quantised layer.

        params: everything that was loaded before it.
        """
        layer = params["layers"][index]
        if self._streams is None:
            tokens_BT = jax.random.randint(jax.random.key(0), (1, _PROBE), 0, self._spec.vocab_size)
            self._streams = (embed(params["embed_VD"], tokens_BT, self._spec.embed_scale),) * 2
        quantised = quantise_layer(layer, self._kind, self._group)
        full, small = self._streams
        self._streams = (
            causal_layer(layer, self._spec, index, full),
            causal_layer(quantised, self._spec, index, small),
        )
        self._saved += _bytes(layer) - _bytes(quantised)
        return jax.block_until_ready(quantised)

    def cost(self, params: Params) -> Cost:
        """Returns the measured cost.

        params: the target, with every layer quantised.
        """
        assert self._streams is not None  # `take` was called for every layer
        full, small = (
            logits(params, self._spec, final_norm(params, self._spec, x_BTD))
            for x_BTD in self._streams
        )
        error = jnp.sqrt(jnp.mean(jnp.square(small - full)) / jnp.var(full))
        same = jnp.mean(jnp.argmax(full, axis=-1) == jnp.argmax(small, axis=-1))
        after = _bytes(params)
        return Cost(self._kind, self._group, after + self._saved, after, float(error), float(same))


def check_group(spec: TargetSpec, group: int, where: str) -> None:
    """Checks that a target's matrices have whole groups.

    Raises:
      UserError: the group size does not divide the inputs of a matrix.
    """
    for tensor in tensors(spec):
        if tensor.quantisable and (tensor.shape[-1] % group or group % 2):
            raise UserError(
                f"{where}: target.group_size is {group}, which must be even and divide the "
                f"{tensor.shape[-1]} inputs of {tensor.names[0]}; choose another"
            )


def _bytes(tree: Any) -> int:
    return sum(stored_bytes(array) for array in jax.tree.leaves(tree))

"""Reads projections that a checkpoint stores as one matrix: Phi-3's `qkv_proj`, `gate_up_proj`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.weights import Weights


class _Part(NamedTuple):
    """Rows of a fused matrix that are a projection of their own."""

    of: str
    first: int
    rows: int


class SplitWeights:
    """A source whose fused matrices appear as the projections that they hold."""

    def __init__(self, source: Weights, spec: TargetSpec) -> None:
        query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        rows = {
            "self_attn.qkv_proj": {
                "self_attn.q_proj": query,
                "self_attn.k_proj": key,
                "self_attn.v_proj": key,
            },
            "mlp.gate_up_proj": {
                "mlp.gate_proj": spec.intermediate_size,
                "mlp.up_proj": spec.intermediate_size,
            },
        }
        self._source = source
        self._parts: dict[str, _Part] = {}
        self._shapes: list[tuple[str, tuple[int, ...]]] = []
        for name, shape in source.shapes():
            counts = next(
                (parts for end, parts in rows.items() if name.endswith(f"{end}.weight")), None
            )
            if counts is None or shape[0] != sum(counts.values()):
                self._shapes.append((name, shape))
                continue
            prefix, first = name.rsplit(".", 3)[0], 0
            for part, count in counts.items():
                self._parts[f"{prefix}.{part}.weight"] = _Part(name, first, count)
                self._shapes.append((f"{prefix}.{part}.weight", (count, *shape[1:])))
                first += count

    def shapes(self) -> Sequence[tuple[str, tuple[int, ...]]]:
        """Lists names and shapes; a fused matrix of another height stays as it is."""
        return self._shapes

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """Reads a part of a tensor, or of its rows within a fused one."""
        part = self._parts.get(name)
        if part is None:
            return self._source.read(name, index, dtype)
        start, stop, _ = index[0].indices(part.rows)
        rows = slice(part.first + start, part.first + stop)
        return self._source.read(part.of, (rows, *index[1:]), dtype)

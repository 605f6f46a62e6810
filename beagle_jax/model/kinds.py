"""The kinds of draft by name: how each is described, computed and initialised.

Each floor above has a table with the same names: decoding a drafter, training its objectives,
weights its files. Nothing outside these tables tells kinds apart (tests/test_kinds.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from beagle_jax.model.beagle import BeagleBlock, BeagleSpec, init_draft
from beagle_jax.model.draft import DraftSpec, LayerBlock
from beagle_jax.model.eagle import EagleBlock, EagleSpec, init_eagle


class Kind(NamedTuple):
    """One kind of draft."""

    spec: type[DraftSpec]
    block: Callable[[Any], Any]  # description -> the flax module of its parameters
    init: Callable[[Any, jax.Array], dict[str, jax.Array]]  # description, key -> parameters


KINDS: dict[str, Kind] = {
    BeagleSpec.kind: Kind(BeagleSpec, BeagleBlock, init_draft),
    EagleSpec.kind: Kind(EagleSpec, EagleBlock, init_eagle),
}


def spec_type(kind: str) -> type[DraftSpec]:
    """How a draft of this kind (`draft.kind`) is described."""
    return KINDS[kind].spec


def fresh_params(spec: DraftSpec, key: jax.Array) -> dict[str, jax.Array]:
    """Random parameters to train from (method.md 2.4)."""
    return KINDS[spec.kind].init(spec, key)


def block_of(spec: DraftSpec) -> LayerBlock:
    """The flax module of a description's parameters."""
    return KINDS[spec.kind].block(spec)

"""The kinds of draft by name: description, block and initialisation.

decoding, training and weights each have a table with the same names: drafters, objectives and
files. No code outside these tables depends on the kind (tests/test_kinds.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from beagle_jax.model.beagle import BeagleBlock, BeagleSpec, init_draft
from beagle_jax.model.draft import DraftSpec, LayerBlock
from beagle_jax.model.eagle import EagleBlock, EagleSpec, init_eagle


class Kind(NamedTuple):
    """Description, block and initialisation of a kind of draft."""

    spec: type[DraftSpec]
    block: Callable[[Any], Any]  # description -> the flax module of its parameters
    init: Callable[[Any, jax.Array], dict[str, jax.Array]]  # description, key -> parameters


KINDS: dict[str, Kind] = {
    BeagleSpec.kind: Kind(BeagleSpec, BeagleBlock, init_draft),
    EagleSpec.kind: Kind(EagleSpec, EagleBlock, init_eagle),
}


def spec_type(kind: str) -> type[DraftSpec]:
    """Returns the description type of a kind (`draft.kind`)."""
    return KINDS[kind].spec


def fresh_params(spec: DraftSpec, key: jax.Array) -> dict[str, jax.Array]:
    """Returns random parameters to start training from (method.md 2.4)."""
    return KINDS[spec.kind].init(spec, key)


def block_of(spec: DraftSpec) -> LayerBlock:
    """Returns the flax module of a description's parameters."""
    return KINDS[spec.kind].block(spec)

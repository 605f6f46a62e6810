"""The kinds of draft: the one place that tells them apart, by `draft.kind` and by how they are
described.
"""

import jax

from beagle_jax.model.beagle import BeagleBlock, DraftSpec, init_draft
from beagle_jax.model.eagle import EagleBlock, EagleSpec, init_eagle

KINDS: tuple[type[DraftSpec], ...] = (DraftSpec, EagleSpec)


def spec_type(kind: str) -> type[DraftSpec]:
    """How a draft of this kind, `beagle` or `eagle`, is described."""
    return EagleSpec if kind == "eagle" else DraftSpec


def fresh_params(spec: DraftSpec, key: jax.Array) -> dict[str, jax.Array]:
    """Parameters to train from, at random (method.md 2.4)."""
    return init_eagle(spec, key) if isinstance(spec, EagleSpec) else init_draft(spec, key)


def block_of(spec: DraftSpec) -> BeagleBlock:
    """The block that a description is of."""
    return EagleBlock(spec) if isinstance(spec, EagleSpec) else BeagleBlock(spec)

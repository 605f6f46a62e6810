"""The kinds of draft that can be trained: the one place that tells them apart by `draft.kind`."""

import jax

from beagle_jax.model.beagle import DraftSpec, init_draft
from beagle_jax.model.eagle import EagleSpec, init_eagle


def spec_type(kind: str) -> type[DraftSpec]:
    """How a draft of this kind, `beagle` or `eagle`, is described."""
    return EagleSpec if kind == "eagle" else DraftSpec


def fresh_params(spec: DraftSpec, key: jax.Array) -> dict[str, jax.Array]:
    """Parameters to train from, at random (method.md 2.4)."""
    return init_eagle(spec, key) if isinstance(spec, EagleSpec) else init_draft(spec, key)

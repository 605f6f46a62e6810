"""The kinds of draft by name: description, block and initialisation.

decoding, training and weights each have a table with the same names: drafters, objectives and
files. No code outside these tables depends on the kind (tests/test_kinds.py).
"""

from collections.abc import Callable
from enum import Enum, auto
from typing import Any, NamedTuple

import jax

from beagle_jax.config import DraftConfig
from beagle_jax.model.beagle import BeagleBlock, BeagleSpec, init_draft
from beagle_jax.model.draft import DraftSpec, LayerBlock
from beagle_jax.model.eagle import EagleBlock, EagleSpec, init_eagle
from beagle_jax.model.eagle3 import Eagle3Block, Eagle3Spec, init_eagle3
from beagle_jax.model.target import TargetSpec


class Served(Enum):
    """What computes a kind of draft in other servers."""

    NOWHERE = auto()
    BY_SERVERS = auto()  # their own classes, for EAGLE drafts
    BY_PLUGIN = auto()  # ours for vLLM (weights/vllm_plugin)


class Kind(NamedTuple):
    """Description, block and initialisation of a kind of draft, and where it is served."""

    spec: type[DraftSpec]
    block: Callable[[Any], Any]  # description -> the flax module of its parameters
    init: Callable[[Any, jax.Array], dict[str, jax.Array]]  # description, key -> parameters
    served: Served = Served.NOWHERE


KINDS: dict[str, Kind] = {
    BeagleSpec.kind: Kind(BeagleSpec, BeagleBlock, init_draft, Served.BY_PLUGIN),
    EagleSpec.kind: Kind(EagleSpec, EagleBlock, init_eagle, Served.BY_SERVERS),
    Eagle3Spec.kind: Kind(Eagle3Spec, Eagle3Block, init_eagle3, Served.BY_SERVERS),
}


def spec_type(kind: str) -> type[DraftSpec]:
    """Returns the description type of a kind (`draft.kind`)."""
    return KINDS[kind].spec


def new_spec(settings: DraftConfig, target: TargetSpec) -> DraftSpec:
    """Describes the new draft that a config asks for, over the target's whole vocabulary.

    Raises:
      UserError: a setting does not fit the target.
    """
    return spec_type(settings.kind).from_settings(settings, target)


def fresh_params(spec: DraftSpec, key: jax.Array) -> dict[str, jax.Array]:
    """Returns random parameters to start training from (method.md 2.4)."""
    return KINDS[spec.kind].init(spec, key)


def block_of(spec: DraftSpec) -> LayerBlock:
    """Returns the flax module of a description's parameters."""
    return KINDS[spec.kind].block(spec)

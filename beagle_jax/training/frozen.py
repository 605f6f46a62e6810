"""Frozen parts of the target that training reads."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from beagle_jax.model.target import Params, TargetSpec


class Vocabulary(NamedTuple):
    """All V tokens of the target, for a draft that scores some of them only."""

    head_VD: jax.Array
    scored_V: jax.Array  # bool: the draft scores the token


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FrozenTarget:
    """Embedding and head of the target; also the whole model if steps compute its states.

    A pytree. Its arrays are sharded by name, as in the target.
    """

    embed_VD: jax.Array
    head_VD: jax.Array  # only the tokens that the draft scores
    model: Params | None = None  # None: batches contain the states (`data.states: disk`)
    spec: TargetSpec | None = field(default=None, metadata=dict(static=True))  # of the model
    # For held-out figures, and for objectives with `only_scored`; None: neither is there, or the
    # draft scores all tokens.
    vocabulary: Vocabulary | None = None

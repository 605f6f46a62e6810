"""The parts of the target that training reads and never changes."""

from dataclasses import dataclass, field

import jax

from beagle_jax.model.target import Params, TargetSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FrozenTarget:
    """Embedding and head; the whole model too where steps compute its states.

    A pytree whose arrays are sharded by name like the target's own.
    """

    embed_VD: jax.Array
    head_VD: jax.Array  # rows of the tokens that the draft scores
    model: Params | None = None  # None: batches bring states along (`data.states: disk`)
    spec: TargetSpec | None = field(default=None, metadata=dict(static=True))  # of the model

"""Table of trained kinds of draft, by their name in config.json."""

from jax.sharding import Mesh

from beagle_jax.decoding.drafter import Drafter, NoDrafter
from beagle_jax.decoding.lookup import Lookup, LookupBeside
from beagle_jax.decoding.trained import (
    BeagleDrafter,
    DraftHead,
    Eagle3Drafter,
    EagleDrafter,
    TrainedDrafter,
)
from beagle_jax.decoding.tree import LookupTree, Tree
from beagle_jax.model.target import Params, head
from beagle_jax.sharding import place, place_head, replicate
from beagle_jax.weights.draft import Draft

TRAINED: dict[str, type[TrainedDrafter]] = {
    kind.kind: kind for kind in (BeagleDrafter, EagleDrafter, Eagle3Drafter)
}


def trained_drafter(
    draft: Draft, target: Params, *, append_predicted: bool = True, mesh: Mesh | None = None
) -> TrainedDrafter:
    """Returns the drafter of a trained draft, with the target's embedding and head.

    target: its parameters, on their devices. append_predicted: see `TrainedDrafter`.
    """
    spec, targets = draft.spec, (target["embed_VD"], head(target))
    params, ids_V = place(draft.params, mesh), replicate(draft.hot_ids, mesh)
    # All weights are read in the target's dtype: half the bytes beside a bfloat16 target.
    params = {name: array.astype(targets[0].dtype) for name, array in params.items()}
    embed_VD = spec.embedding(params, targets[0])
    rows_VD = spec.head(params, targets[1])
    if rows_VD is targets[1] and ids_V is not None:
        rows_VD = place_head(rows_VD[ids_V], mesh)
    return TRAINED[spec.kind](spec, params, embed_VD, DraftHead(rows_VD, ids_V), append_predicted)


def drafter_for(
    draft: Draft | Drafter | None,
    target: Params,
    tree: Tree,
    *,
    append_predicted: bool = True,
    mesh: Mesh | None = None,
) -> Drafter:
    """Returns the drafter of a tree, from a draft, a drafter or, for no draft, None."""
    if draft is None or not tree.grown.depth:
        drafter: Drafter = NoDrafter()
    elif isinstance(draft, Drafter):
        drafter = draft
    else:
        drafter = trained_drafter(draft, target, append_predicted=append_predicted, mesh=mesh)
    if isinstance(tree, LookupTree) and not isinstance(drafter, Lookup):
        return LookupBeside(drafter)
    return drafter

"""Table of trained kinds of draft, by their name in config.json."""

from jax.sharding import Mesh

from beagle_jax.decoding.drafter import Drafter, NoDrafter
from beagle_jax.decoding.trained import BeagleDrafter, DraftHead, EagleDrafter, TrainedDrafter
from beagle_jax.model.target import Params, head
from beagle_jax.sharding import replicate
from beagle_jax.weights.draft import Draft

TRAINED: dict[str, type[TrainedDrafter]] = {
    kind.kind: kind for kind in (BeagleDrafter, EagleDrafter)
}


def trained_drafter(
    draft: Draft, target: Params, *, append_predicted: bool = True, mesh: Mesh | None = None
) -> TrainedDrafter:
    """Returns the drafter of a trained draft, with the target's embedding and head.

    target: its parameters, on their devices. append_predicted: see `TrainedDrafter`.
    """
    params, ids_V = replicate((draft.params, draft.hot_ids), mesh)
    head_VD = head(target)
    rows_VD = replicate(head_VD if ids_V is None else head_VD[ids_V], mesh)
    return TRAINED[draft.spec.kind](
        draft.spec, params, target["embed_VD"], DraftHead(rows_VD, ids_V), append_predicted
    )


def drafter_for(
    draft: Draft | Drafter | None,
    target: Params,
    *,
    append_predicted: bool = True,
    mesh: Mesh | None = None,
) -> Drafter:
    """Returns the drafter of a draft; a drafter is returned as it is, None drafts nothing."""
    if draft is None:
        return NoDrafter()
    if isinstance(draft, Drafter):
        return draft
    return trained_drafter(draft, target, append_predicted=append_predicted, mesh=mesh)

"""Tables of the training objectives and closed-form starts of each kind of draft."""

from collections.abc import Callable, Iterable

import jax

from beagle_jax.config import StageConfig
from beagle_jax.errors import UsageError
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.model.eagle3 import Eagle3Spec
from beagle_jax.training.eagle import TEST_TIME as EAGLE_TEST_TIME
from beagle_jax.training.eagle3 import TEST_TIME as EAGLE3_TEST_TIME
from beagle_jax.training.early import EARLY
from beagle_jax.training.late import DENSE, LATE
from beagle_jax.training.objective import Objective
from beagle_jax.training.warm_start import warm_start

# The early stage of EAGLE and EAGLE-3 is their test-time stage with one step.
OBJECTIVES: dict[str, dict[str, Objective]] = {
    BeagleSpec.kind: {"early": EARLY, "late": LATE, "test_time": DENSE},
    EagleSpec.kind: {"early": EAGLE_TEST_TIME, "test_time": EAGLE_TEST_TIME},
    Eagle3Spec.kind: {"early": EAGLE3_TEST_TIME, "test_time": EAGLE3_TEST_TIME},
}

# Closed-form starts (`draft.init: ridge`), for the kinds that have one:
# (initial parameters, spec, embedding, function that yields batches to fit on) -> parameters
WARM_STARTS: dict[str, Callable[..., dict[str, jax.Array]]] = {BeagleSpec.kind: warm_start}


def asks_for_scored(spec: DraftSpec, stages: Iterable[StageConfig]) -> bool:
    """Whether a stage must know which tokens the draft scores (`Objective.only_scored`)."""
    return any(objective_of(spec, stage).only_scored for stage in stages)


def objective_of(spec: DraftSpec, stage: StageConfig) -> Objective:
    """Returns the objective of a stage for a kind of draft.

    Raises:
        UsageError: this kind has no objective for the stage.
    """
    objectives = OBJECTIVES[spec.kind]
    if stage.objective not in objectives:
        raise UsageError(
            f"a draft of kind {spec.kind!r} cannot be trained by a stage of objective "
            f"{stage.objective!r}; expected one of {', '.join(objectives)}"
        )
    return objectives[stage.objective]

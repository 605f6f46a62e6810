"""Loss and gradients of a tiny draft whose rows are split over eight virtual devices.

python tests/sequence_cases.py OUT.json         # the early stage, and a planted bug
python tests/sequence_cases.py OUT.json rest    # other meshes, the late and the test-time stage
"""

import json
import re
import sys

import jax
import numpy as np
from mesh_cases import CONFIG, LEVEL_0, SPEC, V

from beagle_jax.config import EarlyStage, LateStage, MeshConfig, StageConfig, TestTimeStage
from beagle_jax.data.loader import Batch
from beagle_jax.model.kinds import fresh_params
from beagle_jax.sharding import make_mesh, place, place_rows
from beagle_jax.training import predicting
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.kinds import objective_of
from beagle_jax.training.step import stage_loss

# 13 queries and their windows are no multiple of any number of devices.
B, L, T = 4, 16, 13
STAGES: dict[str, StageConfig] = {
    "early": EarlyStage(steps=10, window=3),
    "late": LateStage(steps=10, window=3, simulation_steps=3, detach=False),
    "test_time": TestTimeStage(steps=10, simulation_steps=2),
}
MESHES = {
    "early": [{"sequence": 8}],
}
REST = {
    "early": [{"data": 2, "fsdp": 2, "sequence": 2}],
    "late": [
        {"fsdp": 2, "sequence": 2, "tensor": 2},
        {"sequence": 8},
        {"sequence": 4, "tensor": 2},
    ],
    "test_time": [{"data": 2, "sequence": 4}],
}


def frozen_and_batch() -> tuple[FrozenTarget, Batch]:
    """Makes packed rows, some shorter than a device's part, with queries from position 2 on."""
    rng = np.random.default_rng(3)
    length_BC = np.array([[9, 7], [16, 0], [5, 0], [6, 4]], np.int32)
    first_BC = np.array([[2, 1], [3, 0], [2, 0], [2, 0]], np.int32)
    queries_B1 = (length_BC - first_BC).sum(axis=1, keepdims=True)
    counted_BT = (np.arange(T) < queries_B1) & (rng.random((B, T)) < 0.8)
    states_BLD = rng.standard_normal((B, L, SPEC.hidden_size)).astype(np.float32)
    tokens_BL = rng.integers(0, V, (B, L)).astype(np.int32)
    tables = [rng.standard_normal((V, SPEC.hidden_size)).astype(np.float32) for _ in range(2)]
    tables[1][::99] *= 6  # five tokens stand out, so that draft and target agree now and then
    return FrozenTarget(*tables), Batch(tokens_BL, states_BLD, counted_BT, length_BC, first_BC)


def run(name: str, sizes: dict[str, int]) -> dict:
    """Returns loss, agreement and gradients, and what a device computes of a row."""
    sizes = {"data": 1, **sizes}
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: np.prod(list(sizes.values()))])
    stage, config = STAGES[name], CONFIG.changed(batch=B, row_tokens=L)

    def loss(params, frozen, batch, key):
        objective = objective_of(SPEC, stage)
        return stage_loss(params, SPEC, config, stage, objective, frozen, batch, key, mesh)

    tables, batch = frozen_and_batch()
    params = fresh_params(SPEC, jax.random.key(7))
    of = (place(params, mesh), place(tables, mesh), place_rows(batch, mesh), jax.random.key(1))
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*of).compile(LEVEL_0)
    (value, metrics), gradient = compiled(*of)
    return {
        "loss": float(value),
        "agree": np.asarray(metrics.agree_JK).tolist(),
        "count": np.asarray(metrics.count_J).tolist(),
        "gradient": {key: np.asarray(x).ravel().tolist() for key, x in gradient.items()},
        "positions_a_device": _inner(compiled.as_text()),
    }


def _inner(program: str) -> list[int]:
    """Lists the numbers of positions of a row whose activations in the MLP the program holds."""
    shapes = re.findall(rf"f32\[\d+,(\d+),{SPEC.intermediate_size}\]", program)
    return sorted({int(positions) for positions in shapes})


def planted() -> dict:
    """Planted: a device repeats the keys of its own part of a row in the place of the others'."""
    right = predicting.Positions

    def wrong(parts=1, index=0, join=None, at_once=None):
        def own(x, axis):
            return jax.numpy.concatenate([x] * parts, axis=axis)

        return right(parts, index, own, at_once)

    predicting.Positions = wrong
    broken = run("early", {"sequence": 8})
    predicting.Positions = right
    return broken


def main(out: str, which: str = "") -> None:
    results = {
        name: {str(sizes): run(name, sizes) for sizes in [{}, *meshes]}
        for name, meshes in (REST if which == "rest" else MESHES).items()
    }
    if which != "rest":
        results["early"]["planted"] = planted()
    with open(out, "w") as stream:
        json.dump(results, stream)


if __name__ == "__main__":
    main(*sys.argv[1:])

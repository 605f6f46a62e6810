"""Two steps of a tiny draft on any mesh, and what its program sends between devices. Run on eight
virtual devices.

python tests/mesh_cases.py OUT.json         # both stages on one device, on two, and on eight along
all axes
python tests/mesh_cases.py OUT.json rest    # on one device, and on eight along the other ways to
split them; Muon and EAGLE
"""

import json
import math
import re
import sys
from dataclasses import asdict
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from beagle_jax.config import EarlyStage, LateStage, MeshConfig, TestTimeStage, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.model.kinds import fresh_params
from beagle_jax.sharding import born, make_mesh, place, place_rows, whole
from beagle_jax.training import losses
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.step import make_steps

SPEC = BeagleSpec(
    hidden_size=16,
    intermediate_size=24,
    num_heads=8,
    num_kv_heads=8,
    head_dim=2,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    init_std=0.3,
)
# Larger ones round by more than 1e-5.
_SHARED = {name: value for name, value in asdict(SPEC).items() if name != "state_layers"}
EAGLE = EagleSpec(**_SHARED | {"input_norm": False, "init_std": 0.2})
V, B, L = 464, 8, 11  # 464, 232, 116 and 58 are the size of nothing else
CONFIG = TrainConfig(batch=B, row_tokens=L, loss_rows=8, noise_scale=0.01)
STAGES = {
    "early": EarlyStage(steps=10, learning_rate=1e-3, warmup=0, window=3),
    "late": LateStage(
        steps=10, learning_rate=1e-3, warmup=0, window=3, simulation_steps=2, detach=False
    ),
    "eagle": TestTimeStage(
        steps=10, learning_rate=1e-3, warmup=0, simulation_steps=2, detach=False
    ),
}
ALL_AXES = (2, 2, 2)
REST = [
    (1, 1, 2),
    *(
        shape
        for d in (1, 2, 4, 8)
        for f in (1, 2, 4, 8)
        if d * f <= 8 and (shape := (d, f, 8 // d // f)) != ALL_AXES
    ),
]
LEVEL_0 = {"xla_backend_optimization_level": 0}  # run twice only: compiling is what takes long


def frozen_and_batch() -> tuple[FrozenTarget, Batch]:
    """Makes ragged rows, so that devices have different amounts of work.

    Some rows hold two chats, some have nothing that counts.
    """
    rng = np.random.default_rng(3)
    length_B = np.array([11, 9, 11, 6, 5, 11, 10, 8], np.int32)
    length_BC = np.stack(
        [length_B - [4, 0, 0, 2, 0, 7, 1, 0], [4, 0, 0, 2, 0, 7, 1, 0]], axis=1
    ).astype(np.int32)
    live_BL = np.arange(L) < length_B[:, None]
    counted_BL = live_BL & (np.arange(L) >= 2) & (np.arange(L) < length_B[:, None] - 1)
    counted_BL[3:5] = False
    states_BLD = (
        rng.standard_normal((B, L, SPEC.hidden_size)).astype(np.float32) * live_BL[..., None]
    )
    tokens_BL = rng.integers(0, V, (B, L)).astype(np.int32)
    tables = FrozenTarget(
        *(rng.standard_normal((V, SPEC.hidden_size)).astype(np.float32) for _ in range(2))
    )
    tables.head_VD[::99] *= 6  # five tokens stand out, so that draft and target agree now and then
    return tables, Batch(tokens_BL, states_BLD, counted_BL, length_BC, np.zeros((B, 2), np.int32))


def run(
    mesh: Mesh,
    stage: str,
    first_params: dict,
    config: TrainConfig = CONFIG,
    spec: BeagleSpec = SPEC,
) -> dict:
    """Returns losses, gradients, updates after two steps, and the program's text.

    The gradients are Adam's first moment.
    """
    tables, batch = frozen_and_batch()
    step, _, init = make_steps(spec, config, STAGES[stage], mesh)
    frozen, batch = place(tables, mesh), place_rows(batch, mesh)
    state = init(place(first_params, mesh))
    placed = {
        jax.tree_util.keystr(path): leaf.sharding
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    compiled = step.lower(state, frozen, batch, 42).compile(LEVEL_0)
    old, losses, moments = state, [], None
    for _ in range(2):
        state, metrics = compiled(state, frozen, batch, 42)
        losses.append(float(metrics.objective) / float(metrics.supervised))
        moments = moments or [
            np.asarray(x).ravel().tolist() for x in jax.tree.leaves(state.opt_state) if x.ndim
        ]
    return {
        "losses": losses,
        "agree": np.asarray(metrics.agree_JK).tolist(),
        "grad_norm": float(metrics.grad_norm),
        "first_gradient": moments,
        "updates": [
            (np.asarray(array) - np.asarray(first_params[name])).ravel().tolist()
            for name, array in state.params.items()
        ],
        "on_fewer_devices": [
            name for name, sharding in placed.items() if len(sharding.device_set) < mesh.size
        ],
        "whole": [
            name
            for name, sharding in placed.items()
            if ("_proj" in name or "'fc'" in name) and sharding.is_fully_replicated
        ],
        "not_donated": sum(
            leaf.size > 1 and not leaf.is_deleted() for leaf in jax.tree.leaves(old)
        ),
        "vocabulary_sent": vocabulary_sent(compiled.as_text()),
        "logits": logits(compiled.as_text()),
    }


def vocabulary_sent(program: str, also: tuple[int, ...] = ()) -> list[str]:
    """Lists collectives that move an array as long as the vocabulary or a device's part of it.

    also: other lengths that nothing sent may have.
    """
    sent = re.findall(
        r"= \(?([^=()]*)\)? "
        r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        program,
    )
    sizes = {str(size) for size in (V, V // 2, V // 4, V // 8, *also)}
    return [
        f"{kind} {shapes}"
        for shapes, kind in sent
        if sizes & set(re.findall(r"[\[,](\d+)(?=[,\]])", shapes))
    ]


def logits(program: str) -> list[str]:
    """Lists arrays of a compiled program that hold a part of the vocabulary for too many rows.

    More rows than a chunk of the loss has, and than the vocabulary's tables have.
    """
    most = max(CONFIG.loss_rows, SPEC.hidden_size)
    shapes_in_program = {shape for shape in re.findall(r"[a-z]\w*\[([\d,]+)\]", program)}

    def sizes(shape):
        return [int(size) for size in shape.split(",")]

    def parts(shape):
        return [part for part in (V, V // 2, V // 4, V // 8) if part in sizes(shape)]

    return [
        shape
        for shape in shapes_in_program
        if any(math.prod(sizes(shape)) > most * part for part in parts(shape))
    ]


def mesh_of(shape: tuple[int, int, int]) -> Mesh:
    data, fsdp, tensor = shape
    return make_mesh(
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor]
    )


def born_parts(mesh: Mesh, params: dict) -> tuple[dict, float]:
    """Returns the shapes of each device's part of the parameters.

    Also returns how far they are from those made on one device.
    """
    spread = born(partial(fresh_params, SPEC), mesh, jax.random.key(7))
    parts = {name: array.addressable_shards[0].data.shape for name, array in spread.items()}
    return parts, max(
        float(np.abs(np.asarray(spread[name]) - params[name]).max()) for name in params
    )


def planted_gather(mesh: Mesh) -> list[list[str]]:
    """Returns the collectives and logits of a program that gathers logits on every device."""

    def gather(x_MD, head_VD):
        return jax.lax.with_sharding_constraint(x_MD @ head_VD.T, whole(mesh)).sum()

    tables, batch = frozen_and_batch()
    states_MD = batch.inputs_BLI.reshape(-1, SPEC.hidden_size)
    program = (
        jax.jit(gather).lower(states_MD, place(tables, mesh).head_VD).compile(LEVEL_0).as_text()
    )
    return [vocabulary_sent(program), logits(program)]


def planted_parts(mesh: Mesh, params: dict) -> dict:
    """Planted: each device forgets the other devices' parts of the vocabulary."""
    right = losses.over_rows

    def alone(share, function, *arrays):
        return function(share._replace(vocabulary=()), *arrays)

    losses.over_rows = lambda function, *rest: right(
        lambda share, *arrays: alone(share, function, *arrays), *rest
    )
    losses_of_parts = run(mesh, "early", params)
    losses.over_rows = right
    return losses_of_parts


def each_stage(shapes: list[tuple[int, int, int]], params: dict) -> dict:
    return {
        stage: {str(shape): run(mesh_of(shape), stage, params) for shape in [(1, 1, 1), *shapes]}
        for stage in ("early", "late")
    }


def all_axes(params: dict) -> dict:
    """Measures both stages along all axes, planted bugs and new parameters."""
    by_stage = each_stage([ALL_AXES], params)
    by_stage["early"] |= {
        "planted gather": planted_gather(mesh_of((1, 1, 2))),
        "planted parts": planted_parts(mesh_of((1, 1, 2)), params),
    }
    by_stage["early"]["born"] = born_parts(mesh_of(ALL_AXES), params)
    return by_stage


def each_other_way(params: dict) -> dict:
    """Measures both stages on the other meshes, and Muon and EAGLE along all axes."""
    by_stage, eagle, muon = (
        each_stage(REST, params),
        fresh_params(EAGLE, jax.random.key(7)),
        CONFIG.changed(optimizer="muon"),
    )
    by_stage["early"] |= {
        f"muon {shape}": run(mesh_of(shape), "early", params, muon)
        for shape in [(1, 1, 1), ALL_AXES]
    }
    by_stage["late"] |= {
        f"eagle {shape}": run(mesh_of(shape), "eagle", eagle, spec=EAGLE)
        for shape in [(1, 1, 1), ALL_AXES]
    }
    return by_stage


def main(out: str, which: str = "") -> None:
    params = fresh_params(SPEC, jax.random.key(7))
    by_stage = each_other_way(params) if which == "rest" else all_axes(params)
    with open(out, "w") as stream:
        json.dump(by_stage, stream)


if __name__ == "__main__":
    main(*sys.argv[1:])

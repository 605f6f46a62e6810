"""Cost of a late-stage step over an early-stage step on the same batch.

    python benchmarks/late_stage.py

Also measures the late stage in its plain form. For s = 1..5 (window k = s): FLOPs and temporaries
of the compiled program and the median time of a step, each as a ratio to the early step (window 5).
The plain form runs every query at every step over two key banks (method.md 4.1).

FLOPs: the compiler counts the body of a loop once. The chunked loss is therefore left out of its
count and added by formula: three products with the head per supervised position that the stage
visits, in every form alike.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from late_oracle import oracle_states
from train_call import batch_of

from beagle_jax.config import EarlyStage, LateStage, MeshConfig, StageConfig, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.model.packing import of_row
from beagle_jax.sharding import make_mesh
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.late import late_flops, window_queries
from beagle_jax.training.objective import Inputs, Objective, Prediction
from beagle_jax.training.step import (
    TrainState,
    make_optimizer,
    make_steps,
    stage_loss,
)

SPEC = BeagleSpec(
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=1e5,
    rms_norm_eps=1e-5,
)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
VOCAB = 8192  # a reduced head, so that it does not dominate the cost


def predict_plain(params, spec, stage, of: Inputs, offset) -> Prediction:
    """Computes the late stage as the paper describes it.

    Selects the fast form's rows afterwards.
    """
    steps = stage.simulation_steps
    per_step = oracle_states(
        params,
        spec,
        of.embedded(of.tokens_BL),
        of.h_BLI,
        of.length_BC[:, 0],
        window=stage.window,
        steps=steps,
        offset=offset,
        detach=stage.detach,
    )
    at = window_queries(
        of.length_BC - of.first_BC, of.slot_BT.shape[1], stage.window, steps, offset
    )
    gathered = jnp.stack([of_row(per_step[j], at.query_BUJ[:, :, j]) for j in range(steps)], axis=2)
    B, U, _ = at.query_BUJ.shape
    return Prediction(
        gathered.reshape(B, U * steps, -1),
        at.query_BUJ.reshape(B, -1),
        at.valid_BUJ.reshape(B, -1),
        jnp.broadcast_to(jnp.tile(jnp.arange(steps), U), (B, U * steps)),
        jnp.tile(jnp.arange(steps, 0, -1.0), U),
        steps,
    )


PLAIN = Objective(predict_plain, late_flops)


def plain_step(config: TrainConfig, stage: StageConfig):
    """Makes a training step around `predict_plain`."""
    optimizer = make_optimizer(config, stage)

    def step(state: TrainState, frozen, batch: Batch, seed):
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss(params):
            return stage_loss(params, SPEC, config, stage, PLAIN, frozen, batch, key, MESH)

        gradient, metrics = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return TrainState(
            jax.tree.map(jnp.add, state.params, updates), opt_state, state.step + 1
        ), metrics

    return jax.jit(step, donate_argnums=0), lambda params: TrainState(
        params, optimizer.init(params), jnp.int32(0)
    )


def cost(step, init, frozen, batch: Batch, repeats: int) -> tuple[float, float, float]:
    """Returns (compiler FLOPs, temporary bytes, median seconds) of one step."""
    state = init(init_draft(SPEC, jax.random.key(0)))
    compiled = step.lower(state, frozen, batch, 0).compile()
    seconds = []
    for _ in range(repeats + 2):
        clock = time.perf_counter()
        state, _ = step(state, frozen, batch, 0)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - clock)
    return (
        compiled.cost_analysis()["flops"],
        compiled.memory_analysis().temp_size_in_bytes,
        statistics.median(seconds[2:]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--width", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--keep-gradients", action="store_true", help="let gradients flow through predicted states"
    )
    arguments = parser.parse_args()
    config = TrainConfig()
    batch = batch_of(arguments.rows, arguments.width, SPEC.hidden_size, VOCAB)
    table = jax.random.normal(jax.random.key(1), (VOCAB, SPEC.hidden_size)) * 0.1
    frozen = FrozenTarget(table, table)
    head_flops = 3 * 2 * VOCAB * SPEC.hidden_size * float(batch.counted_BT.sum())
    stage = EarlyStage(steps=1000, window=5)
    step, _, init = make_steps(SPEC, config, stage, MESH)
    base = cost(step, init, frozen, batch, arguments.repeats)
    print(
        f"early, k=5: {(base[0] + head_flops) / 1e9:.1f} GFLOP, {base[1] / 1e6:.0f} MB "
        f"temporaries, {base[2]:.3f} s  ({arguments.rows} x {arguments.width}, "
        f"d={SPEC.hidden_size}, V={VOCAB}, jax {jax.__version__}, "
        f"{jax.devices()[0].device_kind})"
    )
    print(f"{'ratio to early':16}{'late 4.5b':^36}{'plain form 4.1':^36}{'tokens/s':>9}")
    print(
        f"{'s':>2}{'':14}{'FLOPs':>9}{'temp':>9}{'time':>9}{'':9}{'FLOPs':>9}{'temp':>9}{'time':>9}{'4.5b/4.1':>9}"
    )
    for s in range(1, 6):
        stage = LateStage(
            steps=1000, window=s, simulation_steps=s, detach=not arguments.keep_gradients
        )
        step, _, init = make_steps(SPEC, config, stage, MESH)
        late = cost(step, init, frozen, batch, arguments.repeats)
        plain = cost(*plain_step(config, stage), frozen, batch, arguments.repeats)

        def ratios(x):
            flops = (x[0] + head_flops) / (base[0] + head_flops)
            return f"{flops:8.2f}x{x[1] / base[1]:8.2f}x{x[2] / base[2]:8.2f}x"

        print(
            f"{s:>2}{'':14}{ratios(late)}{'':9}{ratios(plain)}{plain[2] / late[2]:8.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()

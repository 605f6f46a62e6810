"""Peak memory of a compiled training step against simulated steps s and row length.

    python benchmarks/step_memory.py --plot memory.png

The peak is as the compiler plans it; nothing runs. Four forms of the late step share the same loss
and optimizer: ours with predicted states detached, ours with gradients through them, the plain form
(method.md 4.1: every query at every step over two key banks), and an EAGLE draft of the same sizes
under training-time test (the states of every step are new queries and new keys). Peak: arguments,
outputs and temporaries, with aliases counted once.
"""

import argparse
import itertools
import sys
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from late_stage import MESH, PLAIN

from beagle_jax.config import LateStage, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.training.eagle import TEST_TIME
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.late import LATE
from beagle_jax.training.step import stage_loss

FORMS = {
    "ours, detached": (LATE, True),
    "ours, gradients kept": (LATE, False),
    "plain form": (PLAIN, True),
    "training-time test": (TEST_TIME, False),
}


@lru_cache
def peak(spec: BeagleSpec, vocab: int, form: str, steps: int, rows: int, width: int) -> int:
    """Bytes that the gradient of one late step needs at its peak."""
    objective, detach = FORMS[form]
    stage = LateStage(steps=1000, window=steps, simulation_steps=steps, detach=detach)
    shape = jax.ShapeDtypeStruct
    if objective is TEST_TIME:
        shared = {name: value for name, value in asdict(spec).items() if name != "state_layers"}
        spec = EagleSpec(**shared | {"input_norm": False, "fc_bias": False})
    params = {name: shape(size, jnp.float32) for name, size in spec.param_shapes().items()}
    table = shape((vocab, spec.hidden_size), jnp.float32)

    def ints(*size):
        return shape(size, jnp.int32)

    batch = Batch(
        ints(rows, width),
        shape((rows, width, spec.hidden_size), jnp.float32),
        shape((rows, width), bool),
        ints(rows, 1),
        ints(rows, 1),
    )
    loss = partial(stage_loss, mesh=MESH)
    gradient = jax.grad(
        lambda p, frozen, batch, key: loss(
            p, spec, TrainConfig(), stage, objective, frozen, batch, key
        )[0]
    )
    key = jax.eval_shape(jax.random.key, 0)
    planned = (
        jax.jit(gradient)
        .lower(params, FrozenTarget(table, table), batch, key)
        .compile()
        .memory_analysis()
    )
    sizes = (
        planned.argument_size_in_bytes,
        planned.output_size_in_bytes,
        planned.temp_size_in_bytes,
        -planned.alias_size_in_bytes,
    )
    return sum(sizes)


def measure(
    spec: BeagleSpec, vocab: int, rows: int, steps: list[int], widths: list[int], at_steps: int
) -> dict[str, dict]:
    """Returns {"s": {form: [bytes]}, "width": {form: [bytes]}} and prints both as tables.

    The tables are in MB and as ratios to the first column.
    """
    peaks: dict[str, dict] = {
        "s": {form: [] for form in FORMS},
        "width": {form: [] for form in FORMS},
    }
    places = [("s", s, widths[0]) for s in steps] + [("width", at_steps, width) for width in widths]
    for form, (axis, s, width) in tqdm(
        list(itertools.product(FORMS, places)), desc="compiling", unit="program"
    ):
        peaks[axis][form].append(peak(spec, vocab, form, s, rows, width))
    for axis, places in (("s", steps), ("width", widths)):
        print(
            f"peak of the step, MB ({rows} rows; "
            + (f"width {widths[0]})" if axis == "s" else f"s = {at_steps})")
        )
        print(f"{axis:24}" + "".join(f"{place:>16}" for place in places))
        for form, sizes in peaks[axis].items():
            print(
                f"{form:24}"
                + "".join(f"{size / 1e6:8.1f} {size / sizes[0]:6.2f}x" for size in sizes)
            )
    return peaks


def plot(peaks: dict, steps: list[int], widths: list[int], path: str) -> None:
    """Plots both tables as curves."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (axis, places) in zip(
        figure.subplots(1, 2), (("s", steps), ("width", widths)), strict=True
    ):
        for form, sizes in peaks[axis].items():
            axes.plot(places, [size / 1e6 for size in sizes], "o-", label=form)
        axes.set(
            xlabel="simulated steps s" if axis == "s" else "row length, tokens",
            ylabel="peak of the step, MB",
            ylim=(0, None),
        )
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=8,
        help="of a batch; with one, gradients of weights outweigh the states",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=list(range(1, 9)))
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--at-steps", type=int, default=4, help="s of the curve over widths")
    parser.add_argument("--plot", help="a .png or .svg to write")
    arguments = parser.parse_args()
    spec = BeagleSpec(
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
    )
    peaks = measure(
        spec, 8192, arguments.rows, arguments.steps, arguments.widths, arguments.at_steps
    )
    if arguments.plot:
        plot(peaks, arguments.steps, arguments.widths, arguments.plot)


if __name__ == "__main__":
    main()

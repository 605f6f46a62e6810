"""Training steps per second, next to PyTorch.

    python benchmarks/train_step.py    # default sizes, float32
    python benchmarks/train_step.py --rows 16 --width 2048 --hidden 4096 --inner 11008 \\
        --heads 32 --kv-heads 32 --vocab 32000

Both stages of Beagle and of EAGLE in JAX, and the EAGLE step in torch: one process, one batch, the
same sizes, in turns; medians. Ours (this library, jax) scores supervised positions only, in chunks.
Theirs is benchmarks/torch_eagle.py, eager and with torch.compile where that works. Tokens/s count
all tokens of the rows.
"""

import argparse
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from torch_eagle import EagleBlock, train_step
from train_call import batch_of, step_call

from beagle_jax.config import EarlyStage, LateStage, StageConfig, TestTimeStage, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.kinds import OBJECTIVES


def ours(spec: BeagleSpec, batch: Batch, table: np.ndarray, steps: int):
    """Returns a call that runs one training step in JAX; steps = 0 is the early stage."""
    stage: StageConfig = EarlyStage(steps=1000, window=5)
    if steps:
        stage = LateStage(steps=1000, window=steps, simulation_steps=steps)
    if steps and "late" not in OBJECTIVES[spec.kind]:
        stage = TestTimeStage(steps=1000, simulation_steps=steps)
    return step_call(spec, batch, FrozenTarget(table, table), TrainConfig(), stage)


def theirs(spec: BeagleSpec, batch: Batch, table: np.ndarray, steps: int, compile_it: bool):
    """Returns the same in PyTorch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def put(x):
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    block = EagleBlock(
        spec.hidden_size,
        spec.intermediate_size,
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        spec.rope_theta,
        spec.rms_norm_eps,
    ).to(device)
    optimizer = torch.optim.AdamW(block.parameters(), lr=3e-5, betas=(0.9, 0.95), weight_decay=0.0)
    e_BLD, inputs = (
        put(table[batch.tokens_BL]),
        [put(x) for x in (batch.inputs_BLI, batch.counted_BT, table)],
    )
    step = train_step(block, optimizer, compile_it, steps)

    def run() -> None:
        step(e_BLD, *inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def seconds_of(runs: dict, repeats: int) -> dict[str, float]:
    """Returns median seconds of each run, in turns.

    Leaves out a run that fails and prints the reason.
    """
    times: dict[str, list[float]] = {}
    for name, run in runs.items():
        try:
            run()
            run()
            times[name] = []
        except (RuntimeError, torch.cuda.OutOfMemoryError, jax.errors.JaxRuntimeError) as error:
            print(f"{name}: does not run here ({str(error).splitlines()[0]})")
    for _ in range(repeats):
        for name in times:
            clock = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - clock)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure(
    spec: BeagleSpec, vocab: int, rows: int, width: int, steps: int, repeats: int, compile_it: bool
) -> dict[str, float]:
    """Prints the table and returns seconds by name."""
    batch = batch_of(rows, width, spec.hidden_size, vocab)
    table = 0.1 * np.random.default_rng(1).standard_normal(
        (vocab, spec.hidden_size), dtype=np.float32
    )
    sizes = {name: value for name, value in asdict(spec).items() if name != "state_layers"}
    kinds = {
        "beagle": spec,
        "eagle": EagleSpec(**sizes | {"input_norm": False, "fc_bias": False}),
    }
    runs = {
        f"{kind} {name}": ours(kind_spec, batch, table, count)
        for kind, kind_spec in kinds.items()
        for name, count in (("early", 0), (f"late s={steps}", steps))
    }
    for how in ("eager", "compiled") if compile_it else ("eager",):
        runs[f"torch EAGLE {how}"] = theirs(spec, batch, table, 1, how == "compiled")
        runs[f"torch EAGLE {how} s={steps}"] = theirs(spec, batch, table, steps, how == "compiled")
    times = seconds_of(runs, repeats)
    print(
        f"{rows} x {width}, d={spec.hidden_size}, V={vocab}, float32, jax {jax.__version__} on "
        f"{jax.devices()[0].device_kind}, torch {torch.__version__} on "
        f"{torch.get_num_threads()} threads or cuda={torch.cuda.is_available()}"
    )
    for name, seconds in times.items():
        print(f"{name:28}{1 / seconds:9.3f} steps/s{rows * width / seconds:12.0f} tokens/s")
    for stage, plain in (("beagle early", ""), (f"beagle late s={steps}", f" s={steps}")):
        best = min(
            seconds
            for name, seconds in times.items()
            if name.startswith("torch") and name.endswith(f"s={steps}") == bool(plain)
        )
        print(
            f"{stage}: {best / times[stage]:.2f} times the tokens/s of the faster torch step{plain}"
        )
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = dict(
        rows=4,
        width=240,
        hidden=576,
        inner=1536,
        heads=9,
        kv_heads=3,
        vocab=8192,
        steps=4,
        repeats=5,
    )
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    spec = BeagleSpec(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.inner,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        head_dim=arguments.hidden // arguments.heads,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
    )
    measure(
        spec,
        arguments.vocab,
        arguments.rows,
        arguments.width,
        arguments.steps,
        arguments.repeats,
        not arguments.no_compile,
    )


if __name__ == "__main__":
    main()

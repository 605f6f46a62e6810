"""Training steps per second, next to PyTorch.

    python benchmarks/train_step.py    # default sizes, float32
    python benchmarks/train_step.py --rows 16 --width 2048 --hidden 4096 --inner 11008 \\
        --heads 32 --kv-heads 32 --vocab 32000

Both stages of Beagle and of EAGLE in JAX, and the EAGLE step in torch: one process, one batch, the
same sizes, in turns; medians. Ratios are medians over turns, each of two runs of the same turn,
with 95 % intervals by bootstrap. --short measures only what they compare: Beagle, its late stage in
the plain form (benchmarks/late_stage.py), and torch with torch.compile. Ours (this library, jax)
scores supervised positions only, in chunks. Theirs is benchmarks/torch_eagle.py, eager and with
torch.compile where that works. Tokens/s count all tokens of the rows.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from beside import interval
from torch_eagle import EagleBlock, train_step
from train_call import batch_of, step_call

from beagle_jax.config import EarlyStage, LateStage, StageConfig, TestTimeStage, TrainConfig
from beagle_jax.data.loader import Batch
from beagle_jax.model.beagle import BeagleSpec
from beagle_jax.model.eagle import EagleSpec
from beagle_jax.model.kinds import fresh_params
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


def plain_late(batch: Batch, table: np.ndarray, steps: int):
    """Returns a call that runs one late step in the plain form, at the drafter's sizes."""
    from late_stage import SPEC, plain_step

    stage = LateStage(steps=1000, window=steps, simulation_steps=steps)
    step, init = plain_step(TrainConfig(), stage)
    frozen, batch = jax.device_put((FrozenTarget(table, table), batch))
    state = init(fresh_params(SPEC, jax.random.key(0)))

    def run() -> None:
        nonlocal state
        state, _ = step(state, frozen, batch, 0)
        jax.block_until_ready(state)

    return run


def seconds_of(runs: dict, repeats: int) -> dict[str, list[float]]:
    """Returns seconds of each run, by turn.

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
    for turn in range(repeats):
        for name in list(times)[:: -1 if turn % 2 else 1]:
            clock = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - clock)
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """Returns how many times the tokens/s of `slow` the run `fast` has, with its interval."""
    turns = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    low, high = interval(turns)
    return {"ratio": statistics.median(turns), "low": low, "high": high}


def measure(
    spec: BeagleSpec,
    vocab: int,
    rows: int,
    width: int,
    steps: int,
    repeats: int,
    compile_it: bool,
    short: bool = False,
) -> dict[str, list[float]]:
    """Prints the table and returns seconds by name and turn."""
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
        if kind == "beagle" or not short
    }
    if short:
        runs[f"beagle plain form s={steps}"] = plain_late(batch, table, steps)
    for how in ("compiled",) if short else ("eager", "compiled") if compile_it else ("eager",):
        runs[f"torch EAGLE {how}"] = theirs(spec, batch, table, 1, how == "compiled")
        runs[f"torch EAGLE {how} s={steps}"] = theirs(spec, batch, table, steps, how == "compiled")
    times = seconds_of(runs, repeats)
    print(
        f"{rows} x {width}, d={spec.hidden_size}, V={vocab}, float32, jax {jax.__version__} on "
        f"{jax.devices()[0].device_kind}, torch {torch.__version__} on "
        f"{torch.get_num_threads()} threads or cuda={torch.cuda.is_available()}"
    )
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in medians.items():
        print(f"{name:28}{1 / seconds:9.3f} steps/s{rows * width / seconds:12.0f} tokens/s")
    for stage, plain in (("beagle early", ""), (f"beagle late s={steps}", f" s={steps}")):
        best = min(
            (
                name
                for name in times
                if name.startswith("torch") and name.endswith(f"s={steps}") == bool(plain)
            ),
            key=medians.__getitem__,
        )
        print(
            f"{stage}: {shown(ratio(times, best, stage))} times the tokens/s of the faster torch "
            f"step{plain}"
        )
    return times


def shown(made: dict[str, float]) -> str:
    return f"{made['ratio']:.2f} [{made['low']:.2f}, {made['high']:.2f}]"


def figures(times: dict[str, list[float]], rows: int, width: int, steps: int) -> dict:
    """Returns what --json writes. The plain form is measured with --short."""
    early, late = "beagle early", f"beagle late s={steps}"
    compared = {
        "early_over_torch_compiled": ("torch EAGLE compiled", early),
        "late_over_torch_compiled": (f"torch EAGLE compiled s={steps}", late),
        "late_over_plain_form": (f"beagle plain form s={steps}", late),
    }
    return {
        "sizes": {"rows": rows, "width": width, "steps": steps},
        "turns": len(times[early]),
        "tokens_per_second": {
            name: rows * width / statistics.median(seconds) for name, seconds in times.items()
        },
        **{
            name: ratio(times, *pair)
            for name, pair in compared.items()
            if times.keys() >= set(pair)
        },
        "load_average": os.getloadavg(),
        "jax": jax.__version__,
        "torch": torch.__version__,
    }


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
    parser.add_argument("--short", action="store_true", help="only what the ratios compare")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    arguments = parser.parse_args()
    if arguments.short and arguments.no_compile:
        parser.error("--short measures the compiled torch step; leave out --no-compile")
    spec = BeagleSpec(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.inner,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        head_dim=arguments.hidden // arguments.heads,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
    )
    times = measure(
        spec,
        arguments.vocab,
        arguments.rows,
        arguments.width,
        arguments.steps,
        arguments.repeats,
        not arguments.no_compile,
        arguments.short,
    )
    if arguments.json:
        made = figures(times, arguments.rows, arguments.width, arguments.steps)
        arguments.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()

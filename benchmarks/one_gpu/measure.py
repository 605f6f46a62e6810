"""Measures this device part by part: python -m benchmarks.one_gpu.measure OUT PHASE

PHASE is measure or unbuffered. Run by `__main__.py`, which stops it when its time is over. Each
part is written as soon as it is measured, and existing parts are not measured again. Weights are
random: their values do not change the time of a step. Compilation and the first calls are excluded
from the figures.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from beagle_jax.config import Config, load_config
from beagle_jax.decoding.timing import PASSES, Passes, verifying
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.decoding.tuning import machine
from beagle_jax.errors import run_main
from beagle_jax.hardware import Chip, chip_of, unknown_chip
from beagle_jax.model.target import head
from beagle_jax.training.cost import row_flops
from beagle_jax.training.frozen import FrozenTarget
from benchmarks.large_shapes import (
    SHAPES,
    bytes_read,
    draft_times,
    random_draft,
    random_target,
    round_time,
)
from benchmarks.one_gpu.parts import finish, is_finished, read_parts, read_settings
from benchmarks.one_gpu.schedule import Part, Plan, parts_of
from benchmarks.train_call import batch_of, step_call

REPEATS = 7
# On a GPU the first call warms up, the second builds command buffers, the third may update them.
DISCARDED = 3
NEW_TOKENS = 96
_TOY_NEW_TOKENS = 12
_MATMUL = {True: 256, False: 8192}  # width of the matrices, by `toy`
_COPY = {True: 2**18, False: 2**29}  # numbers copied, by `toy`


def median_ms(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median milliseconds of a call.

    Excludes the call that compiles and the discarded ones.
    """
    for _ in range(1 + DISCARDED * (jax.default_backend() != "cpu")):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        clock = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - clock)
    return 1000 * statistics.median(seconds)


def pass_ms(work: Passes) -> float:
    """Median milliseconds of one pass of a call that makes several (decoding/timing.py)."""
    return median_ms(work.call) / work.count


def device(toy: bool) -> dict[str, Any]:
    """Returns the device, its software, and the rates of a matrix product and a copy on it."""
    first = jax.devices()[0]
    chip = chip_of(first.device_kind)
    N, count = _MATMUL[toy], _COPY[toy]
    if chip is None:
        print(unknown_chip(first.device_kind))
    return {
        "machine": machine(),
        "device_kind": first.device_kind,
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "driver": _driver(),
        "memory_bytes": (first.memory_stats() or {}).get("bytes_limit"),
        "published": chip._asdict() if chip else unknown_chip(first.device_kind),
        "matmul": {"shape": [N, N, N], "dtypes": {name: _matmul(N, name) for name in _DTYPES}},
        "copy": {"bytes": 4 * count, "bytes_per_second": _copy(count)},
        "date": time.strftime("%Y-%m-%d"),
    }


_DTYPES = ("bfloat16", "float32")  # float32 at XLA's default precision


def _driver() -> str | None:
    """Returns driver and memory as nvidia-smi reports them; None if it is not installed."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def _matmul(N: int, dtype: str) -> float:
    """Operations per second of successive products of random square matrices."""
    x, w = (jax.random.normal(jax.random.key(k), (N, N), jnp.dtype(dtype)) for k in (0, 1))
    w = (w * N**-0.5).astype(w.dtype)  # so that products keep their scale
    chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, PASSES, lambda _, x: x @ w, x))
    return 2 * N**3 / (pass_ms(Passes(lambda: chain(x, w), PASSES)) / 1000)


def _copy(count: int) -> float:
    """Bytes per second, read and written, of adding one to an array."""
    x = jnp.zeros(count, jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / (median_ms(lambda: add(x)) / 1000)


class Bench:
    """A target and a draft of a plan's shapes, made when a part first needs them."""

    def __init__(self, plan: Plan, toy: bool):
        self.plan, self.toy = plan, toy
        self.spec = SHAPES[plan.shape]
        self.config: Config = load_config(plan.config)
        self.dtype = jnp.dtype(plan.dtype)
        self.new_tokens = _TOY_NEW_TOKENS if toy else NEW_TOKENS
        self.hot_tokens = 0 if toy else self.config.draft.hot_tokens
        self.chip: Chip | None = chip_of(jax.devices()[0].device_kind)

    @cached_property
    def target(self):
        return random_target(self.spec, self.dtype)

    @cached_property
    def draft(self):
        return random_draft(self.spec, self.dtype, self.hot_tokens)

    def measure(self, part: Part) -> dict[str, Any]:
        """Returns the figures of one part."""
        if part.kind == "plain":
            return self._plain()
        if part.kind == "round":
            tree = dynamic_tree(*part.tree)
            timed = round_time(self.target, self.draft, tree, self.new_tokens, DISCARDED)
            return {**timed, "tree": list(part.tree), "hot_tokens": self.hot_tokens}
        if part.kind == "verify":
            return {"milliseconds": pass_ms(verifying(self.target, part.rows)), "rows": part.rows}
        if part.kind == "draft":
            first, further = draft_times(self.target, self.draft, part.tree[1], pass_ms)
            return {"first_level_ms": first, "further_level_ms": further, "topk": part.tree[1]}
        return self._training(part.kind)

    def _plain(self) -> dict[str, Any]:
        """Measures a step of plain decoding, next to the time to read the weights once."""
        timed = round_time(self.target, None, None, self.new_tokens, DISCARDED)
        weight_bytes = bytes_read(self.target)
        floor = 1000 * weight_bytes / self.chip.bandwidth if self.chip else None
        return {
            **timed,
            "weight_bytes_read": weight_bytes,
            "floor_ms": floor,
            "over_floor": floor and timed["milliseconds"] / floor,
        }

    def _training(self, name: str) -> dict[str, Any]:
        """Measures a training step of the plan's config.

        It has half the rows where memory is too small.
        """
        rows, width = self.config.train.batch, self.config.train.row_tokens
        rows, width = (2, 32) if self.toy else (rows, width)
        refused = []
        while True:
            try:
                return self._training_step(name, rows, width) | {"rows_refused": refused}
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or rows == 1:
                    raise
                refused, rows = [*refused, rows], rows // 2

    def _training_step(self, name: str, rows: int, width: int) -> dict[str, Any]:
        train, spec = self.config.train, self.draft.spec
        stage = getattr(train, name)
        head_VD = head(self.target.params)[: self.hot_tokens or None]
        frozen = FrozenTarget(self.target.params["embed_VD"], head_VD)
        batch = batch_of(rows, width, spec.hidden_size, self.spec.vocab_size, prompt=0)
        stored = ml_dtypes.bfloat16 if self.dtype == jnp.bfloat16 else np.float32
        batch = batch._replace(inputs_BLI=batch.inputs_BLI.astype(stored))
        milliseconds = median_ms(step_call(spec, batch, frozen, train, stage))
        vocab = len(head_VD)
        flops = rows * row_flops(spec, stage, vocab, width, width)
        rate = 1000 * flops / milliseconds
        return {
            "milliseconds": milliseconds,
            "rows": rows,
            "row_tokens": width,
            "tokens_per_second": 1000 * rows * width / milliseconds,
            "flops": flops,
            "flops_per_second": rate,
            "share_of_bfloat16_peak": _share(rate, self.chip and self.chip.bfloat16),
            "share_of_float32_peak": _share(rate, self.chip and self.chip.float32),
            "optimizer": train.optimizer,
            "scored_tokens": vocab,
            "states_dtype": np.dtype(stored).name,
            "weights_dtype": "float32",
        }


def _share(rate: float, peak: float | None) -> float | None:
    return rate / peak if peak else None


def run(out: Path, phase: str) -> None:
    """Measures every part of the phase that does not exist yet; records failures and goes on."""
    settings, there = read_settings(out), read_parts(out)
    name = f"{phase}-device"
    if not is_finished(there.get(name)):
        finish(out, name, device(settings.toy))
    bench: Bench | None = None
    for part in parts_of(phase, settings.toy):
        name = f"{phase}-{part.name}"
        if is_finished(there.get(name)):
            continue
        if bench is None or bench.plan is not part.plan:
            bench = None  # frees the previous weights
            bench = Bench(part.plan, settings.toy)
        clock = time.perf_counter()
        try:
            figures = bench.measure(part)
        except jax.errors.JaxRuntimeError as error:
            figures = {"error": str(error).splitlines()[0][:300]}
        about = {"shape": part.plan.shape, "dtype": part.plan.dtype, "kind": part.kind}
        seconds = {"seconds_with_compilation": round(time.perf_counter() - clock, 2)}
        finish(out, name, about | figures | seconds)
        print(f"{name}: {figures}", flush=True)


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    run(Path(argv[0]), argv[1])


if __name__ == "__main__":
    sys.exit(run_main(main))

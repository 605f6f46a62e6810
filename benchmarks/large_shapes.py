"""Where the time of a round goes in the shapes of Llama-2-7B, Llama-3-8B and others.

    python benchmarks/large_shapes.py --shapes llama2-7b llama3-8b
    python benchmarks/large_shapes.py --shapes toy          # runs anywhere

Weights are random. Measures plain decoding against the bandwidth floor (bytes of weights over the
device's bandwidth, --bandwidth in GB/s), verification of 1 to 128 tokens, one draft level, and a
whole round of EAGLE-2's tree. Prints the speedup that this round would give at the tau of the
paper's Table 1 (MT-Bench). Run it again with XLA_FLAGS=--xla_gpu_enable_command_buffer= to measure
the effect of command buffers; it prints the flags in force. `bash launch/one_gpu.sh` measures all
this and more, part by part.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.kinds import trained_drafter
from beagle_jax.decoding.timing import Passes, drafting, milliseconds, small_tree, verifying
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.decoding.tuning import machine
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.model.target import TargetSpec
from beagle_jax.model.tensors import param_table
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "shapes"
_FILES = {
    "llama2-7b": "llama_2_7b.json",
    "llama3-8b": "llama_3_8b.json",
    "smollm2-135m": "smollm2_135m.json",
}
_TOY = TargetSpec(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    max_positions=1024,
    tie_embeddings=False,
)
SHAPES = {
    name: TargetSpec.from_hf_config(json.loads((_FOLDER / file).read_text()), file)
    for name, file in _FILES.items()
} | {"toy": _TOY}
ROWS = (1, 8, 16, 32, 64, 128)  # tokens verified in one pass
# Beagle on MT-Bench: arXiv 2505.24544, Table 1.
PAPER_TAU = {"llama2-7b": 4.1, "llama3-8b": 3.5}
_ANSWERS = 5  # timed answers
PAPER_SPEEDUP = {"llama2-7b": 3.0, "llama3-8b": 2.5}


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _random(key, shape, dtype):
    return (
        jnp.ones(shape, dtype)
        if len(shape) == 1
        else (0.02 * jax.random.normal(key, shape)).astype(dtype)
    )


def random_target(spec: TargetSpec, dtype) -> Target:
    """Makes a target of these shapes with random weights, on the device, tensor by tensor."""
    params: dict = {"layers": [{} for _ in range(spec.num_layers)]}
    for number, (path, shape) in enumerate(param_table(spec).values()):
        node = params
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = _random(jax.random.key(number), shape, dtype)
    return Target(spec, params, None, (spec.vocab_size,), "random")


def random_draft(spec: TargetSpec, dtype, hot_tokens: int = 0) -> Draft:
    """Makes a random Beagle draft for a target.

    hot_tokens: number of tokens that the draft scores; 0: all.
    """
    draft_spec = BeagleSpec.from_target(spec)
    params = init_draft(draft_spec, jax.random.key(0))
    hot_ids = np.arange(hot_tokens, dtype=np.int32) if hot_tokens else None
    return Draft(draft_spec, jax.tree.map(lambda x: x.astype(dtype), params), hot_ids, {})


def bytes_read(target: Target) -> int:
    """Bytes of weights that a decoding step reads.

    The embedding counts only if it is also the head.
    """
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(target.params))
    return total - (0 if target.spec.tie_embeddings else target.params["embed_VD"].nbytes)


def draft_times(
    target: Target, draft: Draft, topk: int, timed: Callable[[Passes], float] = milliseconds
) -> tuple[float, float]:
    """Milliseconds of the first draft level, and of each further level."""
    drafter = trained_drafter(draft, target.params)
    first, four = (timed(drafting(drafter, small_tree(levels, topk))) for levels in (1, 4))
    return first, (four - first) / 3


def round_time(
    target: Target, draft: Draft | None, tree, new_tokens: int, discarded: int = 1
) -> dict[str, float]:
    """Median milliseconds of a round over whole answers, and tau.

    draft None: of a step of plain decoding.
    """
    decoder = SpeculativeDecoder(target, *([] if draft is None else [draft, tree]))
    runs = [
        decoder.generate([[1] * 32], max_new_tokens=new_tokens)
        for _ in range(1 + discarded + _ANSWERS)  # the first compiles
    ][1 + discarded :]
    seconds = [run.decode_seconds / run[0].rounds for run in runs]
    return {
        "milliseconds": 1000 * float(np.median(seconds)),
        "fastest": 1000 * min(seconds),
        "slowest": 1000 * max(seconds),
        "tau": runs[-1][0].tau,
    }


def measure(name: str, dtype, bandwidth: float | None, tree, new_tokens: int) -> None:
    """Measures one target and prints its table."""
    spec = SHAPES[name]
    target, draft = random_target(spec, dtype), random_draft(spec, dtype)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(target.params)) / 1e9
    print(f"\n{name}, {jnp.dtype(dtype).name}, weights {weights:.2f} GB, {tree}")
    verify = {rows: milliseconds(verifying(target, rows)) for rows in ROWS}
    print(
        "verify, ms by rows:   "
        + "  ".join(f"{rows}: {ms:.2f} ({ms / verify[1]:.2f}x)" for rows, ms in verify.items())
    )
    if bandwidth:
        floor = bytes_read(target) / bandwidth / 1e6
        print(
            f"bandwidth floor:      {floor:.2f} ms at {bandwidth:.0f} GB/s; one row takes "
            f"{verify[1] / floor:.2f} times that"
        )
    first, further = draft_times(target, draft, tree.topk)
    print(
        f"draft, ms:            first level {first:.2f}, each further one {further:.2f} "
        f"(topk {tree.topk})"
    )
    plain = round_time(target, None, None, new_tokens)["milliseconds"]
    speculative = round_time(target, draft, tree, new_tokens)["milliseconds"]
    print(f"round, ms:            plain {plain:.2f}, this tree {speculative:.2f}")
    if name in PAPER_TAU:
        tau = PAPER_TAU[name]
        print(
            f"speedup at tau {tau}:   {tau * plain / speculative:.2f}x (the paper's own, "
            f"PyTorch on an A6000 Ada: {PAPER_SPEEDUP[name]}x)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["toy"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--bandwidth", type=float, help="GB/s of the device's memory")
    parser.add_argument(
        "--tree", type=int, nargs=3, default=[6, 10, 60], metavar=("LEVELS", "TOPK", "NODES")
    )
    parser.add_argument("--new-tokens", type=int, default=96)
    arguments = parser.parse_args()
    print(time.strftime("%Y-%m-%d"), machine(), "XLA_FLAGS=" + os.environ.get("XLA_FLAGS", ""))
    for name in arguments.shapes:
        measure(
            name,
            jnp.dtype(arguments.dtype),
            arguments.bandwidth,
            dynamic_tree(*arguments.tree),
            arguments.new_tokens,
        )


if __name__ == "__main__":
    main()

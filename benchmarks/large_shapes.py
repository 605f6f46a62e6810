"""Where the time of a round goes at the paper's sizes: random weights of Llama-2-7B and Llama-3-8B
shapes, bfloat16.

    python benchmarks/large_shapes.py --shapes llama2-7b llama3-8b
    python benchmarks/large_shapes.py --shapes toy          # runs anywhere

Plain decoding against the bandwidth floor (bytes of the weights over the device's bandwidth,
--bandwidth in GB/s), the cost of verifying 1 to 128 rows, of a draft level, and of a whole round of
EAGLE-2's tree, with the speedup that this round would give at the tau of the paper's Table 1
(MT-Bench). Run it again with XLA_FLAGS=--xla_gpu_enable_command_buffer= to see what command buffers
bring; the flags in force are printed.
"""

import argparse
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.decoding.loop import Models, draft_head_of
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.decoding.tuning import drafting, machine, milliseconds, small_tree, verifying
from beagle_jax.model.beagle import DraftSpec, init_draft
from beagle_jax.model.target import TargetSpec, param_table
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.target import Target

_LLAMA = dict(
    head_dim=128,
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    max_positions=4096,
    tie_embeddings=False,
)
SHAPES = {
    "llama2-7b": TargetSpec(
        **_LLAMA,
        vocab_size=32000,
        intermediate_size=11008,
        num_kv_heads=32,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
    ),
    "llama3-8b": TargetSpec(
        **_LLAMA,
        vocab_size=128256,
        intermediate_size=14336,
        num_kv_heads=8,
        rope_theta=5e5,
        rms_norm_eps=1e-5,
    ),
    "toy": TargetSpec(
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
    ),
}
ROWS = (1, 8, 16, 32, 64, 128)  # that are verified at once
PAPER_TAU = {"llama2-7b": 4.1, "llama3-8b": 3.5}  # Beagle on MT-Bench, method.md 7.2
PAPER_SPEEDUP = {"llama2-7b": 3.0, "llama3-8b": 2.5}


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _random(key, shape, dtype):
    return (
        jnp.ones(shape, dtype)
        if len(shape) == 1
        else (0.02 * jax.random.normal(key, shape)).astype(dtype)
    )


def random_target(spec: TargetSpec, dtype) -> Target:
    """A target of these shapes with random weights, made on the device tensor by tensor."""
    params: dict = {"layers": [{} for _ in range(spec.num_layers)]}
    for number, (path, shape) in enumerate(param_table(spec).values()):
        node = params
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = _random(jax.random.key(number), shape, dtype)
    return Target(spec, params, None, (spec.vocab_size,), "random")


def measure(name: str, dtype, bandwidth: float | None, tree, new_tokens: int) -> None:
    """Prints one table."""
    spec = SHAPES[name]
    target = random_target(spec, dtype)
    draft_spec = DraftSpec.from_target(spec)
    draft = Draft(
        draft_spec,
        jax.tree.map(lambda x: x.astype(dtype), init_draft(draft_spec, jax.random.key(0))),
        None,
        {},
    )
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(target.params)) / 1e9
    print(f"\n{name}, {jnp.dtype(dtype).name}, weights {weights:.2f} GB, {tree}")
    verify = {rows: milliseconds(verifying(target, rows)) for rows in ROWS}
    print(
        "verify, ms by rows:   "
        + "  ".join(f"{rows}: {ms:.2f} ({ms / verify[1]:.2f}x)" for rows, ms in verify.items())
    )
    if bandwidth:
        floor = (
            1000
            * (weights - spec.vocab_size * spec.hidden_size * target.dtype.itemsize / 1e9)
            / bandwidth
        )  # no embedding
        print(
            f"bandwidth floor:      {floor:.2f} ms at {bandwidth:.0f} GB/s; one row takes "
            f"{verify[1] / floor:.2f} times that"
        )
    models = Models(target.params, draft.params, draft_head_of(target.params, None))
    one, many = (
        milliseconds(drafting(target, draft, models, small_tree(levels, tree.topk)))
        for levels in (1, 4)
    )
    print(
        f"draft, ms:            first level {one:.2f}, each further one {(many - one) / 3:.2f} "
        f"(topk {tree.topk})"
    )
    times = {}
    for label, decoder in (
        ("plain", SpeculativeDecoder(target)),
        ("speculative", SpeculativeDecoder(target, draft, tree)),
    ):
        decoder.generate([[1] * 32], max_new_tokens=new_tokens)
        runs = [decoder.generate([[1] * 32], max_new_tokens=new_tokens)[0] for _ in range(4)][1:]
        times[label] = 1000 * float(np.median([run.decode_seconds / run.rounds for run in runs]))
    print(f"round, ms:            plain {times['plain']:.2f}, this tree {times['speculative']:.2f}")
    if name in PAPER_TAU:
        tau = PAPER_TAU[name]
        print(
            f"speedup at tau {tau}:   {tau * times['plain'] / times['speculative']:.2f}x (the "
            f"paper's own, PyTorch on an A6000 Ada: {PAPER_SPEEDUP[name]}x)"
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

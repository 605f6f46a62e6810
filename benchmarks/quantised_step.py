"""Bytes that a plain step of a quantised target reads, as XLA compiles it for a TPU and a GPU.

    # needs libtpu and JAX's CUDA plugin; no TPU or GPU
    JAX_PLATFORMS=cuda,cpu python benchmarks/quantised_step.py \
        --json benchmarks/results/quantised_step.json

Compiles the decode loop of a few layers of Llama-2-7B with the head, as `plan --decode` does, in
bfloat16, int8 and int4. Prints the bytes that one step reads from the device's memory
(`hlo_traffic.py`), the largest array that it writes, and whether that is as large as a weight in
bfloat16. --rows: sequences that decode at once.
"""

import argparse
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import jax
from cases import measured
from hlo_traffic import operations

from beagle_jax.config import Config, DecodeConfig, DraftConfig, MeshConfig, TargetConfig
from beagle_jax.decoding.cost import Programs, abstract_round
from beagle_jax.decoding.tree import ROOT_ONLY
from beagle_jax.sharding import decoding_mesh, make_mesh
from beagle_jax.topology import hidden_warnings, topology_devices
from beagle_jax.weights.shape import planned_spec

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ROOT / "configs" / "shapes" / "llama_2_7b.json"
KINDS = ("none", "int8", "int4")
CONTEXT = 255  # of each row, in a cache of 256 slots


def figures(topology: str, rows: int, quantize: str, *, layers: int) -> dict:
    """Compiles a step and returns what it reads and writes, in bytes."""
    settings = TargetConfig(source="x", shape=str(SHAPE), dtype="bfloat16", quantize=quantize)
    config = Config(target=settings, draft=DraftConfig(path="lookup"), decode=DecodeConfig())
    spec = replace(planned_spec(settings), num_layers=layers)
    devices = topology_devices(topology)[:1]
    mesh = decoding_mesh(make_mesh(MeshConfig(data=1), devices), spec.num_kv_heads)
    now = abstract_round(config, spec, ROOT_ONLY, mesh)
    with hidden_warnings():
        compiled = Programs(now, batch=rows, context=CONTEXT).step().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    made = operations(text, loop=True)
    largest = max(made, key=lambda each: each.bytes_written)
    weight = 2 * spec.hidden_size**2  # the smallest matrix of a layer, in bfloat16
    return {
        "layers": layers,
        "rows": rows,
        "read": sum(each.bytes_read for each in made),
        "written": sum(each.bytes_written for each in made),
        "head": 2 * spec.vocab_size * spec.hidden_size,
        "largest_written": largest.bytes_written,
        "largest_shape": largest.shape.split("{")[0],
        "as_large_as_a_weight": sum(each.bytes_written >= weight for each in made),
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "kernels": len(made),
        "jax": jax.__version__,
    }


def table(entries: dict) -> str:
    """Formats the table that docs/results.md shows."""
    lines = [
        "| chip, rows | weights | read, MB | of bfloat16 | without the head | largest written, MB "
        "| temporaries, MB |\n| -- | -- | -- | -- | -- | -- | -- |"
    ]
    for name, made in entries.items():
        topology, rows, kind = name.split()
        full = entries[f"{topology} {rows} none"]
        share = made["read"] / full["read"]
        bare = (made["read"] - made["head"]) / (full["read"] - full["head"])
        label = "bfloat16" if kind == "none" else kind
        lines.append(
            f"| {topology}, {rows} | {label} | {made['read'] / 1e6:,.0f} | {share:.2f} | "
            f"{bare:.2f} | {made['largest_written'] / 1e6:.1f} | {made['temporaries'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topologies", nargs="+", default=["h100", "v5e:1"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--json", help="where the figures are kept")
    arguments = parser.parse_args()
    cases = product(arguments.topologies, arguments.rows, arguments.kinds)
    made = partial(figures, layers=arguments.layers)
    print(table(measured(cases, made, arguments.json)))


if __name__ == "__main__":
    main()

"""Copies of caches, kernels and compile time of decoding, for devices that are not there.

    JAX_PLATFORMS=cpu python benchmarks/in_place.py --topologies v5e:2x2 h100 cpu

Compiles a plain step, a round of EAGLE-2's tree and the reading of a later chunk of a prompt, with
few layers of Llama-2-7B's shapes (bfloat16, one row, 4,224 slots), for one chip of each topology.
Lists every operation that makes an array of a cache's size or more, at the entry of the program, in
its loop and at its exit. Sizes of weights are left out, because TPUs fetch weights ahead. With two
numbers of layers (--layers 2 3) it also prints the kernels of a layer, and those outside the
layers, of a step and a round. TPUs need libtpu, GPUs JAX's CUDA plugin.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from beagle_jax.config import Config, DraftConfig, MeshConfig, TargetConfig
from beagle_jax.decoding.cost import Programs, abstract_round
from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.model.target import TargetSpec
from beagle_jax.program import copies_of, program_of
from beagle_jax.sharding import decoding_mesh, make_mesh
from beagle_jax.topology import hidden_warnings, topology_devices

SHAPES = Path(__file__).resolve().parent.parent / "configs" / "shapes"
NAMES = ("step", "round", "reading")


def spec_of(shapes: str, layers: int) -> TargetSpec:
    """Reads a file of configs/shapes, with another number of layers."""
    file = SHAPES / f"{shapes}.json"
    return replace(
        TargetSpec.from_hf_config(json.loads(file.read_text()), file.name), num_layers=layers
    )


def measure(topology: str, spec: TargetSpec, tree, context: int, names) -> dict:
    """Compiles programs for one chip of a topology; returns what each of them copies."""
    devices = jax.devices("cpu") if topology == "cpu" else topology_devices(topology)
    mesh = decoding_mesh(make_mesh(MeshConfig(data=1), devices[:1]), spec.num_kv_heads)
    config = Config(target=TargetConfig(source="x", dtype="bfloat16"), draft=DraftConfig())
    now = abstract_round(config, spec, tree, mesh)
    lowered = Programs(now, batch=1, context=context)
    capacity = lowered.capacity
    elements = capacity * spec.num_kv_heads * spec.head_dim
    weights = {int(np.prod(x.shape)) for x in jax.tree.leaves(now)}
    made = {}
    for name in names:
        clock = time.perf_counter()
        with hidden_warnings():
            compiled = getattr(lowered, name)().compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        copies = copies_of(text, elements, weights)
        made[name] = {
            "copies": [copy._asdict() for copy in copies],
            "kernels": program_of(text, loop=name != "reading").kernels,
            "temporaries": memory.temp_size_in_bytes,
            "reused": memory.alias_size_in_bytes,
            "seconds": round(time.perf_counter() - clock, 1),
        }
    return {"capacity": capacity, "cache_bytes": 2 * elements, "programs": made}


def show(title: str, programs: dict) -> None:
    """Prints what each program copies."""
    for name, program in programs.items():
        count = sum(copy["operation"] != "prefetch" for copy in program["copies"])
        print(
            f"{title}, {name}: {count} copies of a cache, {program['kernels']} kernels, "
            f"temporaries {program['temporaries'] / 1e6:.1f} MB, compiled in "
            f"{program['seconds']} s",
            flush=True,
        )
        for copy in program["copies"]:
            print(f"  {copy['where']:6}{copy['operation']:24}{copy['shape']}")


def show_kernels(topology: str, few: dict, many: dict) -> None:
    """Prints kernels of a layer, and of a pass without layers, from two numbers of layers."""
    for name in few["programs"].keys() & many["programs"].keys() - {"reading"}:
        first, last = (made["programs"][name]["kernels"] for made in (few, many))
        a_layer = (last - first) / (many["layers"] - few["layers"])
        outside = first - a_layer * few["layers"]
        print(f"{topology}, {name}: {a_layer:g} kernels a layer, {outside:g} outside the layers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "h100", "cpu"])
    parser.add_argument("--programs", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--shapes", default="llama_2_7b", help="a file of configs/shapes")
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument(
        "--tree", type=int, nargs=3, default=[6, 10, 60], metavar=("LEVELS", "TOPK", "NODES")
    )
    parser.add_argument("--json", help="a file to which the figures are added")
    arguments = parser.parse_args()
    path = Path(arguments.json) if arguments.json else None
    entries = json.loads(path.read_text()) if path and path.exists() else {}
    tree = dynamic_tree(*arguments.tree)
    for topology in arguments.topologies:
        for layers in arguments.layers:
            spec = spec_of(arguments.shapes, layers)
            made = measure(topology, spec, tree, arguments.context, arguments.programs)
            key = f"{topology}, {layers} layers"
            show(key, made["programs"])
            made["programs"] = entries.get(key, {}).get("programs", {}) | made["programs"]
            entries[key] = made | {"layers": layers, "jax": jax.__version__}
            if path:
                path.write_text(json.dumps(entries, indent=1) + "\n")
        few, many = (entries[f"{topology}, {edge(arguments.layers)} layers"] for edge in (min, max))
        if few is not many:
            show_kernels(topology, few, many)


if __name__ == "__main__":
    main()

"""Kernels and conditions of a pass of a target with experts, for devices that are not there.

    # needs libtpu and JAX's CUDA plugin; no TPU or GPU
    JAX_PLATFORMS=cpu python benchmarks/experts_pass.py \
        --json benchmarks/results/experts_pass.json

Compiles the loop of plain steps and of rounds with a tree of 60 nodes for Qwen3-30B-A3B's shapes in
bfloat16 with two and three layers, as `plan --decode` does, in the form of the platform and, for
comparison, in the loop over experts that all platforms had before (`--forms loop`), and with
`jax.lax.ragged_dot` on every platform (`--forms ragged`). These split each expert over the devices
(`mesh.tensor`); `--forms whole` has whole experts on each (`mesh.expert`), in the form of the
platform. The difference of both depths is a layer.
Prints, for each layer: kernels, conditions, bytes that are read, and the temporaries of the
program. A loop over experts counts for each of them, where XLA says how often it runs.
"""

import argparse
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from unittest import mock

import jax
from cases import measured
from hlo_traffic import conditionals, operations

from beagle_jax.config import Config, DraftConfig, MeshConfig, TargetConfig
from beagle_jax.decoding import cost
from beagle_jax.decoding.cost import Programs, abstract_round
from beagle_jax.decoding.tree import ROOT_ONLY, dynamic_tree
from beagle_jax.model import experts
from beagle_jax.model.target import TargetSpec
from beagle_jax.program import program_of
from beagle_jax.sharding import decoding_mesh, make_mesh
from beagle_jax.topology import hidden_warnings, topology_devices

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
}
FORMS = ("platform", "loop", "ragged", "whole")
CONTEXT = 1000
LAYERS = (2, 3)


def compiled(topology: str, form: str, layers: int, nodes: int) -> dict:
    """Compiles a plain step (nodes 1) or a round, and returns its counts."""
    spec = replace(TargetSpec.from_hf_config(QWEN3_30B_A3B, "Qwen3-30B-A3B"), num_layers=layers)
    devices = topology_devices(topology)
    axis = "expert" if form == "whole" else "tensor"
    mesh = make_mesh(MeshConfig(data=1, **{axis: len(devices)}), devices)
    config = Config(target=TargetConfig(source="x", dtype="bfloat16"), draft=DraftConfig())
    tree = ROOT_ONLY if nodes == 1 else dynamic_tree(6, 10, nodes)
    with ExitStack() as changes:
        if form == "loop":
            changes.enter_context(mock.patch.object(cost, "turns_experts", return_value=False))
            changes.enter_context(
                mock.patch.object(experts, "by_platform", lambda on_gpu, elsewhere: elsewhere())
            )
        if form == "ragged":
            changes.enter_context(mock.patch.object(cost, "turns_experts", return_value=True))
        now = abstract_round(config, spec, tree, decoding_mesh(mesh, spec.num_kv_heads))
        programs = Programs(now, batch=1, context=CONTEXT)
        lowered = programs.step() if nodes == 1 else programs.round()
        with hidden_warnings():
            program = lowered.compile()
    text, memory = program.as_text(), program.memory_analysis()
    launched = program_of(text, loop=True)
    return {
        "kernels": launched.kernels,
        "collectives": launched.collectives,
        "conditions": conditionals(text)[0] * spec.experts.count,
        "read": sum(each.bytes_read for each in operations(text, loop=True)),
        "temporaries": memory.temp_size_in_bytes,
    }


def figures(topology: str, nodes: int, form: str) -> dict:
    """Returns the counts of a layer, of what is outside, and of all layers of the model."""
    small, large = (compiled(topology, form, layers, nodes) for layers in LAYERS)
    layer = {key: large[key] - small[key] for key in small}
    count = QWEN3_30B_A3B["num_hidden_layers"]
    whole = {
        key: small[key] + (count - LAYERS[0]) * layer[key] for key in ("kernels", "conditions")
    }
    return {"layer": layer, "small": small, "whole": whole, "jax": jax.__version__}


def table(entries: dict) -> str:
    """Formats the table that docs/results.md shows."""
    lines = [
        "| devices | columns | form | kernels a layer | conditions a layer | of 48 layers | "
        "temporaries, MB |\n| -- | -- | -- | -- | -- | -- | -- |"
    ]
    for name, made in entries.items():
        topology, nodes, form = name.split()
        layer, whole = made["layer"], made["whole"]
        lines.append(
            f"| {topology} | {nodes} | {form} | {layer['kernels']:,} | {layer['conditions']:,} | "
            f"{whole['kernels']:,} kernels, {whole['conditions']:,} conditions | "
            f"{made['small']['temporaries'] / 1e6:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topologies", nargs="+", default=["h100:2", "v5e:2x4"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS[:2]), choices=FORMS)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 60])
    parser.add_argument("--json", help="where the figures are kept")
    arguments = parser.parse_args()
    cases = product(arguments.topologies, arguments.nodes, arguments.forms)
    print(table(measured(cases, figures, arguments.json)))


if __name__ == "__main__":
    main()

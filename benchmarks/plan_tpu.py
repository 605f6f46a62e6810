"""Whether the paper's training steps fit TPUs, compiled without a TPU.

    # needs the tpu extra, Linux on x86
    JAX_PLATFORMS=cpu python benchmarks/plan_tpu.py --json benchmarks/results/plan_tpu.json

Batch rows of 2048 tokens at Llama-2-7B and Llama-3-8B shapes. For each config and topology, libtpu
compiles both stages as `python -m beagle_jax.plan --config CONFIG --topology NAME OVERRIDES` would,
from the repository's root. The memory that the compiler needs on one chip is shown next to the
chip's HBM. Entries of the file that are not planned again are kept, so one table row can be done at
a time.
"""

import argparse
import json
from argparse import Namespace
from pathlib import Path

import jax

from beagle_jax.commands.plan import plan
from beagle_jax.config import load_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("llama2_7b_chat", "llama3_8b_instruct")
TOPOLOGIES = {
    "v5e:4x4": ("mesh.data=1", "mesh.fsdp=16"),
    "v5p:2x2x2": ("mesh.data=1", "mesh.fsdp=8"),
    "v5e:16x16": ("mesh.data=16", "mesh.fsdp=16", "train.batch=256"),
}


def row(config: str, topology: str, figures: dict) -> str:
    """Formats one line of the table."""
    devices, stages = figures["devices"], figures["stages"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in devices["mesh"].items() if size > 1)
    batch = stages["early"]["tokens_a_step"] // 2048
    need = [
        f"{stages[stage]['compiler_total'] / 2**30:.1f}"
        if not stages[stage]["refusal"]
        else "refused"
        for stage in ("early", "late")
    ]
    fits = "yes" if all(cost["fits"] for cost in stages.values()) else "NO"
    return (
        f"| {config} | {topology}, {devices['count']} chips | {mesh} | {batch} x 2048 | "
        f"{' / '.join(need)} | {devices['memory'] / 2**30:.0f} | {fits} |"
    )


def table(entries: dict) -> str:
    """Formats the table that docs/results.md shows."""
    head = (
        "| config | chips | mesh | batch | needed on a chip, GiB: early / late | HBM, GiB | "
        "fits |\n| -- | -- | -- | -- | -- | -- | -- |"
    )
    return "\n".join(
        [head, *(row(*entry.split(), figures) for entry, figures in sorted(entries.items()))]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=CONFIGS)
    parser.add_argument(
        "--topologies", nargs="+", default=list(TOPOLOGIES), choices=list(TOPOLOGIES)
    )
    parser.add_argument("--json", required=True, help="where the figures are kept")
    arguments = parser.parse_args()
    path = Path(arguments.json)
    entries = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.configs:
        for topology in arguments.topologies:
            config = load_config(ROOT / "configs" / f"{name}.yaml", list(TOPOLOGIES[topology]))
            text, figures = plan(config, Namespace(devices=None, topology=topology, decode=False))
            print(f"{name}, {topology}\n{text}\n", flush=True)
            entries[f"{name} {topology}"] = figures | {
                "overrides": TOPOLOGIES[topology],
                "jax": jax.__version__,
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(entries, indent=1) + "\n")
    print(table(entries))


if __name__ == "__main__":
    main()

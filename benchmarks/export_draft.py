"""Time and peak memory of `convert to-torch`, with its parity check.

    python benchmarks/export_draft.py                # Llama-2-7B's shape
    python benchmarks/export_draft.py --shape toy    # runs in seconds on any machine

The draft has random weights, by default of the paper's size: 202,383,360 parameters, 2.5 GB of
disk. A separate process writes it, so that the peak is the converter's alone. Prints time and
memory as shares of --seconds and --gigabytes; the exit status is 1 if either share is above 1.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "llama2-7b": dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
    ),
    "toy": dict(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    ),
}


def write_inputs(folder: Path, shape: str) -> None:
    """Writes the inputs: a target's config, a random draft for it, and the command's config.

    The target's weights are not read.
    """
    import jax
    import numpy as np
    from safetensors.numpy import save_file

    from beagle_jax.model.beagle import BeagleSpec, init_draft
    from beagle_jax.model.target import TargetSpec
    from beagle_jax.weights.draft import Draft, save_draft

    config = {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        **SHAPES[shape],
    }
    (folder / "target").mkdir()
    (folder / "target" / "config.json").write_text(json.dumps(config))
    save_file({"none": np.zeros(1, np.float32)}, folder / "target" / "model.safetensors")
    spec = BeagleSpec.from_target(TargetSpec.from_hf_config(config, "here"))
    save_draft(
        folder / "draft",
        Draft(spec, init_draft(spec, jax.random.key(0)), None, {"target": "random"}),
    )
    (folder / "run.yaml").write_text(
        f"target:\n  source: {folder / 'target'}\ndraft:\n  path: {folder / 'draft'}\n"
    )


def measure(folder: Path, limit_seconds: float, limit_gigabytes: float) -> bool:
    """Exports the draft and prints time and memory; returns whether both are within limits."""
    weights = folder / "draft" / "model.safetensors"
    size = weights.stat().st_size
    clock = time.perf_counter()
    from beagle_jax import convert
    from beagle_jax.errors import run_main

    status = run_main(
        convert.main,
        ["to-torch", "--config", str(folder / "run.yaml"), "--out", str(folder / "out"), "--quiet"],
    )
    seconds = time.perf_counter() - clock
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts KiB
    print(
        f"file {size / 1e9:.2f} GB; export and parity check, imports included: {seconds:.1f} "
        f"s, {seconds / limit_seconds:.2f} of what is allowed; peak memory {gigabytes:.2f} GB, "
        f"{gigabytes / limit_gigabytes:.2f} of what is allowed, {gigabytes * 1e9 / size:.1f} "
        "times the file"
    )
    return status == 0 and seconds <= limit_seconds and gigabytes <= limit_gigabytes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--inputs-only", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inputs_only:
        write_inputs(Path(arguments.inputs_only), arguments.shape)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, __file__, "--shape", arguments.shape, "--inputs-only", folder],
            check=True,
        )
        return 0 if measure(Path(folder), arguments.seconds, arguments.gigabytes) else 1


if __name__ == "__main__":
    sys.exit(main())

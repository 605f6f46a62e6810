"""Time and memory of loading a target, next to the time to read its file.

    python benchmarks/loading.py                    # SmolLM2 of configs/quickstart.yaml
    python benchmarks/loading.py --shape smollm2    # the same shapes, random, bfloat16
    python benchmarks/loading.py --shape 7b         # Llama-2-7B's shapes, bfloat16, 13.5 GB
    python benchmarks/loading.py --source FOLDER --dtype bfloat16

The file is read once through a small buffer and once by the loader. Both read it from the disk: its
pages are dropped from the page cache first. Peak memory is that of a separate process, above its
memory after imports. --shape writes the checkpoint to --folder, where it stays for the next run.
The 7B checkpoint repeats one block of random bytes, so that it occupies disk space; --sparse leaves
the data out, and then only memory is measured, not the disk.
"""

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from beagle_jax.config import load_config
from beagle_jax.model.target import TargetSpec
from beagle_jax.model.tensors import param_table
from beagle_jax.weights.gguf import GGUFFile
from beagle_jax.weights.target import fill_params, open_source

_LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
}
SHAPES = {
    "7b": _LLAMA
    | dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "smollm2": _LLAMA
    | dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "middle": _LLAMA
    | dict(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=16,
    ),
    "toy": _LLAMA
    | dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
}
_FILES = 4  # files of a synthetic checkpoint
_BLOCK = 64 << 20  # bytes of one random block, which is generated once


def write_checkpoint(folder: Path, config: dict, sparse: bool, stored: str = "BF16") -> None:
    """Writes a bfloat16 or float32 checkpoint of random finite numbers, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    table = list(param_table(TargetSpec.from_hf_config(config, str(folder))).items())
    block = (
        np.random.default_rng(0).integers(0, 1 << 10, _BLOCK // 2, np.uint16) | 0x3C00
    ).tobytes()
    for number in range(_FILES):
        header, end = {}, 0
        for name, (_, shape) in table[number::_FILES]:
            size = {"BF16": 2, "F32": 4}[stored] * math.prod(shape)
            header[name] = {"dtype": stored, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with (folder / f"model-{number + 1:05d}-of-{_FILES:05d}.safetensors").open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, 0 if sparse else end, _BLOCK):
                stream.write(block[: min(_BLOCK, end - start)])
            stream.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))


def files_of(source: str) -> list[Path]:
    """Returns the files that hold the weights."""
    opened = open_source(source, Path("~/.cache/beagle_jax").expanduser())
    return (
        [opened.path] if isinstance(opened, GGUFFile) else sorted(opened.path.glob("*.safetensors"))
    )


def forget(files: list[Path]) -> None:
    """Drops the files from the page cache, if the system allows it."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(files: list[Path]) -> float:
    """Returns the seconds to read the files from first to last byte, through a 16 MB buffer."""
    buffer, clock = bytearray(16 << 20), time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - clock


def load(source: str, dtype: str) -> dict[str, float]:
    """Loads in this process; returns seconds, bytes of the arrays, and peak bytes.

    The peak is above the memory after the imports.
    """
    import jax
    import jax.numpy as jnp

    jax.block_until_ready(jnp.zeros(1))
    opened = open_source(source, Path("~/.cache/beagle_jax").expanduser())
    spec = TargetSpec.from_hf_config(opened.config(), source)
    before, clock = peak_bytes(), time.perf_counter()
    params = fill_params(spec, opened, jnp.dtype(dtype), source)
    seconds = time.perf_counter() - clock
    return {
        "seconds": seconds,
        "bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
        "peak": peak_bytes() - before,
    }


def peak_bytes() -> int:
    """Peak memory of this program so far.

    Linux's ru_maxrss would include the memory of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(source: str, dtype: str) -> dict[str, float]:
    """Runs `load` in a separate process, after reading the file."""
    files = files_of(source)
    forget(files)
    reading = read_seconds(files)
    forget(files)
    command = [sys.executable, __file__, "--load", "--source", source, "--dtype", dtype]
    figures = json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[
            -1
        ]
    )
    on_disk = sum(file.stat().st_size for file in files)
    print(
        f"{source}: {on_disk / 1e9:.2f} GB on disk, {figures['bytes'] / 1e9:.2f} GB of "
        f"{dtype} arrays"
    )
    print(
        f"read {reading:.2f} s, load {figures['seconds']:.2f} s: "
        f"{figures['seconds'] / reading:.2f}x; peak memory {figures['peak'] / 1e9:.2f} GB: "
        f"{figures['peak'] / figures['bytes']:.2f}x of the arrays"
    )
    return figures | {"reading": reading}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", help="as target.source; default: that of configs/quickstart.yaml"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--shape", choices=SHAPES, help="write and load a bfloat16 checkpoint of these shapes"
    )
    parser.add_argument("--folder", default="runs/loading", help="where it is kept")
    parser.add_argument("--sparse", action="store_true", help="without data on the disk")
    parser.add_argument("--load", action="store_true", help="load in this process and print JSON")
    arguments = parser.parse_args()
    source, dtype = arguments.source, arguments.dtype
    if arguments.shape:
        source, dtype = str(Path(arguments.folder, arguments.shape)), "bfloat16"
        if not Path(source, "config.json").exists():
            write_checkpoint(Path(source), SHAPES[arguments.shape], arguments.sparse)
    source = source or load_config("configs/quickstart.yaml").target.source
    if arguments.load:
        print(json.dumps(load(source, dtype)))
    else:
        measure(source, dtype)


if __name__ == "__main__":
    main()

"""Loading straight onto devices: what is read, by which process, with how much memory."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_cases import benchmark
from conftest import free_port
from gguf_files import llama_tensors, write_llama
from safetensors.numpy import save_file
from test_gguf import _write_gguf
from tqdm import tqdm
from weight_cases import LLAMA, Held

from beagle_jax.errors import UserError
from beagle_jax.model.target import TargetSpec
from beagle_jax.model.tensors import param_table
from beagle_jax.sharding import tensor_mesh
from beagle_jax.weights import safetensors_file
from beagle_jax.weights import target as target_module
from beagle_jax.weights.gguf import GGUFFile
from beagle_jax.weights.hf import HFFolder
from beagle_jax.weights.safetensors_file import places
from beagle_jax.weights.target import fill_params

SPEC = TargetSpec.from_hf_config(LLAMA, "test")
MOE = TargetSpec.from_hf_config(
    {
        **LLAMA,
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "test",
)


def _folder(path: Path, tensors, dtype=np.float32) -> HFFolder:
    """Writes two files, as large checkpoints have."""
    names = sorted(tensors)
    for number in range(2):
        save_file(
            {name: tensors[name].astype(dtype) for name in names[number::2]},
            path / f"model-{number}.safetensors",
        )
    return HFFolder(path)


def _equal(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [np.float32, np.float16, jnp.bfloat16])
def test_arrays_are_those_of_the_files(tmp_path, stored, dtype):
    tensors = llama_tensors()
    params = fill_params(SPEC, _folder(tmp_path, tensors, stored), jnp.dtype(dtype), "here")
    _equal(
        params,
        fill_params(
            SPEC,
            Held((name, x.astype(stored)) for name, x in tensors.items()),
            jnp.dtype(dtype),
            "here",
        ),
    )
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def _moe_tensors():
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32)
        for name, (_, shape) in param_table(MOE).items()
    }


on_two_devices = pytest.mark.skipif(
    jax.device_count() < 2,
    reason="needs two devices: the next test runs it in a process that has them",
)


def test_with_two_devices():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "mesh",
    ]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout


@on_two_devices
@pytest.mark.parametrize("experts", [False, True])
def test_a_mesh_of_devices_gets_its_parts_and_no_more_is_read(tmp_path, experts, monkeypatch):
    spec, tensors = (MOE, _moe_tensors()) if experts else (SPEC, llama_tensors())
    opened, mesh, parts = _folder(tmp_path, tensors), tensor_mesh(2), []
    monkeypatch.setattr(
        HFFolder,
        "read",
        lambda self, name, index, dtype: parts.append(_read(self, name, index, dtype)) or parts[-1],
    )
    params = fill_params(spec, opened, jnp.dtype("float32"), "here", mesh)
    _equal(params, fill_params(spec, Held(tensors.items()), jnp.dtype("float32"), "here"))
    layer = params["layers"][1]
    split = {"q_FD": 0, "o_DF": 1} | (
        {"gate_EFD": 1, "down_EDF": 2} if experts else {"gate_FD": 0, "down_DF": 1}
    )
    for key, dimension in split.items():
        whole, part = layer[key].shape, layer[key].addressable_shards[0].data.shape
        assert part == (*whole[:dimension], whole[dimension] // 2, *whole[dimension + 1 :]), key
    # Each byte once, though every device holds the norms.
    assert sum(part.nbytes for part in parts) == sum(x.nbytes for x in tensors.values())


_read = HFFolder.read


@on_two_devices
def test_planted_bug_a_mesh_with_parts_from_the_wrong_place(tmp_path, monkeypatch):
    tensors = llama_tensors()

    def shifted(self, name, index, dtype):
        return _read(self, name, (slice(None), *index[1:]), dtype)[: len(range(64)[index[0]])]

    monkeypatch.setattr(HFFolder, "read", lambda *a: shifted(*a) if "q_proj" in a[1] else _read(*a))
    params = fill_params(
        SPEC, _folder(tmp_path, tensors), jnp.dtype("float32"), "here", tensor_mesh(2)
    )
    with pytest.raises(AssertionError):
        _equal(params, fill_params(SPEC, Held(tensors.items()), jnp.dtype("float32"), "here"))


def test_any_part_of_a_tensor(tmp_path):
    array = np.arange(60, dtype=np.float32).reshape(6, 10)
    save_file({"before": np.ones(7, np.float32), "x": array}, tmp_path / "model.safetensors")
    place = places(tmp_path / "model.safetensors")["x"]
    for index in [
        (slice(None), slice(None)),
        (slice(2, 5), slice(None)),
        (slice(None), slice(3, 8)),
        (slice(1, 2), slice(9, 10)),
    ]:
        for dtype in (np.float32, jnp.bfloat16):
            values = place.read(index, np.dtype(dtype))
            np.testing.assert_array_equal(values, array[index].astype(dtype))
            assert values.ctypes.data % 64 == 0 and values.flags.c_contiguous


def test_a_tensor_is_read_in_pieces(tmp_path, monkeypatch):
    array = np.arange(7 * 40, dtype=np.float32).reshape(7, 40)
    save_file({"before": np.ones(7, np.float32), "x": array}, tmp_path / "model.safetensors")
    monkeypatch.setattr(safetensors_file, "_PIECE", 100)  # neither a row nor a part of one
    monkeypatch.setattr(safetensors_file, "_VALUES", 30)
    for dtype in (np.float32, jnp.bfloat16):
        values = places(tmp_path / "model.safetensors")["x"].read(
            (slice(1, 6), slice(None)), np.dtype(dtype)
        )
        np.testing.assert_array_equal(values, array[1:6].astype(dtype))
        assert values.ctypes.data % 64 == 0


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"x": np.ones((8, 8), np.float32)}, tmp_path / "model.safetensors")
    place = places(tmp_path / "model.safetensors")["x"]
    (tmp_path / "model.safetensors").write_bytes(
        (tmp_path / "model.safetensors").read_bytes()[:-100]
    )
    with pytest.raises(UserError, match="ends in the middle of a tensor, 100 bytes early"):
        place.read((slice(None), slice(None)), np.dtype(np.float32))


@pytest.mark.parametrize(
    ("stored", "width"), [("F8_E4M3", 1), ("F8_E5M2", 1), ("I8", 1), ("F64", 8)]
)
def test_what_is_no_weights_dtype_is_refused_by_the_tensor_s_name(tmp_path, stored, width):
    def entry(dtype, start, end):
        return {"dtype": dtype, "shape": [4], "data_offsets": [start, end]}

    header = json.dumps(
        {
            "model.norm.weight": entry("F32", 0, 16),
            "lm_head.weight": entry(stored, 16, 16 + 4 * width),
        }
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(16 + 4 * width)
    )
    with pytest.raises(
        UserError,
        match=f"model.safetensors: tensor lm_head.weight is stored as {stored}; expected F32 or "
        "F16 or BF16",
    ):
        fill_params(SPEC, HFFolder(tmp_path), jnp.dtype("float32"), "here")


def test_loading_shows_a_bar_that_ends_full(tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(
        target_module,
        "tqdm",
        lambda **named: bars.append(tqdm(**named, disable=False, file=io.StringIO())) or bars[-1],
    )
    params = fill_params(SPEC, _folder(tmp_path, llama_tensors()), jnp.dtype("bfloat16"), "here")
    (bar,) = bars
    assert bar.desc == "loading target" and bar.n == bar.total == sum(
        x.nbytes for x in jax.tree.leaves(params)
    )


# Each of two processes loads its half: it prints the bytes that it read.
_PROCESS = """
import sys, jax
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
import jax.numpy as jnp
from beagle_jax.model.target import TargetSpec
from beagle_jax.sharding import tensor_mesh
from beagle_jax.weights.hf import HFFolder
from beagle_jax.weights.target import fill_params
read, count = HFFolder.read, []
HFFolder.read = lambda *a: count.append(read(*a)) or count[-1]
opened = HFFolder(__import__("pathlib").Path(sys.argv[2]))
spec = TargetSpec.from_hf_config(opened.config(), "x")
fill_params(spec, opened, jnp.dtype("float32"), "x", tensor_mesh(2))
print(sum(part.nbytes for part in count))
"""


def test_each_process_reads_only_what_it_holds(tmp_path):
    tensors = llama_tensors()
    _folder(tmp_path, tensors)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    command = [sys.executable, "-c", _PROCESS.format(port=free_port())]
    environment = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ":".join(filter(None, sys.path)),
        "PATH": "/usr/bin:/bin",
    }
    running = [
        subprocess.Popen(
            [*command, str(n), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for n in range(2)
    ]
    bytes_read = [int(process.communicate(timeout=120)[0].split()[-1]) for process in running]
    whole = sum(x.nbytes for x in tensors.values())
    norms = sum(x.nbytes for name, x in tensors.items() if "norm" in name)
    assert bytes_read == [(whole - norms) // 2 + norms] * 2


# Memory. Twice the arrays, as when all are held on the host first, is the planted bug.
_HOLD_ALL = """
import sys; sys.path[:0] = [{tests!r}, {benchmarks!r}]
import json, loading, jax.numpy as jnp
from beagle_jax.weights.hf import HFFolder
class Held:
    def __init__(self, opened): self.arrays = dict(opened.tensors())
    def shapes(self): return [(name, x.shape) for name, x in self.arrays.items()]
    def read(self, name, index, dtype): return self.arrays[name][index].astype(dtype)
real = loading.fill_params
loading.fill_params = lambda spec, opened, *rest: real(spec, Held(opened), *rest)
print(json.dumps(loading.load({source!r}, "bfloat16")))
"""


def test_peak_memory_is_little_more_than_the_arrays(tmp_path, capsys):
    loading = benchmark("loading")
    loading.write_checkpoint(tmp_path, loading.SHAPES["middle"], sparse=True)
    memory, printed = loading.measure(str(tmp_path), "bfloat16"), capsys.readouterr().out
    assert "x of the arrays" in printed and "read " in printed
    assert memory["bytes"] > 4e8
    assert 0.9 < memory["peak"] / memory["bytes"] < 1.2
    memory = _planted(_HOLD_ALL, tmp_path)
    assert memory["peak"] / memory["bytes"] > 1.7


_WHOLE_TENSORS = """
import sys; sys.path[:0] = [{tests!r}, {benchmarks!r}]
import json, loading
from beagle_jax.weights import safetensors_file
safetensors_file._VALUES = 1 << 40
print(json.dumps(loading.load({source!r}, "bfloat16")))
"""


@pytest.mark.slow
def test_peak_memory_where_a_large_head_is_converted(tmp_path):
    """Planted: a whole tensor in both dtypes at once."""
    loading = benchmark("loading")
    loading.write_checkpoint(
        tmp_path,
        loading.SHAPES["middle"] | dict(vocab_size=90_000, num_hidden_layers=2),
        sparse=True,
        stored="F32",
    )
    memory = loading.measure(str(tmp_path), "bfloat16")
    assert 0.9 < memory["peak"] / memory["bytes"] < 1.2
    memory = _planted(_WHOLE_TENSORS, tmp_path)
    assert memory["peak"] / memory["bytes"] > 1.5


def _planted(program: str, source: Path) -> dict:
    """Returns what a process prints that loads in another way."""
    tests = Path(__file__).parent
    program = program.format(
        tests=str(tests), benchmarks=str(tests.parent / "benchmarks"), source=str(source)
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return json.loads(printed.splitlines()[-1])


def test_the_benchmark_s_checkpoint_is_finite(tmp_path):
    loading = benchmark("loading")
    loading.write_checkpoint(tmp_path, loading.SHAPES["toy"], sparse=False)
    params = fill_params(
        TargetSpec.from_hf_config(loading.SHAPES["toy"], "x"),
        HFFolder(tmp_path),
        jnp.dtype("float32"),
        "x",
    )
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))


# GGUF types

TYPES = gguf.GGMLQuantizationType


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_types_load_as_gguf_decodes_them(tmp_path, kind):
    tensors = llama_tensors()
    write_llama(tmp_path / "tiny.gguf", tensors, kind=TYPES[kind])
    spec = TargetSpec.from_hf_config(GGUFFile(tmp_path / "tiny.gguf").config(), "x")
    rounded = {
        name: x
        if x.ndim == 1
        else gguf.quants.dequantize(gguf.quants.quantize(x, TYPES[kind]), TYPES[kind])
        for name, x in tensors.items()
    }
    params = fill_params(spec, GGUFFile(tmp_path / "tiny.gguf"), jnp.dtype("float32"), "x")
    _equal(params, fill_params(spec, Held(rounded.items()), jnp.dtype("float32"), "x"))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_load_as_gguf_decodes_them(tmp_path, kind):
    """The package cannot write them, so the blocks are random bytes.

    Bytes of the scales' exponents are small.
    """
    block, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    raw = np.random.default_rng(0).integers(0, 40, (4, 2 * size), np.uint8)
    _write_gguf(tmp_path / "k.gguf", {"output_norm.weight": raw}, kind=TYPES[kind])
    ((name, values),) = GGUFFile(tmp_path / "k.gguf").tensors()
    assert (name, values.shape, values.dtype) == ("model.norm.weight", (4, 2 * block), np.float32)
    np.testing.assert_array_equal(values, gguf.quants.dequantize(raw, TYPES[kind]))
    assert np.isfinite(values).all() and values.std() > 0

"""Benchmarks that need a large device run here at toy size, so that they still run when one can be had."""

import importlib.util
import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from beagle_jax.decoding.tree import dynamic_tree
from beagle_jax.model.target import param_table


def _benchmark(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_large_shapes_at_toy_size(capsys, dtype):
    _benchmark("large_shapes").measure("toy", jnp.dtype(dtype), 20.0, dynamic_tree(2, 2, 5), 8)
    printed = capsys.readouterr().out
    for line in ("verify, ms by rows", "bandwidth floor", "draft, ms", "round, ms"):
        assert line in printed


def test_shapes_are_the_published_sizes():
    shapes = _benchmark("large_shapes").SHAPES
    count = lambda spec: sum(math.prod(shape) for _, shape in param_table(spec).values())
    assert (count(shapes["llama2-7b"]), count(shapes["llama3-8b"])) == (6_738_415_616, 8_030_261_248)


def test_export_at_toy_size(tmp_path, capsys):
    bench = _benchmark("export_draft")
    bench.write_inputs(tmp_path, "toy")
    assert bench.measure(tmp_path, 120.0, 1e9) and not bench.measure(tmp_path, 120.0, 1e9), "the second finds the folder in its way"
    assert "export and parity check" in capsys.readouterr().out and (tmp_path / "out" / "modeling_beagle.py").exists()

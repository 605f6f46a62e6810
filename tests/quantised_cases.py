"""Products of quantised matrices as XLA compiles them for devices that are not there.

test_quantised_forms.py runs this file in a process of its own, without the suite's compiler
switches (conftest.py): `python quantised_cases.py TOPOLOGY`. Prints, for each weight and number of
columns, the bytes that a pass of a loop reads and the largest array that it writes.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from beagle_jax.config import MeshConfig
from beagle_jax.model.quantised import FORMS, arranged, quantise, times
from beagle_jax.sharding import make_mesh, whole
from beagle_jax.topology import hidden_warnings, topology_devices

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from hlo_traffic import operations

SIDE, GROUP = 8192, 64  # in bfloat16, such a matrix is larger than a TPU's memory on the chip
CASES = [(kind, columns) for kind in ("none", "int8", "int4") for columns in (1, 8)]
CASES.append(("planted", 8))


def measured(device: jax.Device, kind: str, columns: int) -> dict[str, int]:
    """planted: the form for CPUs, which dequantises first."""
    there = whole(make_mesh(MeshConfig(data=1), [device]))

    def matrix():
        weight = jnp.zeros((SIDE, SIDE), jnp.bfloat16)
        if kind == "none":
            return weight
        made = quantise(weight, "int8" if kind == "planted" else kind, GROUP)
        return arranged(made, "whole" if kind == "planted" else FORMS[device.platform])

    def loop(weights, x_IM, steps):
        def step(_, x_IM):
            for weight in weights:
                x_IM = jnp.tanh(times(weight, x_IM))
            return x_IM

        return jax.lax.fori_loop(0, steps, step, x_IM)

    shapes = jax.eval_shape(
        lambda: ([matrix()] * 2, jnp.zeros((SIDE, columns), jnp.bfloat16), jnp.int32(0))
    )
    with hidden_warnings():
        text = jax.jit(loop, in_shardings=there).lower(*shapes).compile().as_text()
    made = operations(text, loop=True)
    return {"read": sum(x.bytes_read for x in made), "written": max(x.bytes_written for x in made)}


if __name__ == "__main__":
    first = topology_devices(sys.argv[1])[0]
    print(json.dumps({f"{kind} {count}": measured(first, kind, count) for kind, count in CASES}))

"""States of a tiny target on meshes of eight virtual devices, written to files.

python tests/state_mesh_cases.py FOLDER         # FOLDER/<mesh>/<dtype>.states, and shapes.json
python tests/state_mesh_cases.py FOLDER rest    # the same of other meshes
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from conftest import TINY, random_params
from test_loader import rows_of_lengths

from beagle_jax.config import MeshConfig
from beagle_jax.data import target_forward
from beagle_jax.data.states import store_states
from beagle_jax.sharding import make_mesh, place

ROWS = rows_of_lengths(40, 3, 1, 70, 3, 25, 64, 33, 12, 50, 9)
TAPS = (1,)
DTYPES = ("float32", "int8")
TOKENS = 128  # of a forward pass, on each device
MESHES = {
    "data 8": {"data": 8},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
REST = {
    "fsdp 8": {"data": 1, "fsdp": 8},
    "data 4, tensor 2": {"data": 4, "tensor": 2},
}
BUG = "planted: rows on the wrong device"


def sizes_of(params: dict, tokens_BL: jax.Array, states_BLI: jax.Array) -> dict:
    """What each device holds, as a share of the whole."""
    arrays = {
        "tokens": tokens_BL,
        "states": states_BLI,
        "gate": params["layers"][0]["gate_FD"],
    }
    return {
        name: {shard.data.size / array.size for shard in array.addressable_shards}
        for name, array in arrays.items()
    }


def main(folder: Path, which: str = "") -> None:
    params, shapes = random_params(TINY), {}
    stored, place_rows = target_forward._stored, target_forward.place_rows

    def look(params, spec, tokens_BL, length_B1, taps, dtype):
        out = stored(params, spec, tokens_BL, length_B1, taps, dtype)
        shapes[name].append(
            {key: sorted(held) for key, held in sizes_of(params, tokens_BL, out[0]).items()}
        )
        return out

    def swapped(batch, mesh):
        tokens_BL, length_B1 = batch
        return place_rows((np.roll(tokens_BL, 1, axis=0), length_B1), mesh)

    target_forward._stored = look
    measured = REST if which == "rest" else MESHES | {BUG: MESHES["data 8"]}
    for name, sizes in measured.items():
        target_forward.place_rows = swapped if name == BUG else place_rows
        shapes[name] = []
        on_mesh = place(params, make_mesh(MeshConfig(**sizes)))
        (folder / name).mkdir()
        for dtype in DTYPES[:1] if name == BUG else DTYPES:
            parts = [(folder / name / f"{dtype}.states", ROWS)]
            store_states(on_mesh, TINY, parts, dtype, TAPS, TOKENS)
    (folder / "shapes.json").write_text(json.dumps(shapes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

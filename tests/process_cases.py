"""One of two processes that train together: python tests/process_cases.py FOLDER, with JAX_COORDINATOR_ADDRESS and so on set.

Trains the early stage of a tiny draft and leaves at its ninth step, so that the checkpoint of step 5 is the last.
"""

import sys
from argparse import Namespace

import jax

from beagle_jax.config import MeshConfig
from beagle_jax.data.share import this_process
from beagle_jax.model.beagle import init_draft
from beagle_jax.processes import from_first, host_copy, join
from beagle_jax.sharding import make_mesh, place
from beagle_jax.training.loop import run_stage
from beagle_jax.training.metrics import Log


def leave(batch):
    raise SystemExit(0)


def main(folder: str) -> None:
    arguments = Namespace(distributed=False, quiet=False)
    join(arguments)
    from conftest import TINY, random_params  # looks at the devices, which only exist from here on
    from test_loop import SPEC, Breaking, config_for, loader_of

    config, mesh = config_for(folder), make_mesh(MeshConfig(data=1, fsdp=-1))
    embed_VD = random_params(TINY)["embed_VD"]
    frozen = place({"embed_VD": embed_VD, "head_VD": embed_VD}, mesh)
    params = place(init_draft(SPEC, jax.random.key(3)), mesh)
    whole = host_copy(params)["q_proj"].shape == params["q_proj"].shape
    part = params["q_proj"].addressable_shards[0].data.shape
    print("process", jax.process_index(), len(jax.devices()), arguments.quiet, from_first(jax.process_index() + 7.0), whole, *part, flush=True)
    training = Breaking(loader_of(20, 1, this_process()), 8, leave)
    run_stage("early", config, SPEC, params, frozen, mesh, training, None, Log(config))


if __name__ == "__main__":
    main(sys.argv[1])

"""One of several processes that train together: python tests/process_cases.py FOLDER [BATCH].

A FOLDER shelf://.. is a folder of the disk that is opened as a store: no process sees it otherwise.

JAX_COORDINATOR_ADDRESS and so on must be set. Trains the early stage of a tiny draft. Without BATCH
the second process gets SIGTERM when it reads its ninth batch; with it the stage goes to its end, in
batches of so many rows.
"""

import os
import signal
import sys
import time
from argparse import Namespace

import fsspec
import jax
from fsspec.implementations.local import LocalFileSystem

from beagle_jax.config import MeshConfig
from beagle_jax.data.share import Share, this_process
from beagle_jax.model.beagle import init_draft
from beagle_jax.processes import from_first, host_copy, join
from beagle_jax.remote import fetch
from beagle_jax.sharding import make_mesh, place, place_rows, share_of_rows
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.loop import run_stage
from beagle_jax.training.metrics import Log

ASKED_AT = 8  # the batch; two are read ahead, so six steps are logged at least
PAUSE = 0.8  # seconds before each batch from then on: jax looks for the signal once a second


def interrupted(batch_at):
    """Sends SIGTERM to the second process at step ASKED_AT, from which on batches come slowly."""

    def read(step: int):
        if step == ASKED_AT and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PAUSE * (step >= ASKED_AT))
        return batch_at(step)

    return read


class Shelf(LocalFileSystem):
    """A store that processes reach by its URL alone."""

    protocol = "shelf"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("shelf://", "/"))


def main(folder: str, batch: str | None = None) -> None:
    arguments = Namespace(distributed=False, quiet=False)
    fsspec.register_implementation("shelf", Shelf)
    join(arguments)
    fetch(folder)  # as the command does
    from conftest import TINY, random_params  # looks at the devices, which only exist from here on
    from loop_cases import SPEC, config_for, loader_of

    rows = int(batch or 4)
    config, mesh = config_for(folder, batch=rows), make_mesh(MeshConfig(data=1, fsdp=-1))
    embed_VD = random_params(TINY)["embed_VD"]
    frozen = place(FrozenTarget(embed_VD, embed_VD), mesh)
    params = place(init_draft(SPEC, jax.random.key(3)), mesh)
    training = loader_of(20, 1, Share(*share_of_rows(mesh)), rows)
    if batch:
        run_stage("early", config, SPEC, params, frozen, mesh, training, None, Log(config))
        return
    whole = host_copy(params)["q_proj"].shape == params["q_proj"].shape
    part = params["q_proj"].addressable_shards[0].data.shape
    print(
        "process",
        jax.process_index(),
        len(jax.devices()),
        arguments.quiet,
        from_first(jax.process_index() + 7.0),
        whole,
        *part,
        flush=True,
    )
    along_tensor = make_mesh(MeshConfig(data=1, tensor=-1))  # both processes hold every row
    for name, share in (("rows", Share(*share_of_rows(along_tensor))), ("planted", this_process())):
        tokens_BL = place_rows(loader_of(20, 1, share).batch_at(0), along_tensor).tokens_BL
        print(name, tokens_BL.addressable_data(0).tolist(), flush=True)
    training.batch_at = interrupted(training.batch_at)
    run_stage("early", config, SPEC, params, frozen, mesh, training, None, Log(config))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""`serve`: loads the target and the draft, and answers over HTTP."""

from argparse import Namespace

from beagle_jax import terminal
from beagle_jax.config import Config
from beagle_jax.decoding.build import PLAIN, check_drafter, decoder_of, draft_path, drafter_of
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.errors import UsageError
from beagle_jax.sharding import mesh_for_decoding
from beagle_jax.weights.target import configured_target


def serve(config: Config, arguments: Namespace) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    try:
        from beagle_jax.serving.keys import keys_of
        from beagle_jax.serving.server import check_address, run
    except ModuleNotFoundError as error:
        raise UsageError(
            f"serve needs the package {error.name}; install what it needs with "
            "pip install 'beagle-jax[serve]'"
        ) from error
    keys = keys_of(config.serve)  # before the weights are loaded
    check_address(config.serve)
    with terminal.working(arguments):
        decoder = load(config)
    run(config, decoder, keys, _report)


def _report(model: str, address: str) -> None:
    print(f"serving {model} at {address}", flush=True)


def load(config: Config) -> SpeculativeDecoder:
    """Loads the decoder of a config, whose context is at most `serve.context`."""
    path = draft_path(config)
    mesh = mesh_for_decoding(config.mesh, config.serve.rows, "serve")
    if path != PLAIN:
        check_drafter(config)
    target = configured_target(config.target, mesh, decoding=True)
    context = min(config.serve.context, target.spec.max_positions)
    if path == PLAIN:
        return SpeculativeDecoder(target, context=context, mesh=mesh)
    draft = drafter_of(config, target)
    rows = config.serve.rows
    return decoder_of(config, target, draft, context=context, mesh=mesh, rows=rows)

"""Runs the application under uvicorn until SIGTERM or Ctrl-C."""

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from beagle_jax.config import Config, ServeConfig
from beagle_jax.decoding.decoder import SpeculativeDecoder
from beagle_jax.errors import UserError
from beagle_jax.serving.app import Service, make_app
from beagle_jax.serving.journal import Journal
from beagle_jax.serving.keys import Keys
from beagle_jax.serving.metrics import Metrics
from beagle_jax.serving.translation import Translator
from beagle_jax.serving.worker import Worker

_log = logging.getLogger(__name__)

_AFTER = 2.0  # seconds after serve.grace_seconds until connections are closed


class Server(uvicorn.Server):
    """A server that ends its answers in time when it must stop, and then leaves with status 0."""

    def __init__(
        self,
        config: Config,
        decoder: SpeculativeDecoder,
        keys: Keys,
        on_start: Callable[[str, str], object] = lambda model, address: None,
    ) -> None:
        """decoder: with a context, as `live` needs it. on_start: see `run`."""
        self._on_start = on_start
        serve = config.serve
        metrics = Metrics(serve.rows, decoder.tree.depth)
        self.worker = Worker(decoder, serve, metrics)
        self.model = model_name(config)
        service = Service(
            Translator(config, decoder, self.model),
            self.worker,
            metrics,
            Journal(metrics, serve.log_prompts),
        )
        self._grace = serve.grace_seconds
        super().__init__(
            uvicorn.Config(
                make_app(service, serve, keys),
                host=serve.host,
                port=serve.port,
                log_config=None,
                log_level="warning",
                access_log=False,  # the journal has a line for each answer
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=int(serve.grace_seconds + _AFTER + 0.5),
            )
        )

    @property
    def address(self) -> str:
        """Where it listens, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stops taking requests; the running answers end within `serve.grace_seconds`.

        The second signal ends them at once.
        """
        self.worker.close(0.0 if self.should_exit else self._grace)
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signals again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list | None = None) -> None:
        """Listens, and reports the address."""
        await super().startup(sockets)
        if self.started:
            self._on_start(self.model, self.address)


def model_name(config: Config) -> str:
    """The name that requests use: `serve.model`, or the last part of target.source."""
    source = config.target.source.rstrip("/")
    return config.serve.model or source.rpartition("/")[2].rpartition(":")[2]


def check_address(serve: ServeConfig) -> None:
    """Binds the address for a moment: before the weights are loaded.

    Raises:
        UserError: it cannot be bound.
    """
    try:
        places = socket.getaddrinfo(
            serve.host, serve.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, place in places:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(place)
    except OSError as error:
        raise UserError(
            f"serve.host={serve.host} with serve.port={serve.port} cannot be bound: {error}; "
            "choose an address of this machine and a free port"
        ) from error


def run(
    config: Config,
    decoder: SpeculativeDecoder,
    keys: Keys,
    on_start: Callable[[str, str], object] = lambda model, address: None,
) -> None:
    """Serves until a signal; returns once the running answers have ended.

    on_start: called with the model's name and the address once it listens.
    """
    server = Server(config, decoder, keys, on_start)
    if config.serve.warm_up:
        server.worker.warm_up()
    server.worker.start()
    try:
        server.run()
    finally:
        server.worker.close(0.0)
        if not server.worker.join(30.0):
            _log.warning("a round did not end within 30 s; leaving without it")

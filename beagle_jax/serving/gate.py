"""What a request passes before it is read: host, key, content type, size and time of its body.

ASGI, so that a body is refused while it arrives and not after it was stored.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from beagle_jax.config import ServeConfig
from beagle_jax.serving.journal import Journal
from beagle_jax.serving.keys import Keys, is_loopback
from beagle_jax.serving.refusal import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN = ("/health", "/")  # without a key: a probe has none, and the page asks for it
PROBES = ("/health", "/metrics")  # without a line in the log, every few seconds, unless they fail


class Gate:
    """Wraps the application. Refusals are answers in OpenAI's envelope."""

    def __init__(self, app: Any, serve: ServeConfig, keys: Keys, journal: Journal) -> None:
        self._app, self._serve, self._keys, self._journal = app, serve, keys, journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or passes it on with its whole body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = scope["entry"] = self._journal.entry(scope["path"])
        try:
            self._check(scope)
            body = await self._body(scope, receive) if scope["method"] == "POST" else b""
        except Refusal as refusal:
            entry.write(refusal.status)
            # The rest of a refused body is not read, so the connection cannot be used again.
            headers = refusal.headers() | {"Connection": "close"}
            response = JSONResponse(refusal.body(), refusal.status, headers)
            await response(scope, receive, send)
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return unread.pop() if unread else await receive()

        async def noted(message: MutableMapping[str, Any]) -> None:
            await send(message)
            # An answer writes its own line when it has ended.
            begins = message["type"] == "http.response.start"
            if begins and _has_line(scope, message["status"]):
                entry.write(message["status"])

        await self._app(scope, replay, noted)

    def _check(self, scope: Scope) -> None:
        """Raises Refusal by what the headers say."""
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN:
            authorization = headers.get("authorization", b"").decode("latin-1")
            if not self._keys.open_with(authorization):
                raise Refusal(
                    401,
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                )
        host = headers.get("host", b"").decode("latin-1")
        # A web site whose name was made to lead to this machine must not use it through a browser.
        if not self._keys and not is_loopback(_without_port(host)):
            raise Refusal(
                403,
                f"the host is {host[:80]!r}; a server without an API key is used as 127.0.0.1 or "
                "localhost",
            )
        kind = headers.get("content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        # Browsers send other types to any host without asking it first.
        if scope["method"] == "POST" and kind != "application/json":
            raise Refusal(415, f"Content-Type is {kind[:80]!r}; expected application/json")
        length = headers.get("content-length", b"0")
        if length.isdigit() and int(length) > self._serve.max_body:
            raise self._too_large()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Reads the body. Raises Refusal if it is too large, too slow, or breaks off."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._serve.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "the body broke off")
                    body += message.get("body", b"")
                    if len(body) > self._serve.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(
                408, f"the body did not arrive within {self._serve.body_seconds} s; send it again"
            ) from None

    def _too_large(self) -> Refusal:
        return Refusal(
            413, f"the body has more than {self._serve.max_body} bytes; send a shorter one"
        )


def _has_line(scope: Scope, status: int) -> bool:
    """Whether the log has a line when an answer begins with this status."""
    return scope["method"] in ("GET", "HEAD") and (scope["path"] not in PROBES or status >= 400)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].removesuffix(".")

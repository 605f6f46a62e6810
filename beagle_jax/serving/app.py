"""The application: routes of OpenAI's API, health, metrics and the page."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from beagle_jax.config import ServeConfig
from beagle_jax.serving.answering import LEFT, Answering, status_of
from beagle_jax.serving.bodies import ChatBody, CompletionBody, parsed
from beagle_jax.serving.call import Gone
from beagle_jax.serving.gate import Gate
from beagle_jax.serving.journal import Entry, Journal
from beagle_jax.serving.keys import Keys
from beagle_jax.serving.metrics import Metrics
from beagle_jax.serving.refusal import Refusal
from beagle_jax.serving.translation import Translator
from beagle_jax.serving.worker import Worker

_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_READ = ["GET", "HEAD"]
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    translator: Translator
    worker: Worker
    metrics: Metrics
    journal: Journal

    async def complete(
        self, request: Request, kind: type[ChatBody] | type[CompletionBody]
    ) -> Response:
        """Answers a body: whole, or as a stream that begins once the first text is there."""
        entry: Entry = request.scope["entry"]  # of the gate
        try:
            raw = await request.body()
            body = parsed(kind, raw)
            entry.details |= {"stream": bool(body.stream), "user": body.user}
            if self.journal.texts:
                entry.details["body"] = raw.decode(errors="replace")
            requests = await run_in_threadpool(self.translator.requests, body)
            answering = Answering(self.worker, self.translator, body, requests, entry)
            if not body.stream:
                return JSONResponse(await answering.whole(request.receive))
            lines = answering.lines(request.receive)
            first = await anext(lines)
        except Refusal as refusal:
            entry.write(refusal.status)
            return JSONResponse(refusal.body(), refusal.status, refusal.headers())
        except Gone:
            return Response(status_code=LEFT)  # which nobody reads
        except BaseException as error:
            entry.write(status_of(error))
            raise
        return StreamingResponse(
            _and_then(first, lines), media_type="text/event-stream", headers=_STREAM_HEADERS
        )

    def models(self) -> list[dict[str, Any]]:
        """The models of this server, in the form of OpenAI's API."""
        decoder = self.translator.decoder
        model = {
            "id": self.translator.model,
            "object": "model",
            "created": int(self.metrics.began),
            "owned_by": "beagle_jax",
            "context": decoder.codec.context,
            "tree": str(decoder.tree),
        }
        return [model]

    def model(self, name: str) -> Response:
        """One model."""
        for model in self.models():
            if model["id"] == name:
                return JSONResponse(model)
        refusal = Refusal(404, f"there is no model {name[:200]!r}", code="model_not_found")
        return JSONResponse(refusal.body(), refusal.status)


def make_app(service: Service, serve: ServeConfig, keys: Keys) -> Gate:
    """The ASGI application."""
    # The pages of FastAPI's documentation load scripts from another host.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_api(app, service)

    @app.api_route("/health", methods=_READ)
    async def health() -> Response:
        healthy = service.worker.healthy
        return JSONResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)

    @app.api_route("/metrics", methods=_READ)
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type=_METRICS_TYPE)

    if serve.page:
        _add_page(app)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:200]
        refusal = Refusal(error.status_code, f"{request.method} {path}: {error.detail}")
        request.scope["entry"].write(error.status_code)
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        refusal = Refusal(500, "the server failed; its log says why")
        # uvicorn closes the connection after an exception.
        return JSONResponse(refusal.body(), refusal.status, {"Connection": "close"})

    return Gate(app, serve, keys, service.journal)


def _add_api(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.complete(request, ChatBody)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.complete(request, CompletionBody)

    @app.api_route("/v1/models", methods=_READ)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": service.models()})

    @app.api_route("/v1/models/{name:path}", methods=_READ)
    async def model(name: str) -> Response:
        return service.model(name)


def _add_page(app: FastAPI) -> None:
    """The page, which may run its own script and speak with this server, and nothing else."""
    text = files("beagle_jax.serving").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src {_digests(text, 'script')}; "
            f"style-src {_digests(text, 'style')}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.api_route("/", methods=_READ)
    async def page() -> Response:
        return HTMLResponse(text, headers=headers)


def _digests(page: str, tag: str) -> str:
    """The inline elements of a page, as a Content-Security-Policy names them."""
    inner = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in inner)
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)


async def _and_then(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for line in rest:
        yield line

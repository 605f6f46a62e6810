"""One HTTP request from its body to its response, whole or streamed."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from beagle_jax.decoding.requests import Request
from beagle_jax.serving.bodies import ChatBody, CompletionBody
from beagle_jax.serving.call import Call, Gone
from beagle_jax.serving.choice import Choice
from beagle_jax.serving.journal import Entry
from beagle_jax.serving.refusal import Refusal
from beagle_jax.serving.responses import Form
from beagle_jax.serving.translation import Translator
from beagle_jax.serving.worker import Worker

LEFT = 499  # in the log and the metrics: the client closed its connection

Receive = Callable[[], Awaitable[Any]]


class Answering:
    """The answers to one body. Use `whole` or `lines`, once."""

    def __init__(
        self,
        worker: Worker,
        translator: Translator,
        body: ChatBody | CompletionBody,
        requests: Sequence[Request],
        entry: Entry,
    ) -> None:
        """requests: of the body, by the translator. entry: the line in the log of requests."""
        codec, extended = translator.decoder.codec, body.beagle.tokens
        self._entry = entry
        self._choices = [Choice(codec, request, extended) for request in requests]
        each_prompt = requests[:: body.n or 1]
        self._form = Form(body, codec, sum(len(request.tokens) for request in each_prompt))
        self._call = Call(worker, requests)

    async def whole(self, receive: Receive) -> dict[str, Any]:
        """The response as JSON. receive: the client's messages.

        Raises:
            Refusal: an answer failed, or was not begun.
            Gone: the client left.
        """
        try:
            with self._call:
                async for index, piece in self._call.pieces(receive):
                    self._choices[index].add(piece)
            response = self._form.whole(self._choices)
        except BaseException as error:
            self._close(status_of(error))
            raise
        self._close(200)
        return response

    async def lines(self, receive: Receive) -> AsyncIterator[str]:
        """The lines of a stream of server-sent events. receive: the client's messages.

        Raises:
            Refusal: before the first line. A later one is a line, and the last.
            Gone: the client left before the first line.
        """
        started = set[int]()
        try:
            with self._call:
                async for index, piece in self._call.pieces(receive):
                    new = self._choices[index].add(piece)
                    if index not in started:
                        started.add(index)
                        for chunk in self._form.first(index):
                            yield _line(chunk)
                    for chunk in self._form.chunk(index, self._choices[index], new):
                        yield _line(chunk)
            for chunk in self._form.last(self._choices):
                yield _line(chunk)
            self._close(200)
            yield "data: [DONE]\n\n"
        except Refusal as refusal:
            self._close(refusal.status)
            if not started:
                raise
            yield _line(refusal.body())
        except BaseException as error:
            self._close(status_of(error))
            if not started or not isinstance(error, Gone):
                raise

    def _close(self, status: int) -> None:
        self._entry.answers(self._call.tickets, self._choices)
        self._entry.write(status)


def status_of(error: BaseException) -> int:
    """The status in the log of a request that ended with an error."""
    if isinstance(error, Refusal):
        return error.status
    return 500 if isinstance(error, Exception) and not isinstance(error, Gone) else LEFT


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

"""Streams: events and lines of an answer, which ends when nobody waits for it.

ChatRequest --respond--> Service.open -> Writer.stream -> events, an error as the last one
-> Writer.whole  -> JSON, unless the client has gone
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Protocol, TypeVar, runtime_checkable

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.types import Receive

from lapilli.serve.answers import Answers
from lapilli.serve.errors import ApiError, Dialect, api_error
from lapilli.serve.service import ChatRequest, Service

T = TypeVar("T")

DONE = format_sse_event(data_str="[DONE]")


@runtime_checkable
class Writer(Protocol):
    """Writer of the answer to one request, in the shape of its protocol."""

    async def whole(self, answers: Answers) -> dict[str, object]:
        """Return the answer in one piece."""

    def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        """Yield the answer as it comes."""


async def respond(
    http: Request,
    service: Service,
    request: ChatRequest,
    writer: Writer,
    *,
    is_stream: bool | None,
    dialect: Dialect = "openai",
) -> Response:
    """Return the answer to a request, at once or as a stream; raises what `Service.open` does."""
    answers = await service.open(request)
    if is_stream:
        return streamed(writer.stream(answers), dialect)
    return JSONResponse(await unless_gone(http, writer.whole(answers)))


def event(data: object, name: str | None = None) -> bytes:
    """Return one server-sent event of JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return format_sse_event(data_str=text, event=name)


def line(data: object) -> bytes:
    """Return one line of JSON, which Ollama has in the place of events."""
    return json.dumps(data, ensure_ascii=False).encode() + b"\n"


def streamed(stream: AsyncIterator[bytes], dialect: Dialect = "openai") -> Response:
    """Return a stream as a response; an error in the middle is its last event."""
    if dialect == "ollama":
        lines = guarded(stream, lambda error: line(error.body(dialect)))
        return StreamingResponse(lines, media_type="application/x-ndjson")
    name = "error" if dialect == "anthropic" else None
    events = guarded(stream, lambda error: event(error.body(dialect), name))
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return EventSourceResponse(events, headers=headers)


async def guarded(
    stream: AsyncIterator[bytes], last: Callable[[ApiError], bytes]
) -> AsyncIterator[bytes]:
    """Yield a stream; an error in the middle becomes its last piece."""
    try:
        async for piece in stream:
            yield piece
    except Exception as error:  # noqa: BLE001 - the status is sent, only a piece can tell
        yield last(api_error(error))


async def unless_gone(request: Request, work: Coroutine[object, object, T]) -> T:
    """Return what work returns; cancel it when the client has gone.

    Raises:
        ApiError: 499, which nobody reads.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(until_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has closed the connection", "disconnected")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass

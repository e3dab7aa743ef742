"""Streams: server-sent events, and answers that end when nobody waits for them."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.sse import EventSourceResponse, format_sse_event

from lapilli.serve.errors import ApiError, Dialect, api_error

T = TypeVar("T")

DONE = format_sse_event(data_str="[DONE]")


def event(data: object, name: str | None = None) -> bytes:
    """Return one server-sent event of JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return format_sse_event(data_str=text, event=name)


def events(stream: AsyncIterator[bytes], dialect: Dialect = "openai") -> EventSourceResponse:
    """Return a stream as a response; an error in the middle is its last event."""

    async def guarded() -> AsyncIterator[bytes]:
        try:
            async for chunk in stream:
                yield chunk
        except Exception as error:  # noqa: BLE001 - the status is sent, only an event can tell
            name = "error" if dialect == "anthropic" else None
            yield event(api_error(error).body(dialect), name)

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return EventSourceResponse(guarded(), headers=headers)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what work returns; cancel it when the client has gone.

    Raises:
        ApiError: 499, which nobody reads.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
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


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

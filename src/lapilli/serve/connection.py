"""Connections: a request from its first byte to its end, whichever end that is.

    request -> its body, within a deadline -> route -> response
    a large body   -> handed over when no other one is: its JSON is read while nothing else goes on
    client leaves  -> the task of the route is cancelled, unless it streams and sees it itself
    server stops   -> a request whose body is not there yet is refused at once

No route has to think of this. Knows ASGI; must not know models and protocols.
"""

import asyncio
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lapilli.errors import ClosedError
from lapilli.serve.auth import refuse
from lapilli.serve.errors import ApiError, api_error
from lapilli.serve.options import Limits

STOPPING: Final = "the server is stopping: ask another one"
LARGE: Final = 256 << 10
"""Bytes of a body whose JSON takes a millisecond or more."""


class OpenRequest:
    """One request, and what has come and gone of it.

    Args:
        scope: of ASGI.
        receive: of ASGI.
        send: of ASGI.
        limits: how long its body may take.
        turn: of the large bodies of all requests.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, limits: Limits, turn: asyncio.Lock
    ) -> None:
        self.scope: MutableMapping[str, Any] = scope
        self.at_end: list[Callable[[], None]] = []
        """Called when the request is over, in whichever way."""
        self.has_begun = False
        """The response has."""
        self._receive = receive
        self._send = send
        self._limits = limits
        self._turn = turn
        self._size = 0
        self._is_read = False
        self._is_head = scope["method"] == "HEAD"
        self._gone = asyncio.Event()
        self._end: ApiError | None = None
        self._task: asyncio.Task[Any] | None = None
        self._watch: asyncio.Task[None] | None = None
        names = {name for name, value in scope["headers"] if value != b"0"}
        self._has_body = bool(names & {b"content-length", b"transfer-encoding"})
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds

    @property
    def is_unread(self) -> bool:
        """Return whether a part of the body is still to come."""
        return self._has_body and not self._is_read

    async def run(self, app: ASGIApp) -> None:
        """Answer the request; a client that leaves, and `end`, cancel what does."""
        self._task = asyncio.current_task()
        scope = {**self.scope, "method": "GET"} if self._is_head else self.scope
        try:
            await app(scope, self.receive, self.send)
        except asyncio.CancelledError:
            if self._end is None:
                raise  # somebody else's
            if self._task is not None:
                self._task.uncancel()
            if not self.has_begun:  # nobody may read it, and the server has to have an answer
                await refuse(self._end, scope, self.send)
        finally:
            if self._watch is not None:
                self._watch.cancel()
            for call in self.at_end:
                call()

    def end(self, error: ApiError) -> None:
        """Cancel what answers the request, and tell the client if it is still there."""
        if self._end is None and self._task is not None:
            self._end = error
            self._task.cancel()

    async def receive(self) -> Message:
        """Return the next part of the body; after the last one, wait for the client to leave.

        Raises:
            HTTPException: 408, no part came in time.
        """
        if self._is_read:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        message = await self._part()
        self._size += len(message.get("body", b""))
        if message["type"] == "http.disconnect":
            self._is_read = True
            self._gone.set()
        elif not message.get("more_body"):
            self._is_read = True
            self._watch = asyncio.create_task(self._until_gone())
            if self._size >= LARGE:
                await self._take_turn()
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response."""
        if message["type"] == "http.response.start":
            self.has_begun = True
        elif self._is_head and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)

    async def _part(self) -> Message:
        left = self._deadline - asyncio.get_running_loop().time()
        wait = min(self._limits.idle_seconds, max(left, 0.0))
        try:
            async with asyncio.timeout(wait):
                return await self._receive()
        except TimeoutError:
            if wait < self._limits.idle_seconds:
                cause = f"its body took more than {self._limits.body_seconds:g} seconds"
            else:
                cause = f"no byte of its body came for {wait:g} seconds"
            # Of the framework's own kind: others it takes for bad JSON.
            raise HTTPException(
                408,
                f"the request is not whole: {cause}: send it again, without a pause",
                {"Connection": "close"},
            ) from None

    async def _take_turn(self) -> None:
        """Wait until no other large body is handed over in this round of the event loop.

        Without it 32 photographs that have come are read one after the other in one round, and
        whoever asks for a token or for `/health` waits for all of them.
        """
        await self._turn.acquire()
        asyncio.get_running_loop().call_soon(self._turn.release)

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        if not self.has_begun:
            self.end(ApiError(499, "the client has closed the connection", "disconnected"))


_CURRENT: ContextVar[OpenRequest | None] = ContextVar("request", default=None)


class OpenRequests:
    """The requests of a server that are not answered yet."""

    def __init__(self) -> None:
        self._open: set[OpenRequest] = set()
        self.turn = asyncio.Lock()
        """Taken by a large body, until the event loop has done something else."""

    def __len__(self) -> int:
        return len(self._open)

    async def run(self, request: OpenRequest, app: ASGIApp) -> None:
        """Answer a request, which is one of these meanwhile."""
        token = _CURRENT.set(request)
        self._open.add(request)
        try:
            await request.run(app)
        finally:
            self._open.discard(request)
            _CURRENT.reset(token)

    def refuse_unread(self) -> None:
        """End requests whose body is not there yet."""
        for request in list(self._open):
            if request.is_unread and not request.has_begun:
                request.end(api_error(ClosedError(STOPPING)))

    def end_all(self) -> None:
        """End all of them."""
        for request in list(self._open):
            request.end(api_error(ClosedError(STOPPING)))


class Connections:
    """ASGI middleware in front of everything: bodies have deadlines, and clients may leave.

    Args:
        app: what stands behind it.
        requests: where open requests are noted.
        limits: of a body.
    """

    def __init__(self, app: ASGIApp, requests: OpenRequests, limits: Limits) -> None:
        self._app = app
        self._requests = requests
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = OpenRequest(scope, receive, send, self._limits, self._requests.turn)
        await self._requests.run(request, self._app)


def close_at_end(close: Callable[[], None]) -> None:
    """Call a function when the request of this task is over; outside of one, nothing."""
    request = _CURRENT.get()
    if request is not None:
        request.at_end.append(close)


def size_of_request() -> int:
    """Return the bytes that the body of this task's request says it has; 0 where it does not."""
    request = _CURRENT.get()
    headers = [] if request is None else request.scope["headers"]
    said = next((value for name, value in headers if name == b"content-length"), b"0")
    return int(said) if said.isdigit() else 0


def client_of_request() -> str:
    """Return who asks: the owner of the key and the address; "" outside of a request."""
    request = _CURRENT.get()
    if request is None:
        return ""
    owner = request.scope.get("state", {}).get("owner", "")
    host = (request.scope.get("client") or ("",))[0]
    return f"{owner}\0{host}"

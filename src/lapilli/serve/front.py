"""Front of a server on several processes: what listens, and the way of each request to a replica.

    client -> Gate (auth.py) -> Front: uploads, key of the prefix -> Replica (distributed.py)

It has the keys, the limits and the uploaded files, and no model. Requests about one picture have
one key, so that they go to one replica.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fastapi import APIRouter, FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, generate_latest
from starlette.types import Message, Receive, Scope, Send

from lapilli import __version__
from lapilli.errors import BusyError, ClosedError, LapilliError
from lapilli.serve import uploads
from lapilli.serve.affinity import prefix_key, with_files
from lapilli.serve.app import assemble
from lapilli.serve.auth import refuse
from lapilli.serve.errors import ApiError, api_error, invalid
from lapilli.serve.files import Files
from lapilli.serve.metrics import CONTENT_TYPE
from lapilli.serve.options import ServeOptions
from lapilli.serve.stream import until_gone

if TYPE_CHECKING:  # the extra
    from ray.serve.handle import DeploymentHandle

REPLICA_HEADER: Final = "x-lapilli-replica"
"""Header of an answer: which replica gave it."""

_TRIES: Final = 5  # replicas that a request is sent to, while they die before they answer
_KEPT: Final = ("type", "http_version", "method", "path", "raw_path", "query_string", "scheme")


@dataclass(frozen=True, slots=True)
class Head:
    """The first message of an answer: what stands before its body."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    replica: str


class FrontMetrics:
    """Counts of the front, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._failed = Counter(
            "lapilli:front_errors", "Refused or failed requests.", ("status",), registry=registry
        )
        self._sent = Counter(
            "lapilli:front_requests", "Answers by replica.", ("replica",), registry=registry
        )
        self._again = Counter(
            "lapilli:front_retries", "Requests sent again after a replica died.", registry=registry
        )

    def count_error(self, status: int) -> None:
        """Count a request that was refused or failed."""
        self._failed.labels(status=str(status)).inc()

    def count_answer(self, replica: str) -> None:
        """Count an answer of a replica."""
        self._sent.labels(replica=replica).inc()

    def count_retry(self) -> None:
        """Count a request that is sent again."""
        self._again.inc()

    def text(self) -> str:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self._registry).decode()


class Front:
    """What listens: uploads, and the way of each request to a replica.

    Args:
        handle: of the deployment.
        options: limits.
    """

    def __init__(self, handle: "DeploymentHandle[Any]", options: ServeOptions) -> None:
        self._handle = handle
        self._options = options
        self.files = Files(options.limits.upload_bytes)
        self.metrics = FrontMetrics()
        self.is_stopping = False

    async def check_picture(self, data: bytes, owner: str) -> None:
        """Let a replica decode a picture, so that one that cannot be read is refused.

        Raises:
            ApiError: what the replica says.
        """
        wrong = await self._handle.check_picture.remote(data, owner)
        if wrong is not None:
            status, message, code = wrong
            raise ApiError(status, message, code, "file")

    async def close(self) -> None:
        """Take no more requests; those that run are answered by the replicas."""
        self.is_stopping = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with what a replica answers."""
        try:
            if self.is_stopping:
                raise ClosedError("the server is stopping: ask another one")
            owner = scope.get("state", {}).get("owner", "anyone")
            body = with_files(await _body(receive), self.files, owner)
            told = {name: scope[name] for name in _KEPT if name in scope}
            told |= {"headers": _without_length(scope["headers"], body), "state": {"owner": owner}}
            told |= {"client": scope.get("client"), "server": scope.get("server")}
            await self._forward(told, body, prefix_key(body, owner), receive, send)
        except (ApiError, LapilliError) as error:
            found = api_error(error, scope["path"])
            self.metrics.count_error(found.status)
            await refuse(found, scope, send)

    async def _forward(
        self, told: Scope, body: bytes, key: str, receive: Receive, send: Send
    ) -> None:
        """Send a request to a replica, again where one dies before it has answered."""
        for attempt in range(_TRIES):
            handle = self._handle.options(stream=True, session_id=key)
            stream: Any = handle.answer.remote(told, body)
            relay = asyncio.ensure_future(self._relay(stream, send))
            gone = asyncio.ensure_future(until_gone(receive))
            try:
                await asyncio.wait((relay, gone), return_when=asyncio.FIRST_COMPLETED)
                if not relay.done():  # nobody reads any more
                    stream.cancel()
                    return
                if relay.result():
                    return
            finally:
                gone.cancel()
                relay.cancel()
            self.metrics.count_retry()
            await asyncio.sleep(0.1 * 2**attempt)
        raise ClosedError("no engine answers at the moment: ask again")

    async def _relay(self, stream: AsyncIterator[Head | bytes], send: Send) -> bool:
        """Pass an answer on; return False where its replica died before it began.

        The head waits for the first piece of the body, so that a replica may die until then.
        """
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, RayServeException

        head: Head | None = None
        has_begun = False
        try:
            async for part in stream:
                if isinstance(part, Head):
                    head = part
                    continue
                if head is not None and not has_begun:
                    has_begun = True
                    await send(self._start(head))
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except BackPressureError as error:
            raise BusyError("too many requests are waiting: try again later") from error
        except (RayActorError, RayServeException):
            if has_begun:  # an answer that ends in its middle must not look whole
                raise
            return False
        if head is not None and not has_begun:
            await send(self._start(head))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    def _start(self, head: Head) -> Message:
        """Return the message that begins an answer."""
        self.metrics.count_answer(head.replica)
        name = (REPLICA_HEADER.encode(), head.replica.encode())
        return {
            "type": "http.response.start",
            "status": head.status,
            "headers": [*head.headers, name],
        }

    async def all_metrics(self) -> str:
        """Return the counts of the front and of every replica, which is a label of each."""
        texts = [self.metrics.text()]
        found = self._handle.broadcast("metrics")
        for replica, text in await asyncio.to_thread(found.results, timeout_s=10):
            texts.append(labelled(text, replica))
        return "".join(texts)


def labelled(text: str, replica: str) -> str:
    """Return counts of Prometheus' text with the replica as one label more; its comments are gone.

    A name has one comment in a text, and every replica would bring its own.
    """
    lines = []
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        name, brace, rest = line.partition("{")
        if brace:
            lines.append(f'{name}{{replica="{replica}",{rest}')
        else:
            name, _, value = line.partition(" ")
            lines.append(f'{name}{{replica="{replica}"}} {value}')
    return "".join(f"{line}\n" for line in lines)


def front_app(front: Front, options: ServeOptions) -> FastAPI:
    """Return the application that listens."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Say that the front answers."""
        return {"status": "ok"}

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """Say which lapilli this is."""
        return {"version": __version__}

    @routes.get("/metrics", response_model=None)
    async def metrics(_: Request) -> Response:
        """Return counts and times of all replicas for Prometheus."""
        return Response(await front.all_metrics(), media_type=CONTENT_TYPE)

    app = assemble(front, (uploads.router(front), routes), options)
    app.mount("/", front)
    return app


async def _body(receive: Receive) -> bytes:
    """Return the whole body of a request."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise invalid("the client has gone before its request was whole")
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)


def _without_length(headers: list[tuple[bytes, bytes]], body: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers for a body, which may be another one than the client sent."""
    secret = (b"content-length", b"authorization", b"x-api-key")
    kept = [(name, value) for name, value in headers if name.lower() not in secret]
    return [*kept, (b"content-length", str(len(body)).encode())]

"""Serving on several processes or machines: engines as replicas of Ray Serve, one front.

    client -> Gate (auth.py) -> Front: uploads, key of the prefix -> replica: create_app's routes

The front is the process that listens. It has the keys, the limits and the uploaded files, and no
model. A replica is an engine behind the same routes as a server of one process. Requests about one
picture have one key, and Ray Serve hashes keys over the replicas that are healthy: they go where
its features and its prefix are cached, and to the next replica while that one is full. Needs the
extra "ray".

Knows ASGI and Ray Serve; must not know how a model is loaded, which is the caller's function.
"""

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, generate_latest

from lapilli import __version__
from lapilli.cluster import Share, check_room, connect, share_of
from lapilli.errors import BusyError, ClosedError, GenerationError, LapilliError
from lapilli.pipeline import Chat
from lapilli.serve import uploads
from lapilli.serve.affinity import prefix_key, with_files
from lapilli.serve.app import assemble, create_app
from lapilli.serve.auth import refuse
from lapilli.serve.errors import ApiError, api_error
from lapilli.serve.files import Files
from lapilli.serve.metrics import CONTENT_TYPE
from lapilli.serve.options import ServeOptions
from lapilli.serve.run import DRAIN_SECONDS, run_app

NAME: Final = "lapilli"
"""Of the application in Ray Serve; a second one in a cluster takes the place of the first."""

REPLICA_HEADER: Final = "x-lapilli-replica"
"""Header of an answer: which replica gave it."""

_TRIES: Final = 5  # replicas that a request is sent to, while they die before they answer
_ROUTER: Final = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_KEPT: Final = ("type", "http_version", "method", "path", "raw_path", "query_string", "scheme")

MakeChat = Callable[[], Chat]
Scope = Any
"""ASGI's: a dictionary, two functions."""


@dataclass(frozen=True, slots=True)
class Head:
    """The first message of an answer: what stands before its body."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    replica: str


class Replica:
    """An engine in a process of Ray Serve's, behind the routes of `create_app`.

    Args:
        make: loads the model.
        options: limits and names; the front has checked the key.
        threads: of torch.
    """

    def __init__(self, make: MakeChat, options: ServeOptions, threads: int) -> None:
        import torch
        from ray import serve

        torch.set_num_threads(threads)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._app = create_app(make(), options, is_behind=True)
        self._service = self._app.state.service

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Head | bytes]:
        """Yield the head of an answer and the pieces of its body."""
        messages: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue()
        waiting = [{"type": "http.request", "body": body, "more_body": False}]
        is_gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop()
            await is_gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    pairs = tuple((bytes(name), bytes(value)) for name, value in message["headers"])
                    yield Head(message["status"], pairs, self._id)
                elif message.get("body"):
                    yield bytes(message["body"])
            await task
        finally:
            is_gone.set()
            if not task.done():
                task.cancel()

    async def check_picture(self, data: bytes, owner: str) -> dict[str, Any] | None:
        """Return None for a picture that can be read, or else the fields of its error."""
        try:
            await self._service.check_picture(data, owner)
        except LapilliError as error:
            found = api_error(error)
            return {"status": found.status, "message": found.message, "code": found.code}
        return None

    def metrics(self) -> tuple[str, str]:
        """Return which replica this is, and its counts as Prometheus reads them."""
        return self._id, self._service.metrics.text().decode()

    def check_health(self) -> None:
        """Say to Ray Serve whether this replica can answer; it is replaced where it cannot.

        Raises:
            GenerationError: the thread of the engine has ended.
        """
        if not self._service.engine.is_alive:
            raise GenerationError("the engine's thread has ended: the replica is started again")


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

    def __init__(self, handle: Any, options: ServeOptions) -> None:  # noqa: ANN401 - Ray's
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
            raise ApiError(**wrong)

    async def close(self) -> None:
        """Take no more requests; those that run are answered by the replicas."""
        self.is_stopping = True

    async def __call__(self, scope: Scope, receive: Scope, send: Scope) -> None:
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
            found = api_error(error)
            self.metrics.count_error(found.status)
            await refuse(found, scope, send)

    async def _forward(
        self, told: dict[str, Any], body: bytes, key: str, receive: Scope, send: Scope
    ) -> None:
        """Send a request to a replica, again where one dies before it has answered."""
        for attempt in range(_TRIES):
            handle = self._handle.options(stream=True, session_id=key)
            stream = handle.answer.remote(told, body)
            relay = asyncio.ensure_future(self._relay(stream, send))
            gone = asyncio.ensure_future(_until_gone(receive))
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

    async def _relay(self, stream: Any, send: Scope) -> bool:  # noqa: ANN401 - Ray's
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

    def _start(self, head: Head) -> dict[str, Any]:
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


async def _body(receive: Scope) -> bytes:
    """Return the whole body of a request."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client has gone before its request was whole")
        pieces.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(pieces)


async def _until_gone(receive: Scope) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _without_length(headers: list[tuple[bytes, bytes]], body: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers for a body, which may be another one than the client sent."""
    secret = (b"content-length", b"authorization", b"x-api-key")
    kept = [(name, value) for name, value in headers if name.lower() not in secret]
    return [*kept, (b"content-length", str(len(body)).encode())]


def deploy(make: MakeChat, options: ServeOptions, *, replicas: int, share: Share, rows: int) -> Any:  # noqa: ANN401 - Ray's
    """Start the replicas, or restart those that run, one after the other; return their handle.

    A replica that is replaced takes no new requests and answers those that it has.

    Args:
        make: loads the model; it runs in every replica.
        options: of the server.
        replicas: how many.
        share: of the cluster, for each.
        rows: answers that an engine works on at the same time; twice as many requests may be at a
            replica before the next one gets more.

    Raises:
        GenerationError: they do not start.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    serve.start(proxy_location="Disabled")
    router = RequestRouterConfig.model_validate({"request_router_class": _ROUTER})
    deployment = serve.deployment(
        name="engine",
        num_replicas=replicas,
        max_ongoing_requests=2 * rows,
        max_queued_requests=options.limits.waiting,
        ray_actor_options={"num_cpus": share.cpus, "num_gpus": share.gpus},
        health_check_period_s=5,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        request_router_config=router,
    )(Replica)
    try:
        bound = deployment.bind(make, options, share.cpus)
        return serve.run(bound, name=NAME, route_prefix=None)
    except RuntimeError as error:  # Ray Serve's word for a deployment that fails
        said = " ".join(str(error).split())[-300:]
        raise GenerationError(f"the replicas do not start: {said}") from error


def run_distributed(
    make: MakeChat,
    options: ServeOptions,
    ready: Callable[[str], None],
    *,
    replicas: int,
    cores: int,
    device: str,
    rows: int,
) -> None:
    """Serve with replicas of Ray Serve until a signal ends it; SIGHUP restarts the replicas.

    Args:
        make: loads the model; it runs in every replica.
        options: where to listen, keys and limits.
        ready: called with the address once requests are taken.
        replicas: engines.
        cores: of an engine without a GPU.
        device: of the engines; "auto" takes a GPU each where the cluster has any.
        rows: answers that an engine works on at the same time.

    Raises:
        ConfigError: Ray is not there or has no room, or the address cannot be listened on.
        GenerationError: the replicas do not start.
    """
    ray = connect("--engine ray needs Ray")
    share = share_of(ray, cores=cores, device=device)
    check_room(ray, share, replicas)
    behind = replace(options, keys=(), without_key=True)

    def start() -> Any:  # noqa: ANN401 - Ray's
        return deploy(make, behind, replicas=replicas, share=share, rows=rows)

    front = Front(start(), options)

    def restart(*_: object) -> None:
        threading.Thread(target=start, name="lapilli-restart", daemon=True).start()

    if hasattr(signal, "SIGHUP"):  # Windows has none
        signal.signal(signal.SIGHUP, restart)
    try:
        run_app(front_app(front, options), options, ready)
    finally:
        from ray import serve

        serve.delete(NAME)

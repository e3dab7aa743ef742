"""Serving on several processes or machines: engines as replicas of Ray Serve, one front.

    client -> Gate (auth.py) -> Front (front.py) -> Replica: create_app's routes

A replica is an engine behind the same routes as a server of one process. Requests about one picture
have one key, and Ray Serve hashes keys over the replicas that are healthy: they go where its
features and its prefix are cached, and to the next replica while that one is full. Needs the extra
"ray".

Knows ASGI and Ray Serve; must not know how a model is loaded, which is the caller's function.
"""

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from starlette.types import Message, Scope

from lapilli.cluster import Share, check_room, connect, share_of
from lapilli.errors import GenerationError, LapilliError
from lapilli.pipeline import Chat
from lapilli.serve.address import bind
from lapilli.serve.app import create_app
from lapilli.serve.errors import api_error
from lapilli.serve.front import Front, Head, front_app
from lapilli.serve.options import ServeOptions
from lapilli.serve.run import DRAIN_SECONDS, run_app
from lapilli.serve.service import Service

if TYPE_CHECKING:  # the extra
    from ray.serve.handle import DeploymentHandle

NAME: Final = "lapilli"
"""Of the application in Ray Serve; a second one in a cluster takes the place of the first."""

_ROUTER: Final = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

MakeChat = Callable[[], Chat]


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
        self._service: Service = self._app.state.service

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Head | bytes]:
        """Yield the head of an answer and the pieces of its body."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        is_gone = asyncio.Event()

        async def receive() -> Message:
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

    async def check_picture(self, data: bytes, owner: str) -> tuple[int, str, str] | None:
        """Return None for a picture that can be read, or else status, message and code."""
        try:
            await self._service.check_picture(data, owner)
        except LapilliError as error:
            found = api_error(error)
            return found.status, found.message, found.code
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


def deploy(
    make: MakeChat, options: ServeOptions, *, replicas: int, share: Share, rows: int
) -> "DeploymentHandle[Replica]":
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
    with bind(options) as taken:  # a port that is taken is said before anything is started
        ray = connect("--engine ray needs Ray", "leave --engine out")
        share = share_of(ray, cores=cores, device=device)
        check_room(ray, share, replicas)
        behind = replace(options, keys=(), without_key=True)

        def start() -> "DeploymentHandle[Replica]":
            return deploy(make, behind, replicas=replicas, share=share, rows=rows)

        front = Front(start(), options)

        def restart(*_: object) -> None:
            threading.Thread(target=start, name="lapilli-restart", daemon=True).start()

        if hasattr(signal, "SIGHUP"):  # Windows has none
            signal.signal(signal.SIGHUP, restart)
        try:
            run_app(front_app(front, options), options, ready, taken)
        finally:
            from ray import serve

            serve.delete(NAME)

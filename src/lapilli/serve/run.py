"""Running of the application: a socket, uvicorn, and an end that finishes what runs.

    SIGTERM, Ctrl-C -> no new requests, half of one is refused -> those that run are answered
      -> after DRAIN_SECONDS, or a second signal: streams end with an error -> the process ends

Nothing of it takes longer than it says, whatever clients and threads do.
"""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from lapilli.pipeline import Chat
from lapilli.serve.address import address_of, bind, listen
from lapilli.serve.app import create_app
from lapilli.serve.options import ServeOptions

DRAIN_SECONDS = 30
"""How long requests that run at the end may take."""
LAST_SECONDS = 1.0
"""How long the last words of streams that are cut may take to be sent."""


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready and tells the routes when it stops.

    Args:
        app: of `lapilli.serve.app`.
        ready: called once requests are taken.
        idle_seconds: that a connection may be open without a whole head of a request.
    """

    def __init__(self, app: FastAPI, ready: Callable[[], None], idle_seconds: float = 30.0) -> None:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,  # `shutdown` has waited before
            timeout_keep_alive=30,
        )
        super().__init__(config)
        self._state = app.state
        self._ready = ready
        self._idle_seconds = idle_seconds
        self._silent: dict[object, tuple[object, float]] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: object) -> None:
        """Stop to take requests at a signal; a second one ends at once."""
        del sig, frame  # uvicorn would raise the signal again, after the last answer
        self._state.service.is_stopping = True
        self.force_exit = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Close connections that send no request; say whether the server ends."""
        if counter % 10 == 0:
            self._close_silent(time.monotonic())
        return await super().on_tick(counter)

    def _close_silent(self, now: float) -> None:
        """Close connections on which no request has begun for too long.

        A body has its deadline (connection.py), the time between requests is uvicorn's; the head of
        a request has neither.
        """
        before, self._silent = self._silent, {}
        for connection in list(self.server_state.connections):
            cycle: Any = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                continue
            last, since = before.get(connection, (cycle, now))
            if last is not cycle:
                since = now
            if now - since > self._idle_seconds:
                connection.transport.close()
            else:
                self._silent[connection] = cycle, since

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: answer what runs, cut what takes too long, and close every connection."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        self._state.requests.refuse_unread()
        if not await self._is_idle(DRAIN_SECONDS, may_be_forced=True):
            # What is open fails in the protocol's form, as with any other error in its middle.
            await self._state.service.close()
            await self._is_idle(LAST_SECONDS)
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # nobody reads there
            self._state.requests.end_all()
            await self._is_idle(LAST_SECONDS)
        self.force_exit = False  # nothing is left to skip: uvicorn would cut the application's end
        await super().shutdown(sockets)

    async def _is_idle(self, seconds: float, *, may_be_forced: bool = False) -> bool:
        """Wait until no connection is open; return whether none is."""
        end = time.monotonic() + seconds
        while self.server_state.connections or self.server_state.tasks:
            if time.monotonic() > end or (may_be_forced and self.force_exit):
                return False
            await asyncio.sleep(0.02)
        return True


class ServerThread:
    """Server in a thread of its own, for notebooks and tests; ends when its block is left.

    Args:
        chat: the model, which may be used beside it.
        options: where to listen, keys and limits; None: a free port of this machine.

    Attributes:
        url: its address.
        app: the application.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, chat: Chat, options: ServeOptions | None = None) -> None:
        options = options or ServeOptions(port=0)
        self._socket = bind(options)
        listen(self._socket, options)
        self.url = address_of(options, self._socket)
        self.app = create_app(chat, options)
        self._ready = threading.Event()
        self._server = Server(self.app, self._ready.set, options.limits.idle_seconds)
        self._thread = threading.Thread(target=self._run, name="lapilli-server", daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._ready.set()  # nobody may wait for one that failed

    def close(self) -> None:
        """Answer what runs, then end."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> "ServerThread":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run(
    chat: Chat,
    options: ServeOptions,
    ready: Callable[[str], None],
    taken: socket.socket | None = None,
) -> None:
    """Serve a model until a signal ends it, and the process with it if threads still compute.

    See `run_app`; a program that goes on afterwards has `ServerThread`.
    """
    run_app(create_app(chat, options), options, ready, taken)
    end_process()


def run_app(
    app: FastAPI,
    options: ServeOptions,
    ready: Callable[[str], None],
    taken: socket.socket | None = None,
) -> None:
    """Serve an application until a signal ends it.

    Args:
        app: of `lapilli.serve.app`.
        options: where to listen, keys and limits.
        ready: called with the address once requests are taken.
        taken: a socket of `bind`; None: one of the options' address.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    taken = taken or bind(options)
    with taken:
        listen(taken, options)
        address = address_of(options, taken)
        Server(app, lambda: ready(address), options.limits.idle_seconds).run(sockets=[taken])


def end_process() -> None:
    """End the process now where threads of a server compute something that nobody waits for.

    They are in native code, which Python's own end would cut off in its middle.
    """
    end = time.monotonic() + LAST_SECONDS
    threads = [one for one in threading.enumerate() if one.name.startswith("lapilli-")]
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

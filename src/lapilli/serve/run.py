"""Running of the application: a socket, uvicorn, and an end that finishes what runs.

    SIGTERM, Ctrl-C -> no new requests -> those that run are answered -> the process ends

A second signal ends it at once.
"""

import socket
import threading
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from lapilli.errors import ConfigError
from lapilli.pipeline import Chat
from lapilli.serve.app import create_app
from lapilli.serve.options import ServeOptions

DRAIN_SECONDS = 30
"""How long requests that run at the end may take."""


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready and tells the routes when it stops."""

    def __init__(self, app: FastAPI, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            timeout_keep_alive=30,
        )
        super().__init__(config)
        self._state = app.state
        self._ready = ready

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
        self._listening = listen(options)
        self.url = address_of(options, self._listening)
        self.app = create_app(chat, options)
        self._ready = threading.Event()
        self._server = Server(self.app, self._ready.set)
        self._thread = threading.Thread(target=self._run, name="lapilli-server", daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listening])
        finally:
            self._ready.set()  # nobody may wait for one that failed

    def close(self) -> None:
        """Answer what runs, then end."""
        self._server.should_exit = True
        self._thread.join()
        self._listening.close()

    def __enter__(self) -> "ServerThread":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def address_of(options: ServeOptions, listening: socket.socket) -> str:
    """Return the URL of a socket that listens."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"http://{host}:{listening.getsockname()[1]}"


def run(chat: Chat, options: ServeOptions, ready: Callable[[str], None]) -> None:
    """Serve a model until a signal ends it; see `run_app`."""
    run_app(create_app(chat, options), options, ready)


def run_app(app: FastAPI, options: ServeOptions, ready: Callable[[str], None]) -> None:
    """Serve an application until a signal ends it.

    Args:
        app: of `lapilli.serve.app`.
        options: where to listen, keys and limits.
        ready: called with the address once requests are taken.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    listening = listen(options)
    address = address_of(options, listening)
    with listening:
        Server(app, lambda: ready(address)).run(sockets=[listening])


def listen(options: ServeOptions) -> socket.socket:
    """Return a socket that listens where the options say.

    Raises:
        ConfigError: the address is taken, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((options.host, options.port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"{options.host}:{options.port} cannot be listened on: {error.strerror or error}: "
            "choose another --port, or --port 0 for a free one"
        ) from error
    return listening

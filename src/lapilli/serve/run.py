"""Running of the application: a socket, uvicorn, and an end that finishes what runs.

    SIGTERM, Ctrl-C -> no new requests -> those that run are answered -> the process ends

A second signal ends it at once.
"""

import socket
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

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: object) -> None:
        """Stop to take requests at a signal; a second one ends at once."""
        app = self.config.app
        app.state.service.is_stopping = True  # type: ignore[union-attr]  # create_app's
        super().handle_exit(sig, frame)  # type: ignore[arg-type]


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
    address = f"http://{_shown(options.host)}:{listening.getsockname()[1]}"
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_keep_alive=30,
    )
    with listening:
        Server(config, lambda: ready(address)).run(sockets=[listening])


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


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host

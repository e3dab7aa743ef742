"""Address: the socket of a server, taken before a model is loaded.

Imports neither torch nor the web framework, so that the command line learns at once that a port is
taken.
"""

import socket

from lapilli.errors import ConfigError
from lapilli.serve.options import ServeOptions

BACKLOG = 1024


def bind(options: ServeOptions) -> socket.socket:
    """Return a socket that has the address of the options; it does not listen yet.

    A client that comes while the model is loaded is refused, and not left waiting.

    Raises:
        ConfigError: the address is taken, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((options.host, options.port))
    except OSError as error:
        taken.close()
        raise _cannot(options, error) from error
    return taken


def listen(taken: socket.socket, options: ServeOptions) -> None:
    """Let a socket that `bind` returned listen.

    Raises:
        ConfigError: another program was faster.
    """
    try:
        taken.listen(BACKLOG)
    except OSError as error:
        taken.close()
        raise _cannot(options, error) from error


def address_of(options: ServeOptions, taken: socket.socket) -> str:
    """Return the URL of a socket that has an address."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"http://{host}:{taken.getsockname()[1]}"


def _cannot(options: ServeOptions, error: OSError) -> ConfigError:
    return ConfigError(
        f"{options.host}:{options.port} cannot be listened on: {error.strerror or error}: choose "
        "another --port, or --port 0 for a free one"
    )

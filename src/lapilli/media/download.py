"""HTTP client for media: the bytes of a URL, within limits on time, size and redirects.

It stands on the standard library. The clients that huggingface_hub brings along are requests,
httpx and httpx2, by its release, so that none of them is always there; and none has a deadline over
the whole download, name look-up included. Proxies are those that urllib finds.

An address inside the caller's own network is fetched like any other. A server that takes URLs from
strangers says `public_only`: then every connection, those of redirects too, is made to an address
that was looked up and checked just before, so that no name can lead inside (DNS rebinding).
"""

import http.client
import ipaddress
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit, urlunsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from lapilli.errors import ConfigError, MediaError, MediaTooLargeError

_CHUNK = 1 << 16
_SCHEMES = ("http", "https")
# Characters that may stand in a path or a query as they are; "%" because people paste quoted URLs.
_SAFE = "%/:=&?~+!$,;'@()*[]-._"


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """Limits of a download.

    Attributes:
        timeout_s: seconds for the whole.
        max_bytes: of one medium.
        max_redirects: number of redirects that are followed.
        public_only: refuse addresses that are private, of this machine or of its links; proxies
            are not used then, since they would make the connection.
    """

    timeout_s: float = 30.0
    max_bytes: int = 128 << 20
    max_redirects: int = 5
    public_only: bool = False

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.max_bytes <= 0 or self.max_redirects < 0:
            raise ConfigError(
                f"limits must be positive: timeout_s {self.timeout_s}, max_bytes {self.max_bytes}, "
                f"max_redirects {self.max_redirects}"
            )


def url_name(url: str) -> str:
    """Return the URL for messages: without user, password and query, which may hold secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:  # http://[ ends inside an address
        return url.partition("?")[0].rpartition("@")[2][:200]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def download(url: str, limits: FetchLimits) -> bytes:
    """Return the body behind a URL.

    Raises:
        MediaError: another scheme, no answer in time (also from a server that sends a byte now and
            then), too many bytes, too many redirects, an HTTP error, a broken connection.
    """
    transfer = _Transfer(url, limits)
    # A thread, because nothing else bounds the whole: a socket's timeout starts anew with every
    # byte, and a name look-up has none. It is a daemon: one that waits for a name for ever does not
    # keep the process alive.
    worker = threading.Thread(target=transfer.run, name="lapilli-download", daemon=True)
    worker.start()
    try:
        worker.join(limits.timeout_s)
        if worker.is_alive():
            raise transfer.too_late()
    finally:
        transfer.cancel()
    if transfer.error is not None:
        raise transfer.error
    if not transfer.complete:
        raise MediaError(
            f"{transfer.name} cannot be fetched: the download stopped with a traceback"
        )
    return bytes(transfer.body)


class _Transfer:
    """A download that runs in its own thread and is stopped from another."""

    def __init__(self, url: str, limits: FetchLimits) -> None:
        self.url = url
        self.limits = limits
        self.name = url_name(url)
        self.body = bytearray()
        self.error: MediaError | None = None
        self.complete = False
        self._cancelled = threading.Event()
        self._sockets: list[socket.socket] = []

    def run(self) -> None:
        """Fill `body` and set `complete`, or set `error`."""
        try:
            self._read()
        except MediaError as error:
            self.error = error
        except HTTPError as error:
            error.close()
            self.error = MediaError(f"{self.name} answered {error.code} {error.reason}")
        except URLError as error:
            late = isinstance(error.reason, TimeoutError)
            failed = MediaError(f"{self.name} cannot be fetched: {error.reason}")
            self.error = self.too_late() if late else failed
        except TimeoutError:  # the socket's own time-out may strike before the whole one
            self.error = self.too_late()
        except (OSError, http.client.HTTPException, ValueError) as error:
            detail = str(error) or type(error).__name__
            self.error = MediaError(f"{self.name} cannot be fetched: {detail}")

    def too_late(self) -> MediaError:
        """Return the error of a download whose time is up."""
        return MediaError(
            f"{self.name} did not answer completely within {self.limits.timeout_s:g} s "
            f"({len(self.body)} bytes came)"
        )

    def cancel(self) -> None:
        """Wake a reader that still waits; its thread ends by itself."""
        self._cancelled.set()
        for sock in self._sockets:
            with suppress(OSError):  # closed already
                sock.shutdown(socket.SHUT_RDWR)

    def keep(self, sock: socket.socket) -> None:
        """Remember a connection, so that `cancel` can reach it."""
        self._sockets.append(sock)
        if self._cancelled.is_set():
            self.cancel()

    def _read(self) -> None:
        request = Request(_quoted(self.url), headers={"User-Agent": "lapilli"})  # noqa: S310 - checked
        with self._opener().open(request, timeout=self.limits.timeout_s) as response:
            declared = response.headers.get("Content-Length", "")
            expected = int(declared) if declared.isdigit() else None
            if expected is not None and expected > self.limits.max_bytes:
                raise MediaTooLargeError(
                    f"{self.name} has {expected} bytes, more than the limit of "
                    f"{self.limits.max_bytes}"
                )
            while not self._cancelled.is_set() and (chunk := response.read1(_CHUNK)):
                self.body += chunk
                if len(self.body) > self.limits.max_bytes:
                    raise MediaTooLargeError(
                        f"{self.name} has more bytes than the limit of {self.limits.max_bytes}"
                    )
        if expected is not None and len(self.body) < expected:
            raise MediaError(
                f"{self.name}: the connection ended after {len(self.body)} of {expected} bytes"
            )
        self.complete = True

    def _opener(self) -> OpenerDirector:
        opener = OpenerDirector()
        for handler in (
            ProxyHandler({} if self.limits.public_only else None),
            _Handler(self),
            _RedirectHandler(self),
            HTTPDefaultErrorHandler(),
            HTTPErrorProcessor(),
            UnknownHandler(),
        ):
            opener.add_handler(handler)
        return opener


class _Handler(HTTPSHandler):
    """http: and https: URLs, with the socket of every connection handed to the transfer."""

    http_request = HTTPSHandler.https_request

    def __init__(self, transfer: _Transfer) -> None:
        super().__init__()
        self._transfer = transfer

    def http_open(self, req: Request) -> http.client.HTTPResponse:
        """Open a plain connection, as urllib asks for."""
        return self._open(http.client.HTTPConnection, req)

    def https_open(self, req: Request) -> http.client.HTTPResponse:
        """Open an encrypted connection, as urllib asks for."""
        return self._open(http.client.HTTPSConnection, req)

    def _open(
        self, kind: type[http.client.HTTPConnection], req: Request
    ) -> http.client.HTTPResponse:
        keep, public_only = self._transfer.keep, self._transfer.limits.public_only

        class Connection(kind):  # type: ignore[valid-type, misc]  # one of the two above
            def connect(self) -> None:
                if public_only:
                    self._create_connection = connect_in_public
                super().connect()
                keep(self.sock)

        return self.do_open(Connection, req)


def connect_in_public(
    address: tuple[str, int], timeout: float | None = None, source: tuple[str, int] | None = None
) -> socket.socket:
    """Connect to a name, looked up once, of which every address is public; as `create_connection`.

    Raises:
        MediaError: one of its addresses is not.
        OSError: none of them answers.
    """
    host, port = address
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, (number, *_rest) in found:
        if not is_public(str(number)):
            raise MediaError(
                f"{host} leads to {number}, which is no public address: a server fetches no "
                "pictures from inside its own network"
            )
    failure: OSError = OSError(f"{host} has no address")
    for *_, (number, *_rest) in found:
        try:
            return socket.create_connection((str(number), port), timeout, source)
        except OSError as error:
            failure = error
    raise failure


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the open internet, also where it carries another."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: list[ipaddress.IPv4Address | ipaddress.IPv6Address | None] = [ip]
    if isinstance(ip, ipaddress.IPv6Address):
        inner += [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return all(one is None or (one.is_global and not one.is_multicast) for one in inner)


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class _RedirectHandler(HTTPRedirectHandler):
    """Redirects to http and https, a limited number of them."""

    max_repeats = 1 << 30  # counted below

    def __init__(self, transfer: _Transfer) -> None:
        self._transfer = transfer
        self._followed = 0

    def http_error_302(
        self,
        req: Request,
        fp: Any,  # noqa: ANN401 - urllib hands over an HTTPResponse where it promises IO[bytes]
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
    ) -> Any:  # noqa: ANN401 - urllib's signature
        """Follow a redirect, as urllib asks for.

        Raises:
            MediaError: it leads elsewhere than to http(s), or is one too many.
        """
        target = urljoin(req.full_url, headers.get("Location", ""))
        name, limit = self._transfer.name, self._transfer.limits.max_redirects
        scheme = urlsplit(target).scheme
        if scheme not in _SCHEMES:
            fp.close()
            raise MediaError(f"{name} redirects to {scheme}:, only http and https are followed")
        self._followed += 1
        if self._followed > limit:
            fp.close()
            raise MediaError(f"{name} redirects more than {limit} times")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _quoted(url: str) -> str:
    """Return the URL with spaces and letters outside ASCII escaped, as browsers do."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise MediaError(f"{url_name(url)!r} is no URL: {error}") from error
    if parts.scheme.lower() not in _SCHEMES:
        raise MediaError(f"{url_name(url)}: only http and https URLs are fetched")
    if "@" in parts.netloc:
        raise MediaError(f"{url_name(url)}: a URL with a user name or password is not fetched")
    return urlunsplit(
        parts._replace(path=quote(parts.path, _SAFE), query=quote(parts.query, _SAFE), fragment="")
    )

"""Keys, limits and bodies: what stands before every route.

    request -> Host, origin -> key -> limits of its owner -> bytes of the body -> route

Everything but OPEN_PATHS asks for the key, also what no route answers: a stranger does not learn
what there is.
"""

import hmac
import json
import time
from collections.abc import Iterable, Mapping
from threading import Lock

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lapilli.serve.errors import ApiError, dialect_of
from lapilli.serve.options import LOOPBACK, ApiKey, ServeOptions

OPEN_PATHS = frozenset(("/", "/health", "/ready"))
"""What is answered without a key."""

ANYONE = ApiKey(key="none", name="anyone")


class Allowance:
    """Counts the requests of one owner: a bucket that fills by the minute, and those under way."""

    def __init__(self, key: ApiKey) -> None:
        self._key = key
        self._left = float(key.requests_per_minute)
        self._at = time.monotonic()
        self._open = 0
        self._lock = Lock()

    def take(self) -> None:
        """Count a request that begins.

        Raises:
            ApiError: 429, with the seconds after which there is room.
        """
        key = self._key
        with self._lock:
            if key.concurrent and self._open >= key.concurrent:
                raise ApiError(
                    429,
                    f"{self._open} requests of {key.name!r} are under way, its limit: wait for one",
                    "too_many_requests",
                    headers={"Retry-After": "1"},
                )
            if key.requests_per_minute:
                now = time.monotonic()
                rate = key.requests_per_minute / 60
                self._left = min(key.requests_per_minute, self._left + (now - self._at) * rate)
                self._at = now
                if self._left < 1:
                    wait = int((1 - self._left) / rate) + 1
                    raise ApiError(
                        429,
                        f"{key.name!r} may ask {key.requests_per_minute} times a minute: ask again "
                        f"in {wait} s",
                        "too_many_requests",
                        headers={"Retry-After": str(wait)},
                    )
                self._left -= 1
            self._open += 1

    def give_back(self) -> None:
        """Count a request that is over."""
        with self._lock:
            self._open -= 1


class Gate:
    """ASGI middleware: who may ask, how often, and how much.

    Args:
        app: what stands behind it.
        options: keys and limits.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app = app
        self._options = options
        self._allowances = {key.name: Allowance(key) for key in (*options.keys, ANYONE)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        allowance = None
        try:
            self._check_host(headers)
            if scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
                owner = owner_of(headers, self._options.keys)
                scope.setdefault("state", {})["owner"] = owner.name
                allowance = self._allowances[owner.name]
                allowance.take()
            self._check_body(scope, headers)
        except ApiError as error:
            await refuse(error, scope, send)
            return
        try:
            await self._app(scope, self._counted(receive), send)
        finally:
            if allowance is not None:
                allowance.give_back()

    def _check_host(self, headers: Mapping[str, bytes]) -> None:
        """Refuse a name that a web page gave to this machine (DNS rebinding).

        Only a server without a key has this door, and only where nobody else can reach it.
        """
        options = self._options
        if options.keys or not options.is_local:
            return
        host = headers.get("host", b"localhost").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name.strip("[]") not in (*LOOPBACK, options.host):
            raise ApiError(
                403,
                f"host {host!r} is not this machine: ask for localhost, or start with --api-key",
                "forbidden_host",
            )

    def _check_body(self, scope: Scope, headers: Mapping[str, bytes]) -> None:
        """Refuse a body that says that it is too long, and one that is no JSON.

        A page of another origin may send plain text without asking the browser's permission, JSON
        it may not. A page says its origin: what has none is a program, which may leave out what
        its body is.
        """
        most = self._options.limits.body_bytes
        said = headers.get("content-length", b"")
        if said.isdigit() and int(said) > most:
            raise too_long(most)
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        kind = headers.get("content-type", b"").partition(b";")[0].strip().lower()
        expected = b"multipart/form-data" if scope["path"] == "/v1/files" else b"application/json"
        is_silent = "content-type" not in headers and "origin" not in headers
        if is_silent and expected == b"application/json":
            scope["headers"] = [*scope["headers"], (b"content-type", b"application/json")]
            return
        if kind != expected and not kind.endswith(b"+json"):
            shown = kind.decode("latin-1") or "nothing"
            raise ApiError(
                415,
                f"content-type is {shown}: expected {expected.decode()}",
                "unsupported_media_type",
            )

    def _counted(self, receive: Receive) -> Receive:
        """Return `receive`, which ends a body that is longer than allowed."""
        most, count = self._options.limits.body_bytes, 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > most:  # of the framework's own kind: others it takes for bad JSON
                raise HTTPException(413, too_long(most).message)
            return message

        return counted


def too_long(most: int) -> ApiError:
    """Return the error of a body over the limit."""
    return ApiError(
        413, f"the request has more than {most} bytes, the limit: send less", "body_too_large"
    )


def owner_of(headers: Mapping[str, bytes], keys: Iterable[ApiKey]) -> ApiKey:
    """Return whose key a request has, compared in a time that does not tell how much is right.

    Raises:
        ApiError: 401 without a key, or with another one.
    """
    keys = tuple(keys)
    if not keys:
        return ANYONE
    scheme, _, token = headers.get("authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer":
        token = headers.get("x-api-key", b"")
    found = None
    for key in keys:  # all of them, whichever it is
        if hmac.compare_digest(token.strip(), key.key.encode()):
            found = key
    if found is None:
        said = "no API key" if not token else "an unknown API key"
        raise ApiError(
            401,
            f"the request has {said}: send 'Authorization: Bearer KEY'",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return found


async def refuse(error: ApiError, scope: Scope, send: Send) -> None:
    """Send an error before any route has seen the request."""
    body = json.dumps(error.body(dialect_of(scope["path"]))).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    pairs = {**headers, **error.headers}.items()
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})

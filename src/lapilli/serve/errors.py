"""Errors of the server: a status, a cause, and the shape of each protocol.

    LapilliError --api_error--> ApiError --body(dialect)--> JSON of OpenAI, Anthropic or Ollama

A status is never chosen by a route: it follows from the kind of error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lapilli.errors import (
    BusyError,
    ClosedError,
    ContextTooLongError,
    LapilliError,
    MediaError,
    MediaTooLargeError,
    ModelFailedError,
    StoreError,
)

Dialect = Literal["openai", "anthropic", "ollama"]

INTERNAL = 500
_OPENAI_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_ANTHROPIC_TYPES: Mapping[int, str] = {
    **_OPENAI_TYPES,
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}


class UnknownMediumError(MediaError):
    """An uploaded file, or a picture by its uuid, that the server does not have."""


@dataclass(eq=False)
class ApiError(Exception):
    """An error as a client is told of it.

    Attributes:
        status: of HTTP.
        message: what is wrong, and what to do.
        code: a word for programs.
        param: the field that is meant.
        headers: of the response.
    """

    status: int
    message: str
    code: str = "invalid_request"
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self, dialect: Dialect = "openai") -> dict[str, object]:
        """Return the JSON that clients of a protocol expect."""
        # What a client wrote may be no Unicode, and is told back to it.
        message = self.message.encode("utf-8", "backslashreplace").decode()
        if dialect == "ollama":
            return {"error": message}
        if dialect == "anthropic":
            kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": message}}
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error")
        error = {"message": message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(message: str, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """Return the error of a request that is wrong, and of the field that is."""
    return ApiError(400, message, code, param)


def dialect_of(path: str) -> Dialect:
    """Return the protocol that a path belongs to."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    return "ollama" if path.startswith("/api/") else "openai"


_ANSWERS: Mapping[type[Exception], tuple[int, str]] = {
    BusyError: (429, "too_many_requests"),
    ClosedError: (503, "unavailable"),
    ModelFailedError: (INTERNAL, "model_failed"),
    UnknownMediumError: (404, "not_found"),
    MediaTooLargeError: (413, "too_large"),
    MediaError: (400, "invalid_image"),
    ContextTooLongError: (400, "context_length_exceeded"),
    StoreError: (404, "unknown_id"),
}
"""Status and code of each kind of error; one that is not here is told as its nearest kind, and a
LapilliError of no such kind is a 400 with its name as code."""
_CONTENTS: Mapping[str, str] = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/decisions": "input",
    "/v1/embeddings": "input",
    "/v1/files": "file",
}
"""The field of a route that has texts and pictures, where it is one."""
_RETRY: Mapping[int, Mapping[str, str]] = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}


def api_error(error: Exception, path: str = "") -> ApiError:
    """Return what a client is told of an error; one that nobody foresaw is a 500 with its name.

    Args:
        error: of any kind.
        path: of the route, which says what the field of its contents is called.
    """
    if isinstance(error, ApiError):
        return error
    message = str(error)
    for kind in type(error).__mro__:
        if kind in _ANSWERS:
            status, code = _ANSWERS[kind]
            is_content = issubclass(kind, MediaError | ContextTooLongError)
            param = _CONTENTS.get(path) if is_content else None
            return ApiError(status, message, code, param, _RETRY.get(status, {}))
    name = type(error).__name__
    if isinstance(error, LapilliError):
        return invalid(message, code=name)
    return ApiError(INTERNAL, f"the server failed: {name}: {message}", "internal")

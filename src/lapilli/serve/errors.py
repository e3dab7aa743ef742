"""Errors of the server: a status, a cause, and the shape of each protocol.

    LapilliError --api_error--> ApiError --body(dialect)--> JSON of OpenAI, Anthropic or Ollama

A status is never chosen by a route: it follows from the kind of error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lapilli.errors import (
    ContextTooLongError,
    GenerationError,
    LapilliError,
    MediaError,
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


class BusyError(GenerationError):
    """Too much is asked at the same time."""


class TooLargeError(MediaError):
    """A medium of more bytes or pixels than the server takes."""


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

    def body(self, dialect: Dialect = "openai") -> dict[str, Any]:
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


def dialect_of(path: str) -> Dialect:
    """Return the protocol that a path belongs to."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    return "ollama" if path.startswith("/api/") else "openai"


def api_error(error: Exception) -> ApiError:
    """Return what a client is told of an error; one that nobody foresaw is a 500 with its name."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, BusyError):
        return ApiError(429, message, "too_many_requests", headers={"Retry-After": "1"})
    if isinstance(error, UnknownMediumError):
        return ApiError(404, message, "not_found", "messages")
    if isinstance(error, TooLargeError):
        return ApiError(413, message, "too_large", "messages")
    if isinstance(error, ContextTooLongError):
        return ApiError(400, message, "context_length_exceeded", "messages")
    if isinstance(error, MediaError):
        return ApiError(400, message, "invalid_image", "messages")
    if isinstance(error, StoreError):
        return ApiError(404, message, "unknown_id")
    if isinstance(error, LapilliError):
        return _of_generation(error, message)
    return ApiError(INTERNAL, f"the server failed: {type(error).__name__}: {message}", "internal")


def _of_generation(error: LapilliError, message: str) -> ApiError:
    """Return the rest: what the engine cannot do now, what it failed at, and what is asked wrong.

    The engine says in words what became of it; these are its own beginnings.
    """
    if message.startswith(("the engine is closed", "the server is stopping")):
        return ApiError(503, message, "unavailable", headers={"Retry-After": "5"})
    if "requests are waiting, the limit" in message or "on their way, the limit" in message:
        return ApiError(429, message, "too_many_requests", headers={"Retry-After": "1"})
    if message.startswith(("the model failed", "the engine failed", "no token can be chosen")):
        return ApiError(INTERNAL, message, "model_failed")
    return ApiError(400, message, type(error).__name__)

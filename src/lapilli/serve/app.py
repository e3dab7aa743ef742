"""Application: the routes of all protocols over one model, and what stands before them.

    Gate (auth.py) -> routes: chat, completions, ... -> Service
    errors of any kind -> api_error -> the shape of the protocol

The one place that knows all routes.
"""

import errno
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Protocol, runtime_checkable

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lapilli import __version__
from lapilli.pipeline import Chat
from lapilli.serve import (
    anthropic,
    chat,
    completions,
    decisions,
    embeddings,
    ollama,
    page,
    rerank,
    responses,
    score,
    status,
    uploads,
    worker,
)
from lapilli.serve.auth import Gate
from lapilli.serve.connection import Connections, OpenRequests
from lapilli.serve.errors import INTERNAL, ApiError, api_error, dialect_of
from lapilli.serve.options import ServeOptions
from lapilli.serve.service import Service
from lapilli.serve.validation import misfit, unreadable

LOG = logging.getLogger(__name__)

ROUTERS = (
    chat.router,
    completions.router,
    responses.router,
    anthropic.router,
    ollama.router,
    decisions.router,
    embeddings.router,
    score.router,
    rerank.router,
    uploads.router,
    status.router,
    page.router,
    worker.router,
)
"""A protocol, or a part of one, is one file with a `router`, and an entry here."""


@runtime_checkable
class CountsErrors(Protocol):
    """Metrics, as the handlers of errors use them."""

    def count_error(self, status: int) -> None:
        """Count a request that was refused or failed."""


@runtime_checkable
class Served(Protocol):
    """What stands behind an application: a model, or the way to several."""

    @property
    def metrics(self) -> CountsErrors:
        """Return what counts the errors."""

    async def close(self) -> None:
        """End it."""


def create_app(
    model: Chat, options: ServeOptions | None = None, *, is_behind: bool = False
) -> FastAPI:
    """Return the application that serves a model.

    Args:
        model: what `lapilli.load` returns.
        options: keys and limits; host and port are uvicorn's to know.
        is_behind: another process has checked the key, and sends nothing else.
    """
    options = options or ServeOptions()
    service = Service(model, options)
    routers = [router(service) for router in ROUTERS]
    return assemble(service, routers, options, is_behind=is_behind)


def assemble(
    service: Served,
    routers: Iterable[APIRouter],
    options: ServeOptions,
    *,
    is_behind: bool = False,
) -> FastAPI:
    """Return an application with what stands before its routes, and what answers for errors."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="lapilli",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.state.requests = OpenRequests()
    for router in routers:
        app.include_router(router)
    if options.allow_origins and not is_behind:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.allow_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
    if not is_behind:
        app.add_middleware(Gate, options=options)
    app.add_middleware(Connections, requests=app.state.requests, limits=options.limits)
    # Starlette re-raises what only the handler of Exception takes, behind a traceback.
    own = (ApiError, RequestValidationError, HTTPException)
    for kind in (*own, ValueError, RuntimeError, OSError, TypeError, KeyError, Exception):
        app.add_exception_handler(kind, _answered)
    return app


async def _answered(request: Request, error: Exception) -> JSONResponse:
    """Answer with the cause of an error, in the shape of the protocol."""
    found = _cause(request, error)
    if found.status >= INTERNAL:
        trace = error if found.status == INTERNAL else None  # of others the cause is known
        LOG.error("%s %s: %s", request.method, request.url.path, found.message, exc_info=trace)
    request.app.state.service.metrics.count_error(found.status)
    body = found.body(dialect_of(request.url.path))
    return JSONResponse(body, status_code=found.status, headers=dict(found.headers))


def _cause(request: Request, error: Exception) -> ApiError:
    """Return what a client is told of an error of lapilli's, of the framework's, or of any kind."""
    if isinstance(error, RequestValidationError):  # 400, as OpenAI does
        return misfit(error, dialect_of(request.url.path))
    if not isinstance(error, HTTPException):
        return api_error(error, request.url.path)
    if isinstance(error.__cause__, OSError):  # the framework calls every error of a body a 400
        return _not_stored(error.__cause__)
    if (found := unreadable(error)) is not None:
        return found
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no route {request.method} {request.url.path}"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    return ApiError(error.status_code, message, headers=dict(error.headers or {}))


def _not_stored(error: OSError) -> ApiError:
    """Return what a client is told of an upload that the server could not write to its disk."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    cause = "its disk is full" if is_full else "it can write no temporary file"
    said = f"the server could not store the upload: {cause} ({error.strerror or error})"
    return ApiError(507, f"{said}: ask again when there is room", "insufficient_storage")

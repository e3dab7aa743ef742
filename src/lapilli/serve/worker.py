"""`/worker_generate_stream` and `/worker_get_status`: what front ends of the original's demo ask.

Answers are the prompt and all text so far, again and again, each ended by a zero byte. Source:
LLaVA, llava/serve/model_worker.py; `lapilli.compat.serving` has its controller and worker as
programs.

`model` of a request is not looked at, as by the original's worker, which has one model: it is the
controller that chooses a worker by it.
"""

import json
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from lapilli.serve.answers import Answers, Delta
from lapilli.serve.media import NamedPart
from lapilli.serve.sampling import updated
from lapilli.serve.service import ChatRequest, Service
from lapilli.serve.stream import guarded

MOST_NEW_TOKENS = 1024
"""The original's own limit."""


class WorkerBody(BaseModel):
    """A prompt that a front end has rendered, with `<image>` where each picture goes."""

    model: str | None = None
    prompt: str
    images: list[str] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: str | None = None


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/worker_get_status")
    async def worker_get_status() -> dict[str, object]:
        """Say which model there is, and how many wait for it."""
        waiting = service.chat.engine.num_waiting
        return {"model_names": [service.model_name], "speed": 1, "queue_length": waiting}

    @routes.post("/worker_generate_stream", response_model=None)
    async def worker_generate_stream(body: WorkerBody, http: Request) -> StreamingResponse:
        """Go on with a prompt."""
        answers = await service.open(worker_request(body, service, http.state.owner))
        found = pieces(body.prompt, answers)
        return StreamingResponse(guarded(found, lambda error: piece(error.message, 1)))

    return routes


def worker_request(body: WorkerBody, service: Service, owner: str) -> ChatRequest:
    """Return the internal request of a body.

    Raises:
        ApiError: a sampling option out of its bounds.
    """
    options = {
        # As in the original, less than this is no temperature at all.
        "temperature": 0.0 if body.temperature <= 0.001 else body.temperature,
        "top_p": body.top_p,
        "max_new_tokens": min(body.max_new_tokens, MOST_NEW_TOKENS),
        "stop": (body.stop,) if body.stop else (),
    }
    params = updated(service.options.sampling, options)
    images = tuple(
        NamedPart({"image_url": image}, f"images[{at}]", "the picture in base64")
        for at, image in enumerate(body.images or ())
    )
    return ChatRequest(prompt=body.prompt, media=images, params=params, owner=owner)


async def pieces(prompt: str, opened: Answers) -> AsyncIterator[bytes]:
    """Yield the prompt with all text so far."""
    said = prompt
    async with opened as answers:
        async for one in answers:
            if isinstance(one, Delta):
                said += one.text
                yield piece(said, 0)


def piece(text: str, code: int) -> bytes:
    """Return one piece, JSON and a zero byte; its code is 1 for an error."""
    return json.dumps({"text": text, "error_code": code}).encode() + b"\0"

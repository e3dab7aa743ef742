"""Routes that tell of the server: models, health, version, metrics, tokens."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from lapilli import __version__
from lapilli.serve.errors import invalid
from lapilli.serve.metrics import CONTENT_TYPE
from lapilli.serve.service import Service


class TokenizeBody(BaseModel):
    """A text whose tokens are asked for."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    """Tokens whose text is asked for."""

    model: str | None = None
    tokens: list[int]


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    @routes.get("/ready", response_model=None)
    async def ready() -> Response:
        """Say whether requests are taken."""
        if service.is_stopping:
            return JSONResponse({"status": "stopping"}, status_code=503)
        return JSONResponse({"status": "ready"})

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """Say which lapilli this is."""
        return {"version": __version__}

    @routes.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Return counts and times for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    _add_models(routes, service)
    _add_tokens(routes, service)
    return routes


def _add_models(routes: APIRouter, service: Service) -> None:
    """Add the routes that describe the model."""

    @routes.get("/v1/models")
    async def models() -> dict[str, object]:
        """List the one model that there is."""
        return {"object": "list", "data": [model_json(service)]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        """Describe the model."""
        service.check_model(name)
        return model_json(service)


def _add_tokens(routes: APIRouter, service: Service) -> None:
    """Add the routes between texts and tokens."""

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, object]:
        """Return the tokens of a text."""
        service.check_model(body.model)
        encode = service.chat.tokenizer.encode
        ids = await service.read(lambda: encode(body.prompt, add_bos=body.add_special_tokens))
        most = service.chat.context_length
        return {"tokens": ids, "count": len(ids), "max_model_len": most}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        """Return the text of tokens."""
        service.check_model(body.model)
        service.check_tokens(len(body.tokens), "tokens")
        size = service.chat.tokenizer.vocab_size
        if any(not 0 <= token < size for token in body.tokens):
            raise invalid(f"tokens must be from 0 to {size - 1}", "tokens")
        return {"prompt": await service.read(service.chat.tokenizer.decode, body.tokens)}


def model_json(service: Service) -> dict[str, object]:
    """Return the model as OpenAI lists it, with what it reads and how much."""
    chat = service.chat
    config = chat.model.language_model.config
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "lapilli",
        "max_model_len": chat.context_length,
        "modalities": ["text", *chat.model.modalities],
        "architecture": {
            "language_model": chat.config.text.family,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "parameters": sum(p.numel() for p in chat.model.parameters()),
        },
    }

"""`/v1/embeddings`: a vector for each text, or for texts and pictures together."""

import base64
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from lapilli.pipeline import ProcessedPrompt
from lapilli.pipeline.embed import Embedder
from lapilli.prompt.encode import EncodedPrompt
from lapilli.serve.chat import MessageBody, parts_of, turns_of
from lapilli.serve.errors import invalid
from lapilli.serve.service import Service
from lapilli.serve.stream import unless_gone
from lapilli.shapes import Float, Tensor

MOST_INPUTS = 2048

Parts = list[dict[str, Any]]
Input = str | list[int] | Parts


class EmbeddingBody(BaseModel):
    """The body of `/v1/embeddings`; part lists and `messages` are extensions."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    input: str | list[int] | list[Input] | None = None
    messages: list[MessageBody] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()
    embedder = Embedder(service.chat)

    @routes.post("/v1/embeddings", response_model=None)
    async def embeddings(body: EmbeddingBody, http: Request) -> Response:
        """Return a vector of length 1 for each input."""
        service.check_model(body.model)
        service.check_open()
        prompts = await service.read(prompts_of, service, embedder, body, http.state.owner)
        vectors = await unless_gone(http, service.compute(embedder.vectors, prompts))
        tokens = sum(len(prompt.encoded) for prompt in prompts)
        as_text = body.encoding_format == "base64"
        return JSONResponse(
            {
                "object": "list",
                "model": service.model_name,
                "data": [
                    {"object": "embedding", "index": at, "embedding": _written(one, as_text)}
                    for at, one in enumerate(vectors)
                ],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    return routes


def prompts_of(
    service: Service, embedder: Embedder, body: EmbeddingBody, owner: str
) -> list[ProcessedPrompt]:
    """Return the inputs as the model reads them; called in a worker thread.

    Raises:
        ApiError: nothing to embed, too much of it, or vectors of another width than the model has.
        LapilliError: an input that cannot be read.
    """
    width = service.chat.model.language_model.config.hidden_size
    if body.dimensions not in (None, width):
        raise invalid(
            f"dimensions must be {width}, the width of the model, or left out: got "
            f"{body.dimensions}",
            "dimensions",
        )
    if (body.input is None) is (body.messages is None):
        raise invalid("give either input or messages", "input")
    if body.messages is not None:
        messages = service.messages(turns_of(body.messages), owner)
        return [embedder.prompt(messages, "messages")]
    given = inputs_of([] if body.input is None else body.input)
    if not 1 <= len(given) <= MOST_INPUTS:
        raise invalid(f"input must have 1 to {MOST_INPUTS} entries, got {len(given)}", "input")
    count = sum(
        isinstance(part, dict) and part.get("type") not in ("text", "input_text")
        for one in given
        if isinstance(one, list)
        for part in one
    )
    service.media.check_count(count, "input")
    return [_prompt(one, at, service, embedder, owner) for at, one in enumerate(given)]


def inputs_of(given: str | list[int] | list[Input]) -> list[Input]:
    """Return the texts, lists of tokens or lists of parts of an input, which may be one of them."""
    if isinstance(given, str):
        return [given]
    tokens = [one for one in given if isinstance(one, int)]
    return [tokens] if tokens else [one for one in given if not isinstance(one, int)]


def _prompt(
    given: Input, at: int, service: Service, embedder: Embedder, owner: str
) -> ProcessedPrompt:
    name = f"input[{at}]"
    if isinstance(given, str):
        return embedder.prompt(given, name)
    if given and isinstance(given[0], int):
        service.check_tokens(len(given), name)
        ids = [token for token in given if isinstance(token, int)]
        size, most = service.chat.tokenizer.vocab_size, service.chat.context_length
        if not all(0 <= token < size for token in ids) or len(ids) > most:
            raise invalid(f"{name}: expected at most {most} tokens from 0 to {size - 1}", name)
        first = list(service.chat.tokenizer.prefix_ids)
        ids = ids if ids[: len(first)] == first else [*first, *ids]
        if len(ids) == len(first):
            raise invalid(
                f"{name} has no tokens behind those that every text begins with "
                f"({', '.join(map(str, first))}): add the tokens of a text",
                name,
            )
        return ProcessedPrompt(EncodedPrompt(ids, [False] * len(ids)), ())
    parts = parts_of([part for part in given if isinstance(part, dict)], name)
    return embedder.prompt(service.media.opened(parts, owner), name)


def _written(vector: Float[Tensor, " D"], as_text: bool) -> list[float] | str:
    """Return numbers, or the base64 of little-endian float32, as OpenAI's client asks for."""
    if not as_text:
        numbers: list[float] = vector.tolist()
        return numbers
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()

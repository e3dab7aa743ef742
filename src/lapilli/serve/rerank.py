"""`/rerank`, `/v1/rerank`, `/v2/rerank`: vLLM's, Jina's and Cohere's: the best documents first.

A document is scored by `rank.Ranker`: the probability that the model says yes when it is asked
whether the document matches the query, which is read once.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from lapilli.prompt.message import MediaPart
from lapilli.rank import Ranker, RankTemplate
from lapilli.rank.prompt import POINTWISE, Content
from lapilli.serve.answers import new_id
from lapilli.serve.chat import MEDIA_TYPES, parts_of
from lapilli.serve.errors import invalid
from lapilli.serve.media import NamedPart, Part
from lapilli.serve.service import Service
from lapilli.serve.stream import unless_gone

Parts = list[dict[str, Any]]


class DocumentBody(BaseModel):
    """A document that is more than a text: exactly one of the fields."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = None
    image: str | None = None
    image_url: str | dict[str, Any] | None = None
    content: Parts | None = None
    item_id: str | int | None = None
    modality: str | None = None


class RerankBody(BaseModel):
    """The body of a reranking."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    query: str | DocumentBody | Parts
    documents: Annotated[list[str | DocumentBody | Parts], Field(min_length=1)]
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool | None = None
    instruct: str | None = None


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()
    reranking = Reranking(service)

    @routes.post("/rerank", response_model=None)
    @routes.post("/v1/rerank", response_model=None)
    @routes.post("/v2/rerank", response_model=None)
    async def rerank(body: RerankBody, http: Request) -> Response:
        """Return documents by how likely each matches the query."""
        service.check_model(body.model)
        service.check_open()
        is_cohere = http.url.path.startswith("/v2/")  # whose second version returns none
        shows = not is_cohere if body.return_documents is None else body.return_documents
        query, documents = await service.read(reranking.documents, body, http.state.owner)
        found = service.compute(reranking.rerank, body, query, documents)
        scores, tokens = await unless_gone(http, found)
        return JSONResponse(rerank_json(body, scores, tokens, service.model_name, shows=shows))

    return routes


class Reranking:
    """Rankings of one server, which keep what they read of queries.

    Args:
        service: the model, and how media are opened.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._chat = service.chat

    def documents(self, body: RerankBody, owner: str) -> tuple[list[Content], list[list[Content]]]:
        """Return query and documents, their pictures opened; called in a worker thread.

        Raises:
            ApiError: a document of no known form, or an id without a store.
            MediaError: a picture that cannot be opened.
        """
        self._service.media.check_count(num_pictures([body.query, *body.documents]))
        query = self._contents(body.query, "query", owner)
        found = [
            self._contents(one, f"documents[{at}]", owner) for at, one in enumerate(body.documents)
        ]
        return query, found

    def rerank(
        self, body: RerankBody, query: list[Content], documents: list[list[Content]]
    ) -> tuple[list[float], int]:
        """Return the relevance of every document, and the positions that were read."""
        ranker = self._ranker(body.instruct)
        tokens: list[int] = []
        names = [f"documents[{at}]" for at in range(len(documents))]
        scores = list(ranker.stream(query, documents, names=names, on_read=tokens.append))
        return scores, sum(tokens)

    def _ranker(self, instruct: str | None) -> Ranker:
        """Return the ranker of an instruction; the usual one keeps what it read of queries."""
        if instruct:
            said = RankTemplate(user=f"{instruct}\n{POINTWISE}")
            return Ranker(self._chat, template=said, prefix_bytes=0)
        return self._plain_ranker

    @cached_property
    def _plain_ranker(self) -> Ranker:
        return Ranker(self._chat, prefix_bytes=self._service.options.limits.prefix_bytes)

    def _contents(self, given: str | DocumentBody | Parts, where: str, owner: str) -> list[Content]:
        """Return a query or a document as texts and media in order."""
        if isinstance(given, str):
            return [given]
        if isinstance(given, list):
            return [*self._service.media.opened(texts_and_media(given, where), owner)]
        named = [
            name
            for name in ("text", "image", "image_url", "content", "item_id")
            if getattr(given, name) is not None
        ]
        is_captioned = len(named) == 2 and named[0] == "text" and named[1] in ("image", "image_url")
        if len(named) != 1 and not is_captioned:
            raise invalid(
                f"{where} has {', '.join(named) or 'nothing'}: expected text, image, both, "
                "content or item_id",
                where,
            )
        if given.content is not None:
            return self._contents(given.content, where, owner)
        if given.item_id is not None:
            return [MediaPart(given.item_id, self._modality(given.modality, where))]
        found: list[Content] = []
        url = given.image if given.image is not None else given.image_url
        if url is not None:
            name = "image_url" if given.image is None else "image"
            part = NamedPart({"image_url": url}, f"{where}.{name}")
            found.append(self._service.media.part(part, owner))
        return found if given.text is None else [*found, given.text]

    def _modality(self, name: str | None, where: str) -> str:
        """Return the modality whose store has an id.

        Raises:
            ApiError: none, or several and no name.
        """
        stores = list(self._chat.stores)
        if name is None and len(stores) == 1:
            return stores[0]
        if name not in stores:
            raise invalid(
                f"{where} has an item_id, and modality says {name!r}: this server has stores of "
                f"{', '.join(stores) or 'no modality'}",
                where,
            )
        return str(name)


def num_pictures(given: Sequence[object]) -> int:
    """Return how many pictures queries, documents and items have."""
    count = 0
    for one in given:
        parts = one.content if isinstance(one, DocumentBody) else one
        if isinstance(one, DocumentBody) and (one.image or one.image_url):
            count += 1
        if isinstance(parts, list):
            count += sum(isinstance(p, dict) and p.get("type") in MEDIA_TYPES for p in parts)
    return count


def texts_and_media(given: Parts, where: str) -> Sequence[Part]:
    """Return parts as texts, and pictures that are not opened yet."""
    known: Parts = []
    for part in given:
        kind = part.get("type", "text" if "text" in part else "image")
        is_plain = kind == "image" and "image" in part
        plain = {"image_url": part.get("image"), "type": "image"}
        known.append(NamedPart(plain, f"{where}.image") if is_plain else part)
        known[-1].setdefault("type", kind)
    return parts_of(known, where)


def rerank_json(
    body: RerankBody, scores: Sequence[float], tokens: int, model: str, *, shows: bool
) -> dict[str, object]:
    """Return the response of a reranking: what vLLM, Jina's and Cohere's clients read."""
    order = sorted(range(len(scores)), key=lambda at: (-scores[at], at))[: body.top_n]
    results = []
    for at in order:
        one: dict[str, Any] = {"index": at, "relevance_score": scores[at]}
        if shows:
            one["document"] = _document_json(body.documents[at])
        results.append(one)
    return {
        "id": new_id("rerank-"),
        "model": model,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _document_json(document: str | DocumentBody | Parts) -> dict[str, object]:
    """Return a document as it was sent."""
    if isinstance(document, str):
        return {"text": document}
    if isinstance(document, list):
        return {"content": document}
    return document.model_dump(exclude_none=True)

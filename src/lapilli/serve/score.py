"""`/v1/score`: SGLang's: probabilities of label tokens after a query and each of many items.

Raw texts or tokens are read, without a conversation around them. Query and item are tokenized
apart, so that a query is read once for all items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from lapilli.lm import LanguageModel
from lapilli.pipeline import ProcessedPrompt
from lapilli.pipeline.scorer import SuffixScorer
from lapilli.prompt.encode import EncodedPrompt, Span, encode
from lapilli.prompt.template import MediaSlot, Segment, TextSegment
from lapilli.serve.errors import invalid
from lapilli.serve.rerank import Parts, num_pictures, texts_and_media
from lapilli.serve.service import Service
from lapilli.serve.stream import unless_gone
from lapilli.shapes import Float, Tensor

Tokens = list[int]
Vectors = list[list[float]]


class ScoreBody(BaseModel):
    """The body of `/v1/score`; texts with pictures (part lists) are an extension."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    query: str | Tokens | Parts = ""
    items: str | list[str | Tokens | Parts]
    label_token_ids: Tokens | list[Tokens]
    apply_softmax: bool = False
    temperature: float = Field(default=1.0, ge=1e-4, le=1e4)  # float32 holds what is divided
    item_first: bool = False
    return_token_logprobs: bool = False
    return_pooled_hidden_states: bool = False
    score_extraction_token: str | None = None
    embed_override_token_id: int | None = None
    query_embed_overrides: Vectors | None = None
    item_embed_overrides: list[Vectors | None] | None = None


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()
    scoring = Scoring(service)

    @routes.post("/v1/score", response_model=None)
    async def score(body: ScoreBody, http: Request) -> Response:
        """Return probabilities of label tokens after query and item."""
        service.check_model(body.model)
        service.check_open()
        rows = await service.read(scoring.rows, body, http.state.owner)
        found = await unless_gone(http, service.compute(scoring.score, body, rows))
        return JSONResponse(found)

    return routes


@dataclass(frozen=True, slots=True)
class Row:
    """Where one score is read: behind a suffix, of an item of the request."""

    item: int
    prefix: ProcessedPrompt
    suffix: ProcessedPrompt


class Scoring:
    """Scores of one server, which keep what they read of queries.

    Args:
        service: the model, and how media are opened.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._chat = service.chat
        kept = service.options.limits.prefix_bytes
        self._scorer = SuffixScorer(service.chat.model, prefix_bytes=kept)

    def rows(self, body: ScoreBody, owner: str) -> list[Row]:
        """Return where the scores of a request are read; called in a worker thread.

        Raises:
            ApiError: fields that contradict each other, or a token that is none.
        """
        items = [body.items] if isinstance(body.items, str) else list(body.items)
        self._check(body, items)
        vectors = body.item_embed_overrides or [None] * len(items)
        query = self._piece(body.query, body.query_embed_overrides, "query", body, owner)
        pieces = [
            self._piece(item, vectors[at], f"items[{at}]", body, owner)
            for at, item in enumerate(items)
        ]
        if body.score_extraction_token is not None:
            return self._extracted(body, query, pieces)
        rows = []
        for at, piece in enumerate(pieces):
            first, second = (piece, query) if body.item_first else (query, piece)
            rows.append(Row(at, *self._split(first, second, f"items[{at}]")))
        return rows

    def score(self, body: ScoreBody, rows: Sequence[Row]) -> dict[str, object]:
        """Return the response to `/v1/score`; called in the thread that computes."""
        ids = self._labels(body, 1 if isinstance(body.items, str) else len(body.items))
        wanted = sorted({token for some in ids for token in some})
        column = {token: at for at, token in enumerate(wanted)}
        read = _Readout(self._chat.model.language_model, wanted, body.temperature)
        found: list[Tensor] = []
        kept: list[int] = []
        for _, group in groupby(rows, key=lambda row: id(row.prefix)):  # they are read together
            some = list(group)
            prefix = some[0].prefix

            def note(is_kept: bool, length: int = len(prefix.encoded)) -> None:
                kept.append(length * is_kept)

            suffixes = [row.suffix for row in some]
            found += self._scorer.values(prefix, suffixes, read, on_prefix=note)
        if not all(bool(values.isfinite().all()) for values in found):
            raise invalid(
                "the scores are not finite: a vector in the place of a token is too large"
            )
        scores, logprobs, states = [], [], []
        for row, values in zip(rows, found, strict=True):
            at = [column[token] for token in ids[row.item]]
            logits, total = values[: len(wanted)][at], values[len(wanted)]
            logprobs.append((logits - total).tolist())
            share = logits.softmax(-1) if body.apply_softmax else (logits - total).exp()
            scores.append(share.tolist())
            states.append(values[len(wanted) + 1 :].tolist())
        is_set = body.score_extraction_token is not None
        count = len(ids)
        prefixes = {id(row.prefix): len(row.prefix.encoded) for row in rows}
        tokens = sum(prefixes.values()) + sum(len(row.suffix.encoded) for row in rows)

        def shaped(values: Sequence[list[float]]) -> Sequence[object]:
            if not is_set:
                return values
            return [
                [value for row, value in zip(rows, values, strict=True) if row.item == at]
                for at in range(count)
            ]

        return {
            "object": "scoring",
            "model": self._service.model_name,
            "scores": shaped(scores),
            "token_logprobs": shaped(logprobs) if body.return_token_logprobs else None,
            "pooled_hidden_states": shaped(states) if body.return_pooled_hidden_states else None,
            "usage": {
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "completion_tokens": 0,
                "prompt_tokens_details": {"cached_tokens": sum(kept)},
            },
        }

    def _check(self, body: ScoreBody, items: Sequence[object]) -> None:
        """Refuse fields of a score that contradict each other."""
        if not items:
            raise invalid("items is empty: give at least one", "items")
        self._service.media.check_count(num_pictures([body.query, *items]))
        self._labels(body, len(items))
        vectors = body.item_embed_overrides
        if vectors is not None and len(vectors) != len(items):
            raise invalid(
                f"{len(items)} items but item_embed_overrides of {len(vectors)}: give one entry "
                "for each, null where there is none",
                "item_embed_overrides",
            )
        is_given = bool(vectors and any(vectors)) or bool(body.query_embed_overrides)
        if is_given and body.embed_override_token_id is None:
            raise invalid(
                "embed_override_token_id is missing: it says which token the vectors replace",
                "embed_override_token_id",
            )

    def _labels(self, body: ScoreBody, num_items: int) -> list[Tokens]:
        """Return the label tokens of every item.

        Raises:
            ApiError: none, another number of lists than of items, or a token that is none.
        """
        tokens = [one for one in body.label_token_ids if isinstance(one, int)]
        lists = [one for one in body.label_token_ids if not isinstance(one, int)]
        lists = lists or [tokens] * num_items
        size = self._chat.tokenizer.vocab_size
        if len(lists) != num_items or not all(lists):
            raise invalid(
                f"label_token_ids must be a list of tokens, or one list for each of the "
                f"{num_items} items, got {len(lists)} lists",
                "label_token_ids",
            )
        wrong = [token for some in lists for token in some if not 0 <= token < size]
        if wrong:
            raise invalid(
                f"label_token_ids: {wrong[0]} is no token: the vocabulary has 0 to {size - 1}",
                "label_token_ids",
            )
        return lists

    def _extracted(
        self, body: ScoreBody, query: ProcessedPrompt, pieces: Sequence[ProcessedPrompt]
    ) -> list[Row]:
        """Return a row for every place of the token that scores are read at."""
        text = str(body.score_extraction_token)
        token = self._chat.tokenizer.token_to_id(text)
        if token is None or body.item_first or token in query.encoded.input_ids:
            reason = "is no token" if token is None else "goes with item_first=false"
            raise invalid(
                f"score_extraction_token {text!r} {reason}, and may not stand in the query",
                "score_extraction_token",
            )
        rows = []
        for at, piece in enumerate(pieces):
            prefix, suffix = self._split(query, piece, f"items[{at}]")
            ends = [i + 1 for i, one in enumerate(suffix.encoded.input_ids) if one == token]
            rows += [Row(at, prefix, _beginning(suffix, end)) for end in ends]
        if not rows:
            raise invalid(f"no item has the token {text!r} to read scores at", "items")
        return rows

    def _split(
        self, first: ProcessedPrompt, second: ProcessedPrompt, where: str
    ) -> tuple[ProcessedPrompt, ProcessedPrompt]:
        """Return what is read once, and what stands behind it.

        Raises:
            ApiError: nothing on one of the sides, or more than the model reads.
        """
        length, limit = len(first.encoded) + len(second.encoded), self._chat.context_length
        if not len(first.encoded) or not len(second.encoded):
            raise invalid(f"{where}: query and item both need a text", where)
        if length > limit:
            raise invalid(
                f"{where} has {length} tokens with the query, the model reads {limit}: shorten it",
                where,
                code="context_length_exceeded",
            )
        return first, second

    def _piece(
        self,
        given: str | Tokens | Parts,
        vectors: Vectors | None,
        where: str,
        body: ScoreBody,
        owner: str,
    ) -> ProcessedPrompt:
        """Return a query or an item as tokens and media."""
        is_first = (where == "query") is not body.item_first
        chat = self._chat
        if isinstance(given, list) and given and isinstance(given[0], dict):
            segments: list[Segment] = []
            media: list[object] = []
            for part in texts_and_media(given, where):
                if isinstance(part, dict):
                    medium = self._service.media.part(part, owner)
                    segments.append(MediaSlot(medium.modality))
                    media.append(chat.prepare(medium))
                else:
                    segments.append(TextSegment(part, literal=True))
            lengths = [chat.model.span_length("image", one) for one in media]
            encoded = encode(segments, chat.tokenizer, lengths, add_bos=is_first)
            return ProcessedPrompt(encoded, tuple(media))
        if isinstance(given, str):
            ids = chat.tokenizer.encode(given, add_bos=is_first)
        else:
            self._service.check_tokens(len(given), where)
            ids = [token for token in given if isinstance(token, int)]
            wrong = [token for token in ids if not 0 <= token < chat.tokenizer.vocab_size]
            if wrong:
                raise invalid(f"{where}: {wrong[0]} is no token", where)
        return self._overridden(ids, vectors, where, body.embed_override_token_id)

    def _overridden(
        self, ids: list[int], vectors: Vectors | None, where: str, token: int | None
    ) -> ProcessedPrompt:
        """Return tokens, with a vector in every place of the token that stands for one."""
        mask = [False] * len(ids)
        if not vectors:
            return ProcessedPrompt(EncodedPrompt(ids, mask), ())
        places = [at for at, one in enumerate(ids) if one == token]
        width = self._chat.model.language_model.config.hidden_size
        if len(places) != len(vectors) or any(len(one) != width for one in vectors):
            raise invalid(
                f"{where} has the token {token} {len(places)} times and {len(vectors)} vectors of "
                f"{sorted({len(one) for one in vectors})} numbers: expected a vector of {width} "
                "numbers for each",
                where,
            )
        rows = torch.tensor(vectors, dtype=torch.float32)
        if not bool(rows.isfinite().all()):
            raise invalid(f"{where}: a vector has NaN or infinite numbers", where)
        spans = tuple(Span(0, at, 1) for at in places)
        return ProcessedPrompt(EncodedPrompt(ids, mask, spans), tuple(torch.split(rows, 1)))


class _Readout:
    """What is read of last states: logits of some tokens, their log-sum over all, the states."""

    def __init__(
        self, language_model: LanguageModel, ids: Sequence[int], temperature: float
    ) -> None:
        self._language_model = language_model
        self._ids = list(ids)
        self._temperature = temperature

    def __call__(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n L"]:
        logits = self._language_model.logits(hidden).float() / self._temperature
        total = logits.logsumexp(dim=-1, keepdim=True)
        return torch.cat([logits[:, self._ids], total, hidden.float()], dim=-1)


def _beginning(piece: ProcessedPrompt, end: int) -> ProcessedPrompt:
    """Return the first positions of a piece."""
    spans = tuple(span for span in piece.encoded.spans if span.start + span.length <= end)
    ids, mask = piece.encoded.input_ids[:end], piece.encoded.loss_mask[:end]
    return ProcessedPrompt(EncodedPrompt(ids, mask, spans), piece.media[: len(spans)])

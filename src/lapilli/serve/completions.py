"""`/v1/completions`: texts that the model goes on with, without a conversation around them."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from lapilli.config.generation import SamplingParams
from lapilli.serve.chat import logprobs_json, timings_json, usage_json
from lapilli.serve.errors import ApiError
from lapilli.serve.sampling import SamplingBody
from lapilli.serve.service import Answers, ChatRequest, Finished, Service
from lapilli.serve.stream import DONE, event, events, unless_gone
from lapilli.serve.structured import StructuredBody


class CompletionBody(SamplingBody, StructuredBody):
    """The body of `/v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, http: Request) -> Response:
        """Go on with texts, at once or as a stream."""
        service.check_model(body.model)
        requests = completion_requests(body, service.options.sampling, http.state.owner)
        opened: list[Answers] = []
        try:
            for request in requests:
                opened.append(await service.open(request))  # noqa: PERF401 - kept if one fails
        except BaseException:
            for answers in opened:
                answers.close()
            raise
        reply = CompletionReply(service, body, opened)
        if body.stream:
            return events(reply.stream())
        return JSONResponse(await unless_gone(http, reply.whole()))

    return routes


def completion_requests(
    body: CompletionBody, base: SamplingParams, owner: str
) -> list[ChatRequest]:
    """Return one internal request per prompt.

    Raises:
        ApiError: no prompt, several as a stream, or an option that this server does not have.
    """
    if body.suffix or (body.best_of or body.n or 1) != (body.n or 1):
        raise ApiError(400, "suffix and best_of are not supported: leave them out")
    given = body.prompt
    prompts: list[Any] = (
        list(given)
        if isinstance(given, list) and given and not isinstance(given[0], int)
        else [given]
    )
    if not given or not all(prompts):
        raise ApiError(400, "prompt is empty: give a text or tokens", param="prompt")
    if body.stream and len(prompts) > 1:
        raise ApiError(400, f"{len(prompts)} prompts cannot be streamed: ask for one", param="n")
    most = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
    params = body.params(base, logprobs=body.logprobs, max_new_tokens=most, grammar=body.grammar())
    return [
        ChatRequest(
            prompt=one if isinstance(one, str) else tuple(one),
            params=params,
            has_limit=body.max_tokens is not None,
            choices=1 if body.n is None else body.n,
            owner=owner,
            endpoint="completions",
        )
        for one in prompts
    ]


class CompletionReply:
    """The answers to the prompts of one request, in OpenAI's form."""

    def __init__(self, service: Service, body: CompletionBody, opened: list[Answers]) -> None:
        self._service = service
        self._body = body
        self._opened = opened
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """Return the response in one piece."""
        choices: list[dict[str, Any]] = []
        total = self._opened[0].usage
        try:
            for answers in self._opened:
                async with answers:
                    finished = await answers.collect()
                self._service.metrics.count(answers)
                choices += [self._choice(one, len(choices) + one.index) for one in finished]
                if answers is not self._opened[0]:
                    total.prompt += answers.usage.prompt
                    total.cached += answers.usage.cached
                    total.completion += answers.usage.completion
        finally:
            for answers in self._opened:
                answers.close()
        for number, choice in enumerate(choices):
            choice["index"] = number
        timings = timings_json(self._opened[-1].timings, total)
        return {**self._head, "choices": choices, "usage": usage_json(total), "timings": timings}

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the response to a single prompt as events."""
        [opened] = self._opened
        options = self._body.stream_options
        async with opened as answers:
            if self._body.echo:
                yield self._chunk(0, self._prompt_text())
            async for one in answers:
                if isinstance(one, Finished):
                    yield self._chunk(one.index, "", one.reason)
                elif one.text:
                    yield self._chunk(one.index, one.text)
        self._service.metrics.count(answers)
        if options is not None and options.include_usage:
            yield event({**self._head, "choices": [], "usage": usage_json(answers.usage)})
        yield DONE

    def _prompt_text(self) -> str:
        prompt = self._body.prompt
        return prompt if isinstance(prompt, str) else ""

    def _chunk(self, index: int, text: str, finish: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        return event({**self._head, "choices": [choice]})

    def _choice(self, one: Finished, index: int) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            reports = logprobs_json(one.generation.logprobs or (), self._service.chat.tokenizer)
            logprobs = {
                "tokens": [report["token"] for report in reports],
                "token_logprobs": [report["logprob"] for report in reports],
                "top_logprobs": [
                    {top["token"]: top["logprob"] for top in report["top_logprobs"]}
                    for report in reports
                ],
            }
        text = one.generation.text
        return {
            "index": index,
            "text": self._prompt_text() + text if self._body.echo else text,
            "logprobs": logprobs,
            "finish_reason": one.reason,
        }

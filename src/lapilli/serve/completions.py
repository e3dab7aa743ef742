"""`/v1/completions`: texts that the model goes on with, without a conversation around them."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from lapilli.config.generation import SamplingParams
from lapilli.serve.answers import Answers, Finished, Usage
from lapilli.serve.chat import head_json, logprobs_json, timings_json, usage_json
from lapilli.serve.errors import invalid
from lapilli.serve.sampling import SamplingBody
from lapilli.serve.service import ChatRequest, Service
from lapilli.serve.stream import DONE, event, streamed, unless_gone
from lapilli.serve.structured import StructuredBody

MOST_LOGPROBS = 20
"""As chat has it; OpenAI's own completions have 5."""


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
        requests = completion_requests(
            body,
            service.options.sampling,
            http.state.owner,
            most=service.engine.engine.options.max_waiting,
        )
        writer = CompletionWriter(service, body)
        async with AsyncExitStack() as stack:  # closes those that are open if one fails
            opened = [await stack.enter_async_context(await service.open(r)) for r in requests]
            if body.stream:
                stack.pop_all()
                return streamed(writer.stream(*opened))
            return JSONResponse(await unless_gone(http, writer.whole(opened)))

    return routes


def completion_requests(
    body: CompletionBody, base: SamplingParams, owner: str, *, most: int
) -> list[ChatRequest]:
    """Return one internal request per prompt.

    Args:
        body: what was asked.
        base: options of the server.
        owner: whose key it came with.
        most: answers that the engine may have under way.

    Raises:
        ApiError: no prompt, several as a stream, more than an engine ever takes, or an option that
            this server does not have.
    """
    for name, is_given in (
        ("suffix", body.suffix),
        ("best_of", (body.best_of or body.n or 1) != (body.n or 1)),
    ):
        if is_given:
            raise invalid(f"{name} is not supported: leave it out", name)
    given = body.prompt
    if isinstance(given, str):
        prompts: list[str | list[int]] = [given]
    else:
        tokens = [one for one in given if isinstance(one, int)]
        prompts = [one for one in given if not isinstance(one, int)] or [tokens]
    if not all(prompts):
        raise invalid("prompt is empty: give a text or tokens", "prompt")
    if body.stream and len(prompts) > 1:
        raise invalid(f"{len(prompts)} prompts cannot be streamed: ask for one", "prompt")
    choices = 1 if body.n is None else body.n
    if len(prompts) * max(1, choices) > most:
        each = f" with {choices} answers each" if choices > 1 else ""
        raise invalid(
            f"{len(prompts)} prompts{each} in one request, this server takes {most} answers at the "
            "same time: send fewer prompts",
            "prompt",
        )
    logprobs = body.logprobs
    if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
        raise invalid(f"logprobs must be from 0 to {MOST_LOGPROBS}, got {logprobs}", "logprobs")
    longest = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
    params = body.params(base, logprobs=logprobs, max_new_tokens=longest, grammar=body.grammar())
    return [
        ChatRequest(
            prompt=one if isinstance(one, str) else tuple(one),
            params=params,
            has_limit=body.max_tokens is not None,
            choices=choices,
            owner=owner,
        )
        for one in prompts
    ]


class CompletionWriter:
    """Writer of the answers to the prompts of one request."""

    def __init__(self, service: Service, body: CompletionBody) -> None:
        self._tokenizer = service.chat.tokenizer
        self._body = body
        self._head = {**head_json("cmpl-", service), "object": "text_completion"}

    async def whole(self, opened: Sequence[Answers]) -> dict[str, object]:
        """Return the response in one piece."""
        finished = [one for answers in opened for one in await answers.collect()]
        usages = [answers.usage for answers in opened]
        total = Usage(
            prompt=sum(one.prompt for one in usages),
            cached=sum(one.cached for one in usages),
            completion=sum(one.completion for one in usages),
        )
        return {
            **self._head,
            "choices": [self._choice(one, number) for number, one in enumerate(finished)],
            "usage": usage_json(total),
            "timings": timings_json(opened[-1].timings, total),
        }

    async def stream(self, opened: Answers) -> AsyncIterator[bytes]:
        """Yield the response to a single prompt as events."""
        async with opened as answers:
            if self._body.echo:
                yield self._chunk(0, self._prompt_text())
            async for one in answers:
                if isinstance(one, Finished):
                    yield self._chunk(one.index, "", one.reason)
                elif one.text:
                    yield self._chunk(one.index, one.text)
        if self._body.reports_usage:
            yield event({**self._head, "choices": [], "usage": usage_json(answers.usage)})
        yield DONE

    def _prompt_text(self) -> str:
        prompt = self._body.prompt
        return prompt if isinstance(prompt, str) else ""

    def _chunk(self, index: int, text: str, finish: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        return event({**self._head, "choices": [choice]})

    def _choice(self, one: Finished, index: int) -> dict[str, object]:
        logprobs = None
        if self._body.logprobs is not None:
            reports = logprobs_json(one.generation.logprobs or (), self._tokenizer)
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

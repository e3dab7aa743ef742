"""`/v1/chat/completions`: OpenAI's chat, with the extensions that its users know from vLLM."""

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from lapilli.config.generation import SamplingParams
from lapilli.generate.output import TokenLogprob
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.serve.answers import Answers, Finished, Timings, Usage, new_id
from lapilli.serve.calls import (
    AnswerReader,
    Call,
    CallEnd,
    CallStart,
    Spoken,
    Text,
    calls_text,
    response_parts,
)
from lapilli.serve.errors import invalid
from lapilli.serve.media import Part
from lapilli.serve.sampling import SamplingBody
from lapilli.serve.service import ChatRequest, Service, Turn
from lapilli.serve.stream import DONE, event, respond
from lapilli.serve.structured import StructuredBody
from lapilli.serve.tools import ToolUse, choice_of, tool_use, tools_of, with_instructions

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
MEDIA_TYPES = frozenset(("image_url", "input_image", "image_embeds", "image"))
TEXT_TYPES = frozenset(("text", "input_text", "output_text", "refusal"))


class MessageBody(BaseModel):
    """One message: its content is a text, or texts and pictures in order."""

    model_config = ConfigDict(extra="ignore")

    role: Role
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatBody(SamplingBody, StructuredBody):
    """The body of `/v1/chat/completions`."""

    messages: list[MessageBody]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def most(self) -> int | None:
        """The longest answer that the client named."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def use(self) -> ToolUse:
        """Return the tools, and whether one must be called.

        Raises:
            ApiError: a declaration or a choice that cannot be used.
        """
        choice, allowed = choice_of(self.tool_choice)
        tools = tools_of(self.tools)
        return tool_use(tools, choice, allowed, is_parallel=self.parallel_tool_calls)


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatBody, http: Request) -> Response:
        """Answer a conversation, at once or as a stream."""
        service.check_model(body.model)
        use = body.use()
        request = chat_request(body, use, service.options.sampling, http.state.owner)
        return await respond(
            http, service, request, ChatWriter(service, body, use), is_stream=body.stream
        )

    return routes


def chat_request(body: ChatBody, use: ToolUse, base: SamplingParams, owner: str) -> ChatRequest:
    """Return the internal request of a body.

    Raises:
        ApiError: no messages, a part of an unknown type, or options that contradict each other.
        GenerationError: sampling options that contradict each other.
    """
    logprobs = None
    if body.logprobs or body.top_logprobs:
        logprobs = body.top_logprobs or 0
        if not 0 <= logprobs <= 20:
            raise invalid(f"top_logprobs must be from 0 to 20, got {logprobs}", "top_logprobs")
    params = body.params(
        base,
        logprobs=logprobs,
        max_new_tokens=body.most,
        grammar=body.grammar(),
        longest="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    )
    return ChatRequest(
        turns=with_instructions(turns_of(body.messages), use),
        params=use.params(params),
        has_limit=body.most is not None,
        choices=1 if body.n is None else body.n,
        owner=owner,
    )


def turns_of(messages: list[MessageBody]) -> tuple[Turn, ...]:
    """Return messages as turns; what a tool returned is shown to the model as the user's.

    Raises:
        ApiError: no messages, or a part of an unknown type.
    """
    if not messages:
        raise invalid("messages is empty: give at least one of the user", "messages")
    roles: Mapping[str, str] = {"developer": "system", "tool": "user", "function": "user"}
    found = []
    for at, one in enumerate(messages):
        parts = parts_of(one.content, f"messages[{at}]")
        if one.role in ("tool", "function"):
            parts = response_parts(parts)
        calls = calls_text(one.tool_calls, f"messages[{at}]")
        if parts and calls:
            parts = (*parts, "\n")
        found.append(Turn(role=roles.get(one.role, one.role), parts=(*parts, *calls)))
    return tuple(found)


def parts_of(content: str | list[dict[str, Any]] | None, name: str) -> tuple[Part, ...]:
    """Return the parts of a message in order; pictures are opened later, in a worker thread.

    Raises:
        ApiError: a part of an unknown type, or a text that is none.
    """
    if content is None:
        return ()
    if isinstance(content, str):
        return (content,)
    found: list[Part] = []
    for at, part in enumerate(content):
        kind, where = part.get("type"), f"{name}.content[{at}]"
        if kind in MEDIA_TYPES:
            found.append(part)
        elif kind in TEXT_TYPES:
            text = part.get("text", part.get("refusal"))
            if not isinstance(text, str):
                raise invalid(f"{where} has no text", where)
            found.append(text)
        else:
            known = ", ".join(sorted((*TEXT_TYPES, *MEDIA_TYPES)))
            raise invalid(f"{where} has the type {kind!r}: expected one of {known}", where)
    return tuple(found)


class ChatWriter:
    """Writer of the answer to one request."""

    def __init__(self, service: Service, body: ChatBody, use: ToolUse) -> None:
        self._tokenizer = service.chat.tokenizer
        self._body = body
        self._readers = [AnswerReader(use.names) for _ in range(body.n or 1)]
        self._wants_logprobs = bool(body.logprobs or body.top_logprobs)
        self._head = head_json("chatcmpl-", service)

    async def whole(self, answers: Answers) -> dict[str, object]:
        """Return the response in one piece."""
        async with answers:
            finished = await answers.collect()
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(one) for one in finished],
            **counts_json(answers),
        }

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        """Yield the response as events."""
        usage = answers.usage
        async with answers:
            for index in range(self._body.n or 1):
                yield self._chunk(usage, index, {"role": "assistant", "content": ""})
            async for one in answers:
                reader = self._readers[one.index]
                deltas = [delta for said in reader.read(one) if (delta := delta_json(said))]
                if isinstance(one, Finished):
                    for delta in deltas:
                        yield self._chunk(usage, one.index, delta)
                    yield self._chunk(usage, one.index, {}, finish=finish_of(one, reader))
                    continue
                reports = one.logprobs if self._wants_logprobs else ()
                for delta in deltas or ([{"content": ""}] if reports else []):
                    yield self._chunk(usage, one.index, delta, logprobs=reports)
                    reports = ()
        if self._body.reports_usage:
            last = {**self._head, "object": "chat.completion.chunk", "choices": []}
            yield event({**last, **counts_json(answers)})
        yield DONE

    def _choice(self, one: Finished) -> dict[str, object]:
        generation, reader = one.generation, self._readers[one.index]
        reader.push(generation.text)
        reader.flush()
        message: dict[str, object] = {"role": "assistant", "content": reader.text, "refusal": None}
        if reader.calls:
            message["content"] = reader.text or None
            message["tool_calls"] = [call_json(call) for call in reader.calls]
        logprobs = None
        if self._wants_logprobs:
            content = logprobs_json(generation.logprobs or (), self._tokenizer)
            logprobs = {"content": content, "refusal": None}
        return {
            "index": one.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish_of(one, reader),
        }

    def _chunk(
        self,
        usage: Usage,
        index: int,
        said: dict[str, object],
        *,
        finish: str | None = None,
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> bytes:
        choice: dict[str, object] = {"index": index, "delta": said, "finish_reason": finish}
        if logprobs:
            content = logprobs_json(logprobs, self._tokenizer)
            choice["logprobs"] = {"content": content, "refusal": None}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        options = self._body.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = usage_json(usage)
        return event(chunk)


def finish_of(one: Finished, reader: AnswerReader) -> str:
    """Return why an answer ended; one that was cut is `length`, whether it calls or not."""
    return "tool_calls" if reader.calls and one.reason == "stop" else one.reason


def call_json(call: Call) -> dict[str, object]:
    """Return a call as OpenAI has it in a message."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def delta_json(said: Spoken) -> dict[str, object]:
    """Return what a chunk adds to a message; {} for the end of a call, which has none."""
    if isinstance(said, Text):
        return {"content": said.text}
    if isinstance(said, CallEnd):
        return {}
    index = said.call.number
    if isinstance(said, CallStart):
        function = {"name": said.call.name, "arguments": ""}
        begun = {"index": index, "id": said.call.id, "type": "function", "function": function}
        return {"tool_calls": [begun]}
    return {"tool_calls": [{"index": index, "function": {"arguments": said.text}}]}


def head_json(kind: str, service: Service) -> dict[str, object]:
    """Return what OpenAI's responses begin with, under an id of this kind."""
    return {"id": new_id(kind), "created": int(time.time()), "model": service.model_name}


def counts_json(answers: Answers) -> dict[str, object]:
    """Return the counts and times that a response ends with."""
    usage = answers.usage
    return {"usage": usage_json(usage), "timings": timings_json(answers.timings, usage)}


def usage_json(usage: Usage) -> dict[str, object]:
    """Return counts as OpenAI names them, visual tokens besides."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached,
            "image_tokens": usage.visual,
        },
    }


def timings_json(timings: Timings, usage: Usage) -> dict[str, float]:
    """Return times in milliseconds, and speed, as llama.cpp's server does."""
    decoding = timings.total - timings.first_token
    rate = (usage.completion - 1) / decoding if usage.completion > 1 and decoding > 0 else 0.0
    return {
        "queue_ms": 1e3 * timings.queue,
        "prompt_ms": 1e3 * (timings.first_token - timings.queue),
        "first_token_ms": 1e3 * timings.first_token,
        "total_ms": 1e3 * timings.total,
        "predicted_per_second": rate,
        "cache_n": usage.cached,
    }


def logprobs_json(reports: tuple[TokenLogprob, ...], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return log-probabilities as OpenAI has them: per token, with its bytes and alternatives."""

    def named(token_id: int, logprob: float) -> dict[str, Any]:
        special = token_id in tokenizer.special_ids
        data = b"" if special else tokenizer.token_bytes(token_id)
        text = tokenizer.id_to_token(token_id) if special else data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

    return [
        {
            **named(one.token_id, one.logprob),
            "top_logprobs": [named(*alternative) for alternative in one.top],
        }
        for one in reports
    ]

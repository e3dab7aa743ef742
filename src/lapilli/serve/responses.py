"""`/v1/responses`: OpenAI's Responses API without a memory: a request brings its conversation.

    input items --turns_of--> ChatRequest --Answers--> ResponseWriter --> events, or the last one

What would need stored responses (`store: true`, `previous_response_id`, `conversation`,
`background`) is refused with the reason; `store` may be left out, and the response says that it is
false.
"""

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from lapilli.config.generation import SamplingParams
from lapilli.serve.answers import Answers, Finished, new_id
from lapilli.serve.calls import (
    AnswerReader,
    Call,
    CallArguments,
    CallStart,
    Spoken,
    Text,
    call_text,
    response_parts,
)
from lapilli.serve.chat import parts_of
from lapilli.serve.errors import invalid
from lapilli.serve.media import Part
from lapilli.serve.sampling import SamplingBody
from lapilli.serve.service import ChatRequest, Service, Turn
from lapilli.serve.stream import event, respond
from lapilli.serve.structured import StructuredBody, format_grammar
from lapilli.serve.tools import Tool, ToolUse, choice_of, function_tool, tool_use, with_instructions

ROLES: Mapping[str, str] = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}


Named = tuple[str, dict[str, object]]
"""An event: its name, and what it says."""


class ResponsesBody(SamplingBody, StructuredBody):
    """The body of `/v1/responses`."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    truncation: str | None = None
    top_logprobs: int | None = None

    def check(self) -> None:
        """Refuse what needs a server that remembers, or does not exist here.

        Raises:
            ApiError: with the reason.
        """
        for name in ("store", "previous_response_id", "conversation", "background", "prompt"):
            if getattr(self, name):
                raise invalid(
                    f"{name} is not supported: this server stores no responses and prompts, send "
                    "the whole conversation as input",
                    name,
                    code="unsupported",
                )
        if self.truncation not in (None, "disabled"):
            raise invalid(
                f"truncation {self.truncation!r} is not supported: a conversation is never cut "
                "here, shorten it or leave truncation out",
                "truncation",
                code="unsupported",
            )
        told = [
            self.instructions,
            self.metadata,
            self.text,
            self.tools,
            self.tool_choice,
            self.user,
        ]
        try:
            json.dumps(told, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:
            raise invalid(f"the response cannot repeat the request: {error}") from error
        if self.top_logprobs:
            raise invalid(
                "top_logprobs is not supported here: ask /v1/chat/completions for them",
                "top_logprobs",
                code="unsupported",
            )

    def use(self) -> ToolUse:
        """Return the tools, and whether one must be called.

        Raises:
            ApiError: a tool that is no function, or a choice that cannot be followed.
        """
        tools: list[Tool] = []
        for at, one in enumerate(self.tools or ()):
            if one.get("type") != "function":
                raise invalid(
                    f"tools[{at}] has the type {one.get('type')!r}: this server runs no tools of "
                    "its own, it calls functions of yours only",
                    f"tools[{at}]",
                    code="unsupported",
                )
            tools.append(function_tool(one, f"tools[{at}]"))
        choice, allowed = choice_of(self.tool_choice)
        return tool_use(tools, choice, allowed, is_parallel=self.parallel_tool_calls)

    def request(self, use: ToolUse, base: SamplingParams, owner: str) -> ChatRequest:
        """Return the internal request.

        Raises:
            ApiError: an item or a part of an unknown type, two forms of the answer, or a sampling
                option out of its bounds.
        """
        form = format_grammar((self.text or {}).get("format"), "text.format")
        other = self.grammar()
        if form is not None and other is not None:
            raise invalid("text.format and another form are given: leave one out")
        most = self.max_tokens if self.max_output_tokens is None else self.max_output_tokens
        longest = "max_tokens" if self.max_output_tokens is None else "max_output_tokens"
        params = self.params(base, max_new_tokens=most, grammar=form or other, longest=longest)
        return ChatRequest(
            turns=with_instructions(turns_of(self.instructions, self.input), use),
            params=use.params(params),
            has_limit=most is not None,
            owner=owner,
        )


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None)
    async def responses(body: ResponsesBody, http: Request) -> Response:
        """Answer items, at once or as a stream."""
        service.check_model(body.model)
        body.check()
        use = body.use()
        request = body.request(use, service.options.sampling, http.state.owner)
        writer = ResponseWriter(service, body, request, use)
        return await respond(http, service, request, writer, is_stream=body.stream)

    return routes


def turns_of(instructions: str | None, given: str | Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return instructions and input as turns.

    Raises:
        ApiError: nothing to answer, or an item of an unknown type.
    """
    found = [Turn(role="system", parts=(instructions,))] if instructions else []
    if isinstance(given, str):
        return [*found, Turn(role="user", parts=(given,))]
    if not given:
        raise invalid("input is empty: give a text or at least one item", "input")
    found += [turn for at, item in enumerate(given) for turn in _turns(item, f"input[{at}]")]
    return found


def _turns(item: Mapping[str, Any], where: str) -> list[Turn]:
    """Return the turn of an item; none for reasoning, which comes from other servers only."""
    kind = item.get("type", "message")
    if kind == "message":
        role = ROLES.get(str(item.get("role")))
        if role is None:
            raise invalid(
                f"{where} has the role {item.get('role')!r}: expected one of {', '.join(ROLES)}",
                where,
            )
        return [Turn(role=role, parts=_parts(item.get("content"), where))]
    if kind == "function_call":
        if not isinstance(item.get("name"), str):
            raise invalid(f"{where} has no name", where)
        said = call_text(item["name"], item.get("arguments"))
        return [Turn(role="assistant", parts=(said,))]
    if kind == "function_call_output":
        return [Turn(role="user", parts=response_parts(_parts(item.get("output"), where)))]
    if kind == "reasoning":
        return []
    raise invalid(
        f"{where} has the type {kind!r}: expected message, function_call or function_call_output",
        where,
        code="unsupported",
    )


def _parts(content: object, where: str) -> tuple[Part, ...]:
    if content is None or isinstance(content, str):
        return parts_of(content, where)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return parts_of(content, where)
    raise invalid(f"{where}: content must be a text or a list of parts", where)


class ResponseWriter:
    """Writer of one response: its items as they grow, and the events that tell of it.

    Args:
        service: the model.
        body: what was asked.
        request: as the engine has it.
        use: tools.
    """

    def __init__(
        self, service: Service, body: ResponsesBody, request: ChatRequest, use: ToolUse
    ) -> None:
        self._reader = AnswerReader(use.names)
        self._number = 0
        self._output: list[dict[str, object]] = []
        self._message: dict[str, object] | None = None
        self._response = {
            **_asked(body, request.params, use),
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": service.model_name,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }

    async def whole(self, answers: Answers) -> dict[str, object]:
        """Return the response in one piece."""
        async for _, _ in self._events(answers):
            pass
        return self._response

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        """Yield the response as events."""
        async for name, data in self._events(answers):
            yield event({"type": name, **data, "sequence_number": self._number}, name)
            self._number += 1

    async def _events(self, answers: Answers) -> AsyncIterator[Named]:
        """Yield names of events and what they say."""
        yield "response.created", {"response": dict(self._response)}
        yield "response.in_progress", {"response": dict(self._response)}
        reason = "stop"
        async with answers:
            async for one in answers:
                if isinstance(one, Finished):
                    reason = one.reason
                for piece in self._reader.read(one):
                    for found in self._said(piece):
                        yield found
        if not self._output:
            for found in self._open_message():
                yield found
        for found in self._close_message():
            yield found
        yield self._finish(answers, reason)

    def _finish(self, answers: Answers, reason: str) -> Named:
        """Return the last event, with the whole response."""
        usage = answers.usage
        self._response["usage"] = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {
                "cached_tokens": usage.cached,
                "image_tokens": usage.visual,
            },
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.completion,
        }
        self._response["output"] = self._output
        is_whole = reason == "stop"
        self._response["status"] = "completed" if is_whole else "incomplete"
        if not is_whole:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        return f"response.{self._response['status']}", {"response": self._response}

    def _said(self, piece: Spoken) -> list[Named]:
        """Return the events of a piece of the answer."""
        if isinstance(piece, Text):
            found = [] if self._message else self._open_message()
            self._text += piece.text
            place = {**self._place(), "content_index": 0}
            delta = {**place, "delta": piece.text, "logprobs": []}
            return [*found, ("response.output_text.delta", delta)]
        if isinstance(piece, CallStart):
            return [*self._close_message(), *self._open_call(piece.call)]
        if isinstance(piece, CallArguments):
            delta = {**self._place(), "delta": piece.text}
            return [("response.function_call_arguments.delta", delta)]
        return self._close_call(piece.call)

    def _place(self) -> dict[str, object]:
        """Return where the item is that grows."""
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _part(self, name: str, text: str) -> Named:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return name, {**self._place(), "content_index": 0, "part": part}

    def _add(self, item: dict[str, object]) -> Named:
        """Return the event of a new item."""
        self._output.append(item)
        added = {"output_index": len(self._output) - 1, "item": dict(item)}
        return "response.output_item.added", added

    def _done(self, item: dict[str, object]) -> Named:
        """Return the event of an item that is over."""
        return "response.output_item.done", {"output_index": len(self._output) - 1, "item": item}

    def _open_message(self) -> list[Named]:
        self._message = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._text = ""
        return [self._add(self._message), self._part("response.content_part.added", "")]

    def _close_message(self) -> list[Named]:
        """Return the events that end a message, if one is open."""
        if self._message is None:
            return []
        name, part = self._part("response.content_part.done", self._text)
        self._message["content"] = [part["part"]]
        self._message["status"] = "completed"
        done = {**self._place(), "content_index": 0, "text": self._text, "logprobs": []}
        item, self._message = self._message, None
        return [("response.output_text.done", done), (name, part), self._done(item)]

    def _open_call(self, call: Call) -> list[Named]:
        item: dict[str, object] = {
            "id": new_id("fc_"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        return [self._add(item)]

    def _close_call(self, call: Call) -> list[Named]:
        item = self._output[-1]
        item["arguments"] = call.arguments
        item["status"] = "completed" if call.is_whole else "incomplete"
        done = {**self._place(), "name": call.name, "arguments": call.arguments}
        return [("response.function_call_arguments.done", done), self._done(item)]


def _asked(body: ResponsesBody, params: SamplingParams, use: ToolUse) -> dict[str, object]:
    """Return what a response repeats of its request, with the values that counted."""
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": use.is_parallel,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": params.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": body.tools or [],
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": body.user,
    }

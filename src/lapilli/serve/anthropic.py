"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API.

    blocks (text, image, tool_use, tool_result) --turns_of--> ChatRequest --Answers--> blocks

`input_tokens` are all tokens of the prompt, pictures as the positions that they take, whether the
server found some of them in its caches or not; counting and answering give the same number.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from lapilli.config.generation import SamplingParams
from lapilli.config.grammar import Grammar
from lapilli.serve.answers import Answers, Finished, new_id
from lapilli.serve.calls import (
    AnswerReader,
    Call,
    CallArguments,
    CallEnd,
    CallStart,
    Spoken,
    Text,
    call_text,
    response_parts,
)
from lapilli.serve.errors import invalid
from lapilli.serve.media import NamedPart, Part
from lapilli.serve.sampling import check_stops, updated
from lapilli.serve.service import ChatRequest, Service, Turn
from lapilli.serve.stream import event, respond
from lapilli.serve.structured import format_grammar
from lapilli.serve.tools import Choice, Tool, ToolUse, function_tool, tool_use, with_instructions

CHOICES: Mapping[str, Choice] = {
    "auto": "auto",
    "any": "required",
    "tool": "function",
    "none": "none",
}
UNSEEN = frozenset(("thinking", "redacted_thinking"))
"""Blocks of earlier answers that no model is shown again."""


class MessageBody(BaseModel):
    """One message: a text, or blocks."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class CountBody(BaseModel):
    """The body of `/v1/messages/count_tokens`."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    messages: list[MessageBody]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    def use(self) -> ToolUse:
        """Return the tools, and whether one must be called.

        Raises:
            ApiError: a tool that runs at Anthropic, or a choice that cannot be followed.
        """
        tools: list[Tool] = []
        for at, one in enumerate(self.tools or ()):
            if one.get("type") not in (None, "custom"):
                raise invalid(
                    f"tools[{at}] has the type {one['type']!r}: this server runs no tools of its "
                    "own, declare one with an input_schema",
                    f"tools[{at}]",
                )
            tools.append(function_tool(one, f"tools[{at}]", "input_schema"))
        given = self.tool_choice or {"type": "auto"}
        choice = CHOICES.get(str(given.get("type")))
        if choice is None:
            raise invalid(
                f"tool_choice has the type {given.get('type')!r}: expected {', '.join(CHOICES)}",
                "tool_choice",
            )
        allowed = (str(given.get("name")),) if choice == "function" else None
        is_parallel = not given.get("disable_parallel_tool_use")
        return tool_use(tools, choice, allowed, is_parallel=is_parallel)

    def form(self) -> Grammar | None:
        """Return the form that the answer must have."""
        given = (self.output_config or {}).get("format") or self.output_format
        return format_grammar(given, "output_config.format")


class MessagesBody(CountBody):
    """The body of `/v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None

    def params(self, base: SamplingParams) -> SamplingParams:
        """Return the sampling options over those of the server.

        Raises:
            ApiError: one out of its bounds, too many stop sequences, or a form that cannot be used.
        """
        check_stops(self.stop_sequences, "stop_sequences")
        options = {
            "max_new_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "grammar": self.form(),
        }
        return updated(base, options, {"max_new_tokens": "max_tokens", "stop": "stop_sequences"})


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/v1/messages", response_model=None)
    async def messages(body: MessagesBody, http: Request) -> Response:
        """Answer a conversation, at once or as a stream."""
        service.check_model(body.model)
        use = body.use()
        request = ChatRequest(
            turns=with_instructions(turns_of(body), use),
            params=use.params(body.params(service.options.sampling)),
            # The protocol wants a number from everybody, so it is no claim on the context.
            has_limit=False,
            owner=http.state.owner,
        )
        writer = MessageWriter(service, body, use)
        return await respond(
            http, service, request, writer, is_stream=body.stream, dialect="anthropic"
        )

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountBody, http: Request) -> dict[str, int]:
        """Count the tokens of a prompt."""
        service.check_model(body.model)
        turns = with_instructions(turns_of(body), body.use())
        return {
            "input_tokens": await service.count(ChatRequest(turns=turns, owner=http.state.owner))
        }

    return routes


def turns_of(body: CountBody) -> list[Turn]:
    """Return instructions and messages as turns.

    Raises:
        ApiError: no messages, or a block of an unknown type.
    """
    if not body.messages:
        raise invalid("messages is empty: give at least one of the user", "messages")
    found = []
    if body.system:
        found.append(Turn(role="system", parts=_system(body.system)))
    for at, one in enumerate(body.messages):
        found.append(Turn(role=one.role, parts=parts_of(one.content, f"messages.{at}.content")))
    return found


def _system(given: str | list[dict[str, Any]]) -> tuple[Part, ...]:
    parts = parts_of(given, "system")
    if not all(isinstance(part, str) for part in parts):
        raise invalid("system holds a picture: show it in a message of the user")
    return ("\n\n".join(map(str, parts)),)


def parts_of(content: object, where: str) -> tuple[Part, ...]:
    """Return the parts of a message; pictures are opened later, in a worker thread.

    Raises:
        ApiError: a block of an unknown type, or one that lacks something.
    """
    if isinstance(content, str):
        return (content,)
    if content is None:
        return ()
    if not isinstance(content, list):
        raise invalid(f"{where} must be a text or a list of blocks", where)
    found: list[Part] = []
    for at, block in enumerate(content):
        found += _block(block, f"{where}.{at}")
    return tuple(found)


def _block(block: Mapping[str, Any], where: str) -> tuple[Part, ...]:
    """Return the parts of one block."""
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text" and isinstance(block.get("text"), str):
        return (block["text"],)
    if kind == "image":
        return (picture_of(block.get("source"), where),)
    if kind == "tool_use" and isinstance(block.get("name"), str):
        return ("\n" + call_text(block["name"], block.get("input")),)
    if kind == "tool_result":
        inner = parts_of(block.get("content"), f"{where}.content")
        return response_parts(("Error: ", *inner) if block.get("is_error") else inner)
    if kind in UNSEEN:
        return ()
    raise invalid(
        f"{where} has the type {kind!r}, or lacks a field of it: expected text, image, tool_use or "
        "tool_result",
        where,
    )


def picture_of(source: object, where: str) -> dict[str, Any]:
    """Return the picture of an image block in the form that all protocols' media have.

    Raises:
        ApiError: another source than base64, url or file.
    """
    given = source if isinstance(source, Mapping) else {}
    kind = given.get("type")
    instead = "a source of the type base64"
    if kind == "base64" and isinstance(given.get("data"), str):
        part = {"image_url": given["data"]}
        return NamedPart(part, f"{where}.source.data", instead, is_base64=True)
    if kind == "url" and isinstance(given.get("url"), str):
        return NamedPart({"image_url": given["url"]}, f"{where}.source.url", instead)
    if kind == "file" and isinstance(given.get("file_id"), str):
        return {"file_id": given["file_id"]}
    raise invalid(
        f"{where}.source has the type {kind!r}, or lacks a field of it: expected base64, url or "
        "file",
        where,
    )


class MessageWriter:
    """Writer of one answer: its blocks as they grow, and the events that tell of it."""

    def __init__(self, service: Service, body: MessagesBody, use: ToolUse) -> None:
        self._stops = body.stop_sequences or ()
        self._reader = AnswerReader(use.names)
        self._head: dict[str, object] = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": service.model_name,
        }
        self._index = -1
        self._is_text_open = False

    async def whole(self, answers: Answers) -> dict[str, object]:
        """Return the message in one piece; a call that was cut is left out."""
        async with answers:
            [one] = await answers.collect()
        blocks: list[dict[str, Any]] = []
        for said in [*self._reader.push(one.generation.text), *self._reader.flush()]:
            if isinstance(said, Text):
                if blocks and blocks[-1]["type"] == "text":
                    blocks[-1]["text"] += said.text
                else:
                    blocks.append({"type": "text", "text": said.text})
            elif isinstance(said, CallEnd) and said.call.is_whole:
                given = json.loads(said.call.arguments)
                blocks.append(_tool_use(said.call) | {"input": given})
        return {
            **self._head,
            "content": blocks,
            **self._end(one),
            "usage": usage_json(answers),
        }

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        """Yield the message as events."""
        async with answers:
            start = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None}
            start["usage"] = usage_json(answers)
            yield _event("message_start", message=start)
            async for one in answers:
                for piece in self._reader.read(one):
                    for found in self._said(piece):
                        yield found
                if isinstance(one, Finished):
                    end = self._end(one)
        for found in self._close_text():
            yield found
        yield _event("message_delta", delta=end, usage=usage_json(answers))
        yield _event("message_stop")

    def _end(self, one: Finished) -> dict[str, object]:
        """Return why the answer ended."""
        if one.reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if one.generation.stop in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": one.generation.stop}
        reason = "tool_use" if self._reader.calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}

    def _said(self, piece: Spoken) -> Sequence[bytes]:
        """Return the events of a piece of the answer."""
        if isinstance(piece, Text):
            found = []
            if not self._is_text_open:
                self._is_text_open = True
                found.append(self._start({"type": "text", "text": ""}))
            delta = {"type": "text_delta", "text": piece.text}
            found.append(_event("content_block_delta", index=self._index, delta=delta))
            return found
        if isinstance(piece, CallStart):
            return [*self._close_text(), self._start(_tool_use(piece.call) | {"input": {}})]
        if isinstance(piece, CallArguments):
            delta = {"type": "input_json_delta", "partial_json": piece.text}
            return [_event("content_block_delta", index=self._index, delta=delta)]
        return [_event("content_block_stop", index=self._index)]

    def _start(self, block: dict[str, object]) -> bytes:
        self._index += 1
        return _event("content_block_start", index=self._index, content_block=block)

    def _close_text(self) -> Sequence[bytes]:
        if not self._is_text_open:
            return []
        self._is_text_open = False
        return [_event("content_block_stop", index=self._index)]


def usage_json(answers: Answers) -> dict[str, int]:
    """Return counts as Anthropic names them; nothing of the prompt is counted apart as cached."""
    return {
        "input_tokens": answers.usage.prompt,
        "output_tokens": answers.usage.completion,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }


def _tool_use(call: Call) -> dict[str, object]:
    return {"type": "tool_use", "id": call.id, "name": call.name}


def _event(name: str, **data: object) -> bytes:
    return event({"type": name, **data}, name)

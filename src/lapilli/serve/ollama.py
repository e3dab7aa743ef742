"""`/api/...`: Ollama's API: chat, generate, and what its clients ask about models.

    {"messages" | "prompt", "images": [base64], "options": {...}} --> ChatRequest --> lines of JSON

Answers are streams unless `stream` is false. Options of the engine that Ollama starts (num_ctx,
num_gpu, keep_alive, ...) say nothing to this server, whose model is loaded already.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from lapilli import __version__
from lapilli.config.generation import SamplingParams
from lapilli.config.grammar import Grammar
from lapilli.serve.answers import Answers, Finished
from lapilli.serve.calls import AnswerReader, Call, CallEnd, Text
from lapilli.serve.chat import MessageBody as ChatMessage
from lapilli.serve.chat import turns_of
from lapilli.serve.errors import invalid
from lapilli.serve.media import NamedPart, Part
from lapilli.serve.sampling import check_stops, updated
from lapilli.serve.service import ChatRequest, Service, Turn
from lapilli.serve.stream import line, respond
from lapilli.serve.structured import kind_grammar
from lapilli.serve.tools import ToolUse, tool_use, tools_of, with_instructions

NAMES: Mapping[str, str] = {"repeat_penalty": "repetition_penalty", "num_predict": "max_new_tokens"}
"""Options that have another name here."""
OFF: Mapping[str, float] = {"mirostat": 0, "tfs_z": 1, "typical_p": 1}
"""Ways to sample that this server does not have, and the value that switches them off."""


class OptionsBody(BaseModel):
    """Options of sampling, as Ollama names them."""

    model_config = ConfigDict(extra="ignore")

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    num_predict: int | None = None
    mirostat: float | None = None
    tfs_z: float | None = None
    typical_p: float | None = None

    def given(self) -> dict[str, object]:
        """Return those that are given, under the engine's names.

        Raises:
            ApiError: a way to sample that this server does not have, or too many stop strings.
        """
        found = self.model_dump(exclude_none=True)
        for name, value in OFF.items():
            if found.pop(name, value) != value:
                where = f"options.{name}"
                raise invalid(f"{where} is not supported: leave it out", where)
        check_stops(self.stop, "options.stop")
        if self.top_k == 0:  # all tokens
            del found["top_k"]
        if self.seed is not None:
            found["seed"] = self.seed % (1 << 63)
        if self.num_predict is not None and self.num_predict < 0:  # as long as it takes
            found["num_predict"] = 1 << 30
        return {NAMES.get(name, name): value for name, value in found.items()}


class MessageBody(BaseModel):
    """One message; its pictures stand before its text."""

    model_config = ConfigDict(extra="ignore")

    role: str
    content: str = ""
    images: list[str] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class OllamaBody(BaseModel):
    """What chat and generate share."""

    model_config = ConfigDict(extra="ignore")

    model: str
    stream: bool = True
    format: str | dict[str, Any] | None = None
    options: OptionsBody | None = None

    def params(self, base: SamplingParams) -> SamplingParams:
        """Return the sampling options over those of the server.

        Raises:
            ApiError: a way to sample that this server does not have, a value out of its bounds, or
                a form of an unknown kind.
        """
        found = {} if self.options is None else self.options.given()
        names = {name: f"options.{name}" for name in found}
        names |= {ours: f"options.{theirs}" for theirs, ours in NAMES.items()}
        return updated(base, found | {"grammar": self.form()}, names)

    def form(self) -> Grammar | None:
        """Return the form that the answer must have: "json", or a schema.

        Raises:
            ApiError: another word, or a schema that cannot be used.
        """
        if not self.format:
            return None
        if self.format == "json":
            return Grammar.json_object()
        if isinstance(self.format, str):
            message = f"format is {self.format!r}: expected json or a JSON schema"
            raise invalid(message, "format")
        return kind_grammar("json", self.format, "format")


class ChatBody(OllamaBody):
    """The body of `/api/chat`."""

    messages: list[MessageBody] = []
    tools: list[dict[str, Any]] | None = None


class GenerateBody(OllamaBody):
    """The body of `/api/generate`."""

    prompt: str = ""
    system: str | None = None
    images: list[str] | None = None
    raw: bool = False
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None


class ShowBody(BaseModel):
    """A model that is asked about."""

    model: str | None = None
    name: str | None = None


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()
    _add_answers(routes, service)
    _add_models(routes, service)
    return routes


def _add_answers(routes: APIRouter, service: Service) -> None:
    """Add the routes that answer."""

    async def answer(
        http: Request, body: OllamaBody, turns: tuple[Turn, ...], use: ToolUse, prompt: str | None
    ) -> Response:
        request = ChatRequest(
            turns=with_instructions(turns, use),
            prompt=prompt,
            params=use.params(body.params(service.options.sampling)),
            owner=http.state.owner,
        )
        writer = Writer(service, use, is_chat=isinstance(body, ChatBody))
        return await respond(
            http, service, request, writer, is_stream=body.stream, dialect="ollama"
        )

    @routes.post("/api/chat", response_model=None)
    async def chat(body: ChatBody, http: Request) -> Response:
        """Answer a conversation; one without messages asks whether the model is there."""
        service.check_model(body.model)
        if not body.messages:
            return JSONResponse(Writer(service, ToolUse(), is_chat=True).loaded())
        use = tool_use(tools_of(body.tools))
        return await answer(http, body, chat_turns(body.messages), use, None)

    @routes.post("/api/generate", response_model=None)
    async def generate(body: GenerateBody, http: Request) -> Response:
        """Answer a prompt; an empty one asks whether the model is there."""
        service.check_model(body.model)
        if body.suffix or body.template or body.context:
            raise invalid("suffix, template and context are not supported: leave them out")
        if not body.prompt and not body.images:
            return JSONResponse(Writer(service, ToolUse(), is_chat=False).loaded())
        if not body.raw:
            turns = [Turn(role="system", parts=(body.system,))] if body.system else []
            asked = Turn(role="user", parts=(*pictures_of(body.images), body.prompt))
            return await answer(http, body, (*turns, asked), ToolUse(), None)
        if body.images:
            raise invalid("raw has no place for images: leave raw out", "images")
        return await answer(http, body, (), ToolUse(), body.prompt)


def _add_models(routes: APIRouter, service: Service) -> None:
    """Add the routes that tell of the model."""

    @routes.head("/")
    async def alive() -> Response:
        """Say that the server answers."""
        return Response()

    @routes.get("/api/version")
    async def version() -> dict[str, str]:
        """Say which lapilli this is."""
        return {"version": __version__}

    @routes.get("/api/tags")
    async def tags() -> dict[str, object]:
        """List the one model that there is."""
        return {"models": [model_json(service)]}

    @routes.get("/api/ps")
    async def running() -> dict[str, object]:
        """List the model that is loaded."""
        known = model_json(service)
        return {"models": [known | {"size_vram": 0, "context_length": service.chat.context_length}]}

    @routes.post("/api/show")
    async def show(body: ShowBody) -> dict[str, object]:
        """Describe the model."""
        service.check_model(body.model or body.name)
        return show_json(service)


def pictures_of(images: list[str] | None) -> tuple[Part, ...]:
    """Return pictures in base64 in the form that all protocols' media have."""
    return tuple(_picture(one, f"images[{at}]") for at, one in enumerate(images or ()))


def _picture(data: str, name: str) -> NamedPart:
    return NamedPart({"type": "image_url", "image_url": data}, name, "the picture in base64")


def chat_turns(messages: list[MessageBody]) -> tuple[Turn, ...]:
    """Return messages as turns, by way of OpenAI's form.

    Raises:
        ApiError: a role that is not known.
    """
    found = []
    for at, one in enumerate(messages):
        if one.role not in ("system", "user", "assistant", "tool"):
            raise invalid(f"messages[{at}] has the role {one.role!r}", "messages")
        where = f"messages[{at}].images"
        shown = [_picture(data, f"{where}[{n}]") for n, data in enumerate(one.images or ())]
        content = [*shown, {"type": "text", "text": one.content}] if one.content or shown else None
        # As they are: a validation would make plain dicts of the pictures.
        found.append(
            ChatMessage.model_construct(role=one.role, content=content, tool_calls=one.tool_calls)
        )
    return turns_of(found)


class Writer:
    """Writer of one answer, as lines of JSON or in one piece."""

    def __init__(self, service: Service, use: ToolUse, *, is_chat: bool) -> None:
        self._model = service.model_name
        self._reader = AnswerReader(use.names)
        self._is_chat = is_chat

    async def whole(self, answers: Answers) -> dict[str, object]:
        """Return the answer in one piece; a call that was cut is left out."""
        async with answers:
            [one] = await answers.collect()
        self._reader.push(one.generation.text)
        self._reader.flush()
        calls = [call for call in self._reader.calls if call.is_whole]
        return self._line(self._reader.text, calls, self._end(answers, one))

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        """Yield the answer as lines."""
        async with answers:
            async for one in answers:
                said = self._reader.read(one)
                text = "".join(piece.text for piece in said if isinstance(piece, Text))
                ended = [piece.call for piece in said if isinstance(piece, CallEnd)]
                calls = [call for call in ended if call.is_whole]
                if text or calls:
                    yield line(self._line(text, calls))
                if isinstance(one, Finished):
                    end = self._end(answers, one)
        yield line(self._line("", [], end))

    def loaded(self) -> dict[str, object]:
        """Return the answer to nothing: the model is there."""
        return self._line("", [], {"done": True, "done_reason": "load"})

    def _line(
        self, text: str, calls: list[Call], end: Mapping[str, object] | None = None
    ) -> dict[str, object]:
        said: dict[str, object] = {"response": text}
        if self._is_chat:
            message: dict[str, object] = {"role": "assistant", "content": text}
            if calls:
                message["tool_calls"] = [
                    {"function": {"name": one.name, "arguments": json.loads(one.arguments)}}
                    for one in calls
                ]
            said = {"message": message}
        head = {"model": self._model, "created_at": _now()}
        return {**head, **said, **(end or {"done": False})}

    def _end(self, answers: Answers, one: Finished) -> dict[str, object]:
        """Return the counts, and times in nanoseconds."""
        usage, times = answers.usage, answers.timings
        first = times.first_token or times.total
        return {
            "done": True,
            "done_reason": one.reason,
            "total_duration": _ns(times.total),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt,
            "prompt_eval_duration": _ns(first),
            "eval_count": usage.completion,
            "eval_duration": _ns(times.total - first),
        }


def model_json(service: Service) -> dict[str, object]:
    """Return the model as Ollama lists it."""
    chat = service.chat
    weights = list(chat.model.parameters())
    return {
        "name": f"{service.model_name}:latest",
        "model": f"{service.model_name}:latest",
        "modified_at": _now(service.created),
        "size": sum(one.nbytes for one in weights),
        "digest": hashlib.sha256(repr(chat.config).encode()).hexdigest(),  # of what it is
        "details": _details(service),
    }


def show_json(service: Service) -> dict[str, object]:
    """Return what `/api/show` says: sizes, and what the model can do."""
    chat = service.chat
    config, family = chat.model.language_model.config, chat.config.text.family
    capabilities = ["completion", "tools"]
    if "image" in chat.model.modalities:
        capabilities.append("vision")
    return {
        "details": _details(service),
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": sum(one.numel() for one in chat.model.parameters()),
            f"{family}.context_length": chat.context_length,
            f"{family}.embedding_length": config.hidden_size,
            f"{family}.block_count": config.num_layers,
        },
        "capabilities": capabilities,
        "modified_at": _now(service.created),
    }


def _details(service: Service) -> dict[str, object]:
    chat = service.chat
    family = str(chat.config.text.family)
    millions = sum(one.numel() for one in chat.model.parameters()) / 1e6
    size = f"{millions / 1e3:.1f}B" if millions >= 1e3 else f"{millions:.1f}M"
    kind = str(next(chat.model.parameters()).dtype).removeprefix("torch.")
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": size,
        "quantization_level": kind,
    }


def _now(seconds: int | None = None) -> str:
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat().replace("+00:00", "Z")


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)

"""`/v1/decisions`: OpenAI's Decisions API, many questions about one input, with pictures.

    input       a text | messages, tool calls and their outputs   -> Messages
    questions   predicate | choice | score                        -> Predicate, Choice, Score
    Decisions   -> answers, and counts of tokens

What the shapes are is OpenAI's to say: resources/decisions.py of its Python client.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from lapilli.pipeline.questions import (
    Choice,
    Decisions,
    Level,
    Option,
    Predicate,
    Question,
    Score,
    answer_json,
)
from lapilli.prompt.message import Message
from lapilli.serve.chat import parts_of
from lapilli.serve.errors import invalid
from lapilli.serve.service import Service, Turn
from lapilli.serve.stream import unless_gone

MOST_QUESTIONS, MOST_CHOICES = 400, 255
JSON_BYTES, JSON_LEVELS, JSON_VALUES = 256 << 10, 32, 10_000

Parts = str | list[dict[str, Any]]


class PredicateBody(BaseModel):
    """How likely is it that something is true?"""

    type: Literal["predicate"]
    instructions: Parts
    name: str | None = None


class OptionBody(BaseModel):
    """What may be chosen; a text and a truth value are never the same."""

    value: StrictStr | StrictBool
    description: str = ""


class ChoiceBody(BaseModel):
    """Which of the options? `spelled` is an extension: see `pipeline.questions.Choice`."""

    type: Literal["choice"]
    instructions: Parts
    choices: list[OptionBody] = Field(min_length=2, max_length=MOST_CHOICES)
    spelled: bool = False
    name: str | None = None


class LevelBody(BaseModel):
    """A step of a scale."""

    label: str
    description: str = ""


class ScoreBody(BaseModel):
    """Where on the scale?"""

    type: Literal["score"]
    instructions: Parts
    levels: list[LevelBody] = Field(min_length=2, max_length=MOST_CHOICES)
    name: str | None = None


QuestionBody = Annotated[PredicateBody | ChoiceBody | ScoreBody, Field(discriminator="type")]


class ItemBody(BaseModel):
    """A message, a call of a tool, or what it returned."""

    model_config = ConfigDict(extra="ignore")

    type: Literal[
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
    ] = "message"
    role: Literal["user", "system", "developer", "assistant"] | None = None
    content: Parts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: Parts | None = None


class DecisionBody(BaseModel):
    """The body of `/v1/decisions`; what is said of caching and of users changes no answer."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    input: str | list[ItemBody]
    questions: list[QuestionBody] = Field(min_length=1, max_length=MOST_QUESTIONS)


def router(service: Service) -> APIRouter:
    """Return the route."""
    routes = APIRouter()
    decider = service.chat.decider(prefix_bytes=service.options.limits.prefix_bytes)

    @routes.post("/v1/decisions", response_model=None)
    async def decisions(body: DecisionBody, http: Request) -> Response:
        """Answer questions about one input with probabilities."""
        service.check_model(body.model)
        service.check_open()
        messages, questions = await service.read(asked, service, body, http.state.owner)
        found = service.compute(decider.decide, messages, questions)
        decided = await unless_gone(http, found)
        return JSONResponse(decisions_json(decided, service.model_name))

    return routes


def asked(service: Service, body: DecisionBody, owner: str) -> tuple[list[Message], list[Question]]:
    """Return the input and the questions, their pictures opened; called in a worker thread.

    Raises:
        ApiError: a part of an unknown type, an output without its call, or too many pictures.
        MediaError: a picture that cannot be opened.
        PromptError: a question that cannot be asked.
    """
    turns = turns_of(body.input)
    parts = [
        parts_of(_with_json(one.instructions), f"questions[{i}]")
        for i, one in enumerate(body.questions)
    ]
    groups = [*(turn.parts for turn in turns), *parts]
    count = sum(not isinstance(part, str) for group in groups for part in group)
    service.media.check_count(count, "input")
    messages = service.messages(turns, owner)
    questions = [
        question_of(one, service.media.opened(some, owner))
        for one, some in zip(body.questions, parts, strict=True)
    ]
    return messages, questions


def question_of(body: PredicateBody | ChoiceBody | ScoreBody, parts: Sequence[object]) -> Question:
    """Return a question as the model is asked it.

    Raises:
        PromptError: nothing in it, or options that are equal.
    """
    instructions = tuple(parts)
    if isinstance(body, PredicateBody):
        return Predicate(instructions, body.name)
    if isinstance(body, ChoiceBody):
        options = [Option(one.value, one.description) for one in body.choices]
        return Choice(instructions, options, body.name, spelled=body.spelled)
    levels = [Level(one.label, one.description) for one in body.levels]
    return Score(instructions, levels, body.name)


def turns_of(given: str | list[ItemBody]) -> tuple[Turn, ...]:
    """Return the input as turns; what a tool returned is shown to the model as the user's.

    Raises:
        ApiError: nothing in it, a part of an unknown type, or an output without its call.
    """
    if isinstance(given, str):
        return (Turn(role="user", parts=(given,)),)
    if not given:
        raise invalid("input is empty: give a text or messages", "input")
    calls: set[str | None] = set()
    found = []
    for at, item in enumerate(given):
        where = f"input[{at}]"
        if item.type == "message":
            if item.role is None or item.content is None:
                raise invalid(f"{where} needs a role and content", where)
            role = "system" if item.role == "developer" else item.role
            found.append(Turn(role=role, parts=parts_of(_with_json(item.content), where)))
        elif item.type in ("function_call", "custom_tool_call"):
            said = item.arguments if item.type == "function_call" else item.input
            if not item.call_id or not item.name or said is None:
                raise invalid(f"{where} needs call_id, name and what is called", where)
            calls.add(item.call_id)
            found.append(Turn(role="assistant", parts=(f"{item.name}({said})",)))
        else:
            if item.call_id not in calls or item.output is None:
                raise invalid(
                    f"{where} has the call_id {item.call_id!r} and "
                    f"{'no output' if item.output is None else 'no call before it'}: every output "
                    "needs the call that it answers",
                    where,
                )
            found.append(Turn(role="user", parts=parts_of(_with_json(item.output), where)))
    return tuple(found)


def _with_json(content: Parts) -> Parts:
    """Return the parts with JSON as text.

    Raises:
        ApiError: more of it than OpenAI takes.
    """
    if isinstance(content, str):
        return content
    return [
        {"type": "input_text", "text": _json_text(part.get("data"))}
        if part.get("type") == "input_json"
        else part
        for part in content
    ]


def _json_text(data: object) -> str:
    is_right = isinstance(data, dict) or (
        isinstance(data, list) and all(isinstance(one, dict) for one in data)
    )
    if not is_right:
        raise invalid("input_json needs data: an object, or a list of objects")
    levels, values = 0, 0
    waiting: list[tuple[object, int]] = [(data, 1)]
    while waiting and levels <= JSON_LEVELS and values <= JSON_VALUES:
        one, level = waiting.pop()
        values += 1
        if isinstance(one, dict | list):
            levels = max(levels, level)
            inside = one.values() if isinstance(one, dict) else one
            waiting += [(each, level + 1) for each in inside]
    if levels > JSON_LEVELS or values > JSON_VALUES:
        raise invalid(
            f"input_json has more than {JSON_LEVELS} levels or {JSON_VALUES} values: shorten it"
        )
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode("utf-8", "replace")) > JSON_BYTES:
        raise invalid(f"input_json has more than {JSON_BYTES} bytes: shorten it")
    return text


def decisions_json(found: Decisions, model: str) -> dict[str, object]:
    """Return the answers in OpenAI's form."""
    written = 0 if found.cached_tokens else found.shared_tokens
    return {
        "answers": [answer_json(one) for one in found],
        "model": model,
        "usage": {
            "input_tokens": found.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": found.cached_tokens,
                "cache_write_tokens": written,
            },
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": found.prompt_tokens,
        },
    }

r"""Tools: how a model is told of functions, and how its calls are read from its text.

    declarations --instructions--> system      {"type": "function", ...} between <tools> tags
    calls        <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>
    results      <tool_response>\n...\n</tool_response>, shown as the user's, pictures included

This is the form of Hermes, which Qwen and many others were trained with; one form for all models
and protocols. `auto` reads the text that comes; `required` and a named function force the call by a
grammar, so that its arguments always fit the function's schema.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from lapilli.config.generation import SamplingParams
from lapilli.config.grammar import Grammar
from lapilli.errors import GrammarError
from lapilli.serve.errors import ApiError
from lapilli.serve.service import Part, Turn

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
MOST_CALLS: Final = 8
"""Most calls of one answer that is forced to call."""
ONE_LINE: Final = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""How llguidance is to write JSON inside a grammar: as json.dumps does."""

_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: of letters, digits, dots, dashes and underscores.
        description: for the model.
        parameters: JSON schema of its arguments, an object.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The functions of a request, and whether one must be called.

    Attributes:
        tools: all of them.
        choice: none, auto or required.
        named: the only one that may be called; `choice` is then required.
        is_parallel: several calls in one answer.
    """

    tools: tuple[Tool, ...] = ()
    choice: Choice = "auto"
    named: str | None = None
    is_parallel: bool = True

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The functions that this answer may call."""
        if self.choice == "none":
            return ()
        return tuple(one for one in self.tools if self.named in (None, one.name))

    @property
    def names(self) -> frozenset[str]:
        """Names of `callable`."""
        return frozenset(one.name for one in self.callable)

    def instructions(self) -> str:
        """Return what the model is told; "" where it may call nothing."""
        if not self.callable:
            return ""
        declared = "\n".join(
            json.dumps(
                {
                    "type": "function",
                    "function": {
                        "name": one.name,
                        "description": one.description,
                        "parameters": one.parameters,
                    },
                },
                ensure_ascii=False,
            )
            for one in self.callable
        )
        return (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n"
            f"<tools>\n{declared}\n</tools>\n\n"
            "For each function call, return a json object with function name and arguments within "
            f"{OPEN}{CLOSE} XML tags:\n"
            f'{OPEN}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{CLOSE}'
        )

    def params(self, params: SamplingParams) -> SamplingParams:
        """Return sampling options that hold the answer to this choice.

        With `auto`, an answer that must have a form is either of that form or calls functions; a
        call that is required leaves no room for another answer.

        Raises:
            ApiError: a form that cannot stand beside calls, or a schema that cannot be used.
        """
        if not self.callable:
            return params
        if self.choice == "required":
            return params.updated(grammar=_grammar(self, None))
        if params.grammar is not None:
            return params.updated(grammar=_grammar(self, params.grammar))
        if not self.is_parallel:
            return params.updated(stop=(*params.stop, CLOSE))
        return params


def with_instructions(turns: Sequence[Turn], use: ToolUse) -> tuple[Turn, ...]:
    """Return a conversation whose instructions declare the tools."""
    text = use.instructions()
    return (*turns, Turn(role="system", parts=(text,))) if text else tuple(turns)


def tool_use(
    tools: Sequence[Tool],
    choice: Choice = "auto",
    named: str | None = None,
    *,
    is_parallel: bool | None = None,
) -> ToolUse:
    """Return the tools of a request.

    Raises:
        ApiError: two of one name, a name or a schema that cannot be used, or one chosen that is
            not there.
    """
    for at, one in enumerate(tools):
        where = f"tools[{at}]"
        if not re.fullmatch(r"[\w.-]{1,128}", one.name):
            raise ApiError(400, f"{where}: {one.name!r:.150} is no name of a function", param=where)
        if any(one.name == other.name for other in tools[:at]):
            raise ApiError(400, f"{where}: {one.name!r} is declared twice", param=where)
        try:
            Grammar.json_schema(one.parameters)
        except GrammarError as error:
            raise ApiError(400, f"{where}, {one.name}: {error}", param=where) from error
    known = ", ".join(one.name for one in tools)
    if named is not None and named not in (one.name for one in tools):
        raise ApiError(
            400,
            f"tool_choice names {named!r}: the tools are {known or 'none'}",
            param="tool_choice",
        )
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice is required and there are no tools", param="tool_choice")
    return ToolUse(
        tools=tuple(tools), choice=choice, named=named, is_parallel=is_parallel is not False
    )


def function_tool(given: Mapping[str, Any], where: str, schema: str = "parameters") -> Tool:
    """Return a declaration {"name", "description", "parameters"} as a tool.

    Args:
        given: the declaration.
        where: its place in the request, for errors.
        schema: the key of the schema.

    Raises:
        ApiError: no name, or a schema that is no object.
    """
    name, text = given.get("name"), given.get("description") or ""
    parameters = given.get(schema) or {"type": "object", "properties": {}}
    if not isinstance(name, str) or not isinstance(text, str) or not isinstance(parameters, dict):
        raise ApiError(
            400, f"{where} must have a name, a description in text and a schema", param=where
        )
    return Tool(name=name, description=text, parameters=parameters)


def tools_of(given: Sequence[Mapping[str, Any]] | None) -> list[Tool]:
    """Return declarations {"type": "function", "function": {...}} of OpenAI's chat and Ollama.

    Raises:
        ApiError: another type.
    """
    found = []
    for at, one in enumerate(given or ()):
        where, function = f"tools[{at}]", one.get("function")
        if one.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise ApiError(
                400,
                f"{where} has the type {one.get('type')!r}: this server calls functions only, "
                '{"type": "function", "function": {...}}',
                param=where,
            )
        found.append(function_tool(function, where))
    return found


def choice_of(given: object) -> tuple[Choice, str | None]:
    """Return `tool_choice` of OpenAI's protocols: a word, or the function that is named.

    Raises:
        ApiError: something else.
    """
    if given is None:
        return "auto", None
    for word in ("none", "auto", "required"):
        if given == word:
            return word, None
    if isinstance(given, Mapping) and given.get("type") == "function":
        function = given.get("function")
        name = function.get("name") if isinstance(function, Mapping) else given.get("name")
        if isinstance(name, str):
            return "required", name
    raise ApiError(
        400,
        f"tool_choice {given!r:.100} is not known: none, auto, required, or a function by its name",
        param="tool_choice",
    )


def call_text(name: str, arguments: object) -> str:
    """Return an earlier call as the model wrote it; arguments may be JSON text already."""
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments if arguments is not None else {}, ensure_ascii=False)
    said = json.dumps(name, ensure_ascii=False)
    return f'{OPEN}\n{{"name": {said}, "arguments": {arguments or "{}"}}}\n{CLOSE}'


def calls_text(calls: Sequence[Mapping[str, Any]] | None, where: str) -> tuple[str, ...]:
    """Return the `tool_calls` of an earlier answer as the model wrote them.

    Raises:
        ApiError: one without a function.
    """
    found = []
    for at, one in enumerate(calls or ()):
        function = one.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            place = f"{where}.tool_calls[{at}]"
            raise ApiError(400, f"{place} has no function with a name", param=place)
        found.append(call_text(function["name"], function.get("arguments")))
    return ("\n".join(found),) if found else ()


def response_parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return what a tool returned, as the model is shown it; pictures stay pictures."""
    return ("<tool_response>\n", *parts, "\n</tool_response>")


def _grammar(use: ToolUse, other: Grammar | None) -> Grammar:
    """Return the grammar of one call or several; with `other`, of an answer of that form too."""
    rules = ["start: calls | other" if other is not None else "start: calls"]
    more = f' ("\\n" call){{0,{MOST_CALLS - 1}}}' if use.is_parallel and use.named is None else ""
    rules.append(f"calls: call{more}")
    rules.append("call: " + " | ".join(f"call_{at}" for at in range(len(use.callable))))
    for at, one in enumerate(use.callable):
        begins = json.dumps(f'{OPEN}\n{{"name": {json.dumps(one.name)}, "arguments": ')
        ends = json.dumps(f"}}\n{CLOSE}")
        rules.append(f"call_{at}: {begins} arguments_{at} {ends}")
        rules.append(f"arguments_{at}: {_json(_arguments(one))}")
    if other is not None:
        rules.append(f"other: {_rule(other)}")
    return Grammar.lark("\n".join(rules))


def _arguments(tool: Tool) -> dict[str, Any]:
    """Return the schema of arguments: those declared, and no others unless it allows them."""
    schema = {"type": "object", **tool.parameters}
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": ONE_LINE}, ensure_ascii=False)


def _rule(grammar: Grammar) -> str:
    """Return a grammar as the right side of a rule of Lark.

    Raises:
        ApiError: it is a Lark grammar itself.
    """
    if grammar.kind == "json_schema":
        return _json(json.loads(grammar.text))
    if grammar.kind == "regex":
        return "/" + grammar.text.replace("/", "\\/") + "/"
    if grammar.kind == "choice":
        return " | ".join(json.dumps(one, ensure_ascii=False) for one in json.loads(grammar.text))
    raise ApiError(
        400,
        "a Lark grammar cannot stand beside tools: set tool_choice to none or required, or give a "
        "JSON schema",
        param="tools",
    )


@dataclass(slots=True)
class Call:
    """A call that the model makes; its arguments are JSON text, and grow in a stream.

    Attributes:
        number: of the call in its answer.
        name: of the function.
        id: names the call in the messages that follow.
        arguments: until now.
        is_whole: the arguments are complete.
    """

    number: int
    name: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")
    arguments: str = ""
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """More text of an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins."""

    call: Call


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments."""

    call: Call
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is over; `call.is_whole` says whether all of it came."""

    call: Call


Spoken = Text | CallStart | CallArguments | CallEnd


class AnswerReader:
    """Reader of one answer as it comes: text without white space around it, and calls.

    What looks like a call and is none (another function, broken JSON) is text: nothing that the
    model said is lost. The result does not depend on how the text is cut into pieces.

    Args:
        names: functions that may be called; none: everything is text.
    """

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        self._names = names
        self._held = ""
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._scanner = JsonScanner()
        self._white = ""
        self.text = ""
        self.calls: list[Call] = []

    def push(self, text: str) -> list[Spoken]:
        """Return what is certain now."""
        self._held += text
        found: list[Spoken] = []
        step = {
            "text": self._read_text,
            "head": self._read_head,
            "arguments": self._read_arguments,
            "tail": self._read_tail,
        }
        while step[self._state](found):
            pass
        return found

    def flush(self) -> list[Spoken]:
        """Return what was held back, at the end of the answer."""
        found: list[Spoken] = []
        held, self._held = self._held, ""
        if self._state == "head":
            self._whole_call(held, held, found)
        elif self._state == "arguments":
            found.append(CallEnd(self.calls[-1]))
        elif self._state == "text":
            self._say(held, found)
        self._state = "text"
        return found

    def _read_text(self, found: list[Spoken]) -> bool:
        """Say text until a call begins; return whether one does."""
        at = self._held.find(OPEN) if self._names else -1
        if at >= 0:
            self._say(self._held[:at], found)
            self._held = self._held[at + len(OPEN) :]
            self._state = "head"
            return True
        kept = _forming(self._held, OPEN) if self._names else 0
        cut = len(self._held) - kept
        said, self._held = self._held[:cut], self._held[cut:]
        self._say(said, found)
        return False

    def _read_head(self, found: list[Spoken]) -> bool:
        head = _HEAD.match(self._held)
        if head is not None:
            name = _name(head[1])
            if name in self._names:
                call = Call(len(self.calls), name)
                self.calls.append(call)
                found.append(CallStart(call))
                self._held = self._held[head.end() :]
                self._scanner = JsonScanner()
                self._state = "arguments"
                return True
        body, close, rest = self._held.partition(CLOSE)
        if not close:
            return False
        self._whole_call(body, body + close, found)
        self._held, self._state = rest, "text"
        return True

    def _whole_call(self, body: str, said: str, found: list[Spoken]) -> None:
        """Read a call whose keys stand in another order, or say it as text."""
        try:
            given = json.loads(body)
            name, arguments = given["name"], given.get("arguments", given.get("parameters"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            name, arguments = None, None
        if name not in self._names or not isinstance(arguments, dict):
            self._say(OPEN + said, found)
            return
        call = Call(len(self.calls), name)
        call.arguments = json.dumps(arguments, ensure_ascii=False)
        call.is_whole = True
        self.calls.append(call)
        found += [CallStart(call), CallArguments(call, call.arguments), CallEnd(call)]

    def _read_arguments(self, found: list[Spoken]) -> bool:
        call = self.calls[-1]
        used = self._scanner.push(self._held)
        more, self._held = self._held[:used], self._held[used:]
        if more:
            call.arguments += more
            found.append(CallArguments(call, more))
        if not self._scanner.is_over:
            return False
        call.is_whole = is_object(call.arguments)
        found.append(CallEnd(call))
        self._state = "tail"
        return True

    def _read_tail(self, _: list[Spoken]) -> bool:
        """Leave out what closes a call."""
        at = self._held.find(CLOSE)
        if at < 0:
            return False
        self._held, self._state = self._held[at + len(CLOSE) :], "text"
        return True

    def _say(self, text: str, found: list[Spoken]) -> None:
        """Add text; white space counts when something follows it, and something stands before."""
        text = self._white + text if self.text else text.lstrip()
        said = text.rstrip()
        self._white = text[len(said) :]
        if said:
            self.text += said
            found.append(Text(said))


class JsonScanner:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.is_over = False

    def push(self, text: str) -> int:
        """Return how many of these characters belong to the object."""
        for at, letter in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif letter == "\\":
                    self._is_escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_over = True
                    return at + 1
        return len(text)


def is_object(text: str) -> bool:
    """Return whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _name(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _forming(text: str, mark: str) -> int:
    """Return the length of the longest end of the text that begins the mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)

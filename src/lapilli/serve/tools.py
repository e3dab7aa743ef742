"""Tools: how a model is told of functions, and how it is made to call them.

    declarations --instructions--> system      {"type": "function", ...} between <tools> tags
    tool_choice  --params--> a grammar         of calls, where one is required

This is the form of Hermes, which Qwen and many others were trained with; one form for all models
and protocols. `auto` reads the text that comes (calls.py); `required` and a named function force
the call by a grammar, so that its arguments always fit the function's schema. `allowed_tools` does
either with some of the functions: the model is told of no others.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from lapilli.config.generation import SamplingParams
from lapilli.config.grammar import Grammar
from lapilli.errors import GrammarError
from lapilli.serve.calls import CLOSE, OPEN
from lapilli.serve.errors import invalid
from lapilli.serve.service import Turn

MOST_CALLS: Final = 8
"""Most calls of one answer that is forced to call."""
MOST_NAMED: Final = 3
"""Most schemas that a message names one by one."""
ONE_LINE: Final = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""How llguidance is to write JSON inside a grammar: as json.dumps does."""

Choice = Literal["none", "auto", "required", "function"]
"""Whether the answer calls functions: never, if it likes, at least one, or one of one name."""


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
        choice: whether they are called.
        allowed: names of those that may be; None: all.
        is_parallel: several calls in one answer.
    """

    tools: tuple[Tool, ...] = ()
    choice: Choice = "auto"
    allowed: frozenset[str] | None = None
    is_parallel: bool = True

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The functions that this answer may call."""
        if self.choice == "none":
            return ()
        return tuple(one for one in self.tools if self.allowed is None or one.name in self.allowed)

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
        if self.choice in ("required", "function"):
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
    allowed: Sequence[str] | None = None,
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
            raise invalid(f"{where}: {one.name!r:.150} is no name of a function", where)
        if any(one.name == other.name for other in tools[:at]):
            raise invalid(f"{where}: {one.name!r} is declared twice", where)
        try:
            _schema_of(one)
        except GrammarError as error:
            raise invalid(f"{where}, {one.name}: {error}", where) from error
    known = [one.name for one in tools]
    for name in allowed or ():
        if name not in known:
            raise invalid(
                f"tool_choice names {name!r}: the tools are {', '.join(known) or 'none'}",
                "tool_choice",
            )
    if choice == "required" and not tools:
        raise invalid("tool_choice is required and there are no tools", "tool_choice")
    return ToolUse(
        tools=tuple(tools),
        choice=choice,
        allowed=None if allowed is None else frozenset(allowed),
        is_parallel=is_parallel is not False,
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
        raise invalid(f"{where} must have a name, a description in text and a schema", where)
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
            raise invalid(
                f"{where} has the type {one.get('type')!r}: this server calls functions only, "
                '{"type": "function", "function": {...}}',
                where,
            )
        found.append(function_tool(function, where))
    return found


def choice_of(given: object) -> tuple[Choice, Sequence[str] | None]:
    """Return `tool_choice` of OpenAI's protocols, and which functions it allows; None: all.

    Chat has names, mode and functions inside of an object, the Responses API beside the type.

    Raises:
        ApiError: something else.
    """
    match given:
        case None:
            return "auto", None
        case "none" | "auto" | "required":
            return given, None
        case {"type": "function", "function": {"name": str(name)}} | {
            "type": "function",
            "name": str(name),
        }:
            return "function", (name,)
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": mode, "tools": [_, *_] as tools},
        } | {"type": "allowed_tools", "mode": mode, "tools": [_, *_] as tools} if mode in (
            "auto",
            "required",
        ):
            chosen = [choice_of(one) for one in tools]
            if all(choice == "function" for choice, _ in chosen):
                return mode, [name for _, names in chosen for name in names or ()]
    raise invalid(
        f"tool_choice {given!r:.100} is not known: none, auto, required, a function by its name, "
        "or allowed_tools with a mode, auto or required, and functions by their names",
        "tool_choice",
    )


def _grammar(use: ToolUse, other: Grammar | None) -> Grammar:
    """Return the grammar of one call or several; with `other`, of an answer of that form too."""
    rules = ["start: calls | other" if other is not None else "start: calls"]
    more = (
        f' ("\\n" call){{0,{MOST_CALLS - 1}}}'
        if use.is_parallel and use.choice != "function"
        else ""
    )
    rules.append(f"calls: call{more}")
    rules.append("call: " + " | ".join(f"call_{at}" for at in range(len(use.callable))))
    for at, one in enumerate(use.callable):
        begins = json.dumps(f'{OPEN}\n{{"name": {json.dumps(one.name)}, "arguments": ')
        ends = json.dumps(f"}}\n{CLOSE}")
        rules.append(f"call_{at}: {begins} arguments_{at} {ends}")
        rules.append(f"arguments_{at}: {_json(_arguments(one))}")
    parts = [_schema_of(one) for one in use.callable]
    if other is not None:
        rules.append(f"other: {_rule(other)}")
        parts.append(other)
    names = " and ".join(part.name for part in parts[:MOST_NAMED])
    label = names if len(parts) <= MOST_NAMED else "one of the schemas of the tools"
    return Grammar("lark", "\n".join(rules), label, tuple(parts))


def _schema_of(tool: Tool) -> Grammar:
    """Return the form of a tool's arguments, under a name that its author knows."""
    return Grammar.json_schema(_arguments(tool), f"the schema of the tool {tool.name!r}")


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
    raise invalid(
        "a Lark grammar cannot stand beside tools: set tool_choice to none or required, or give a "
        "JSON schema",
        "tools",
    )

r"""Calls of tools in text: how they are read as an answer comes, and written for the next one.

calls        <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>
results      <tool_response>\n...\n</tool_response>, shown as the user's, pictures included
AnswerReader text in pieces -> Text, CallStart, CallArguments, CallEnd
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from lapilli.serve.answers import Delta, Finished, new_id
from lapilli.serve.errors import invalid
from lapilli.serve.media import Part

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"

_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
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
            raise invalid(f"{place} has no function with a name", place)
        found.append(call_text(function["name"], function.get("arguments")))
    return ("\n".join(found),) if found else ()


def response_parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return what a tool returned, as the model is shown it; pictures stay pictures."""
    return ("<tool_response>\n", *parts, "\n</tool_response>")


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
    id: str = field(default_factory=lambda: new_id("call_"))
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

    def read(self, one: Delta | Finished) -> list[Spoken]:
        """Return what is certain after an event of the answer; after its end nothing is held."""
        return self.flush() if isinstance(one, Finished) else self.push(one.text)

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

"""Validation: what is wrong with a request's body, in the words of whoever sent it.

    bytes that are no JSON     the cause, and where: of the framework's own errors
    pydantic's list of errors  one message per field: the item, what is allowed, what came

pydantic reports every branch of a union by itself, under names of types (`input.str`). Here they
are one again, and only the names that a client wrote are left.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from lapilli.config.reader import shown
from lapilli.serve.errors import ApiError, Dialect, invalid

MOST_FIELDS = 5
"""Most fields that one message tells of."""
Key = str | int
"""A step into a body: the name of a field, or the place in a list."""
_WORDS: Mapping[str, tuple[str, str]] = {
    "str": ("a text", "texts"),
    "int": ("a whole number", "whole numbers"),
    "float": ("a number", "numbers"),
    "bool": ("true or false", "truth values"),
}
"""What a type is called, one of it and many."""
_TYPES: Mapping[str, str] = {
    "string_type": "a text",
    "string_unicode": "a text of whole characters",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of at most 4300 digits",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dataclass_type": "an object",
}
"""What pydantic's kinds of errors expect."""
_SHOULD = "Input should be "


def unreadable(error: HTTPException) -> ApiError | None:
    """Return the error of a body that is no JSON; None where that is not what happened.

    The framework says "There was an error parsing the body" of whatever json raises, and keeps it
    as the cause.
    """
    cause = error.__cause__
    if error.status_code != 400 or cause is None:
        return None
    if isinstance(cause, UnicodeDecodeError):
        encoding = cause.encoding.upper()
        return invalid(f"the body is no JSON: it is no {encoding} at byte {cause.start}")
    if isinstance(cause, RecursionError):
        return invalid("the body is no JSON that is read here: it has lists or objects too deep")
    if isinstance(cause, ValueError) and "integer string conversion" in str(cause):
        return invalid("the body is no JSON that is read here: a number has too many digits")
    return None


def misfit(error: RequestValidationError, dialect: Dialect = "openai") -> ApiError:
    """Return the error of a body that a route cannot take: one message for each wrong field."""
    given = _reports(error)
    for one in given:
        if one.kind == "json_invalid":
            reason = _lower(str(one.context.get("error", "it cannot be read"))).removesuffix(" at")
            return invalid(f"the body is no JSON: {reason} at character {one.steps[-1]}")
    faults: dict[Key | None, _Fault] = {}
    for name in dict.fromkeys(one.first for one in given):
        faults[name] = _fault([one for one in given if one.first == name], error.body)
    if not faults:
        return invalid("the body is not what this route takes")
    names = [_path(fault.path, dialect) for fault in faults.values()]
    said = [fault.message(name) for name, fault in zip(names, faults.values(), strict=True)]
    more = len(said) - MOST_FIELDS
    rest = f"; and {more} more fields" if more > 0 else ""
    return invalid("; ".join(said[:MOST_FIELDS]) + rest, names[0] or None)


def _reports(error: RequestValidationError) -> list["_Report"]:
    """Return pydantic's errors, of equal ones in a list the first: a list may have millions."""
    found: dict[tuple[Key, ...], _Report] = {}
    for one in error.errors():
        shape = tuple(step for step in one.get("loc", ()) if not isinstance(step, int))
        if shape not in found:
            found[shape] = _Report(one, error.body)
    return list(found.values())


class _Report:
    """One of pydantic's errors: where, of what kind, and what it says.

    Attributes:
        kind: pydantic's name of it.
        steps: where, names of types in unions between the client's keys.
    """

    def __init__(self, error: Mapping[str, Any], body: object) -> None:
        self.kind = str(error.get("type", ""))
        self.context: Mapping[str, object] = error.get("ctx") or {}
        self.value = error.get("input")
        self.words = str(error.get("msg", ""))
        where = tuple(error.get("loc", ()))
        self.is_of_body = where[:1] == ("body",)
        self.steps: tuple[Key, ...] = where[1:]
        self._body = body

    @property
    def first(self) -> Key | None:
        """The field of the body that is meant; None: the body itself."""
        is_field = not self.is_of_body or isinstance(self._body, Mapping)
        return self.steps[0] if self.steps and is_field else None

    @property
    def allowed(self) -> str:
        """Return what would be right, as "a text"; "" where the error is of another kind."""
        if self.kind == "literal_error":
            return str(self.context.get("expected", ""))
        if "UploadFile" in self.words:
            return "a file with a name"
        if self.words.startswith(_SHOULD) and self.kind not in _TYPES:
            return self.words.removeprefix(_SHOULD)
        return _TYPES.get(self.kind, "")


class _Fault:
    """What is wrong at one place.

    Attributes:
        path: the client's keys.
        allowed: what would be right there, several where it is a union.
        report: one of pydantic's errors, whose words count where nothing is known to be allowed.
    """

    def __init__(self, path: tuple[Key, ...], allowed: Sequence[str], report: _Report) -> None:
        self.path = path
        self.allowed = [*dict.fromkeys(one for one in allowed if one)]
        self.report = report

    @property
    def depth(self) -> tuple[list[int], int]:
        """Return how far the reading came: a later item of a list, then a deeper one."""
        return [step if isinstance(step, int) else 0 for step in self.path], len(self.path)

    def message(self, name: str) -> str:
        """Return the message under the name of the place."""
        place = name or "the body"
        if self.report.kind == "missing":
            return f"{place} is missing" if self.path else "the body is empty: send a JSON object"
        if self.report.kind == "union_tag_invalid":
            told = self.report.context
            return f"{place}: type must be one of {told['expected_tags']}, got {told['tag']!r:.100}"
        if self.allowed:
            *others, last = self.allowed
            expected = f"{', '.join(others)} or {last}" if others else last
            return f"{place} must be {expected}, got {_got(self.report.value)}"
        return f"{place}: {_lower(self.report.words.replace(' after validation', ''))}"


def _fault(
    reports: Sequence[_Report], value: object, at: int = 0, path: tuple[Key, ...] = ()
) -> _Fault:
    """Return the one fault that several of pydantic's errors about a value mean.

    Of a union that branch is believed which was read furthest; where none was read at all, what
    each of them allows is allowed.

    Args:
        reports: whose steps are equal before `at`.
        value: what the client sent there.
        at: the step that is looked at.
        path: of the client's keys so far.
    """
    groups: dict[Key | None, list[_Report]] = {}
    for one in reports:
        groups.setdefault(one.steps[at] if at < len(one.steps) else None, []).append(one)
    branches: list[_Fault] = []
    for step, some in groups.items():
        if step is None:
            branches.append(_Fault(path, [one.allowed for one in some], some[0]))
        elif _is_key(step, value, some[0], at):
            return _fault(some, _inside(value, step), at + 1, (*path, step))
        else:
            found = _fault(some, value, at + 1, path)
            if found.path == path and found.allowed == ["a list"]:
                found.allowed = [_words(str(step))[0]]
            branches.append(found)
    deepest = max(branches, key=lambda one: one.depth)
    equal = [one for one in branches if one.path == deepest.path]
    return _Fault(deepest.path, [name for one in equal for name in one.allowed], deepest.report)


def _is_key(step: Key, value: object, report: _Report, at: int) -> bool:
    """Return whether a step is a key of the client's, and not the name of a type in a union."""
    if not report.is_of_body:
        return True
    if isinstance(step, int):
        return isinstance(value, list)
    if not isinstance(value, Mapping) or at < len(report.steps) - 1:
        return isinstance(value, Mapping) and step in value
    # The last step: a type in a union is reported with the very value that is not of it.
    return report.kind == "missing" or (step in value and report.value is not value)


def _inside(value: object, step: Key) -> object:
    if isinstance(value, Mapping):
        return value.get(step)
    is_place = isinstance(value, list) and isinstance(step, int) and step < len(value)
    return value[step] if is_place else None  # type: ignore[index]


def _words(label: str) -> tuple[str, str]:
    """Return what pydantic's name of a type means, one of it and many: `list[str]`, "texts"."""
    if label in _WORDS:
        return _WORDS[label]
    outer, _, rest = label.partition("[")
    inner = rest.removesuffix("]")
    if outer == "nullable":
        return _words(inner)
    if outer == "list":
        many = _words(inner)[1]
        return f"a list of {many}", f"lists of {many}"
    if outer == "union":
        kinds = [_words(one)[1] for one in _split(inner)]
        return "a value", " or ".join(dict.fromkeys(kinds))
    is_object = outer == "dict" or outer[:1].isupper()  # a class
    return ("an object", "objects") if is_object else ("a value", "values")


def _split(labels: str) -> list[str]:
    """Return names of types between commas; commas inside of brackets separate nothing."""
    found, depth = [""], 0
    for letter in labels:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found


def _path(steps: Sequence[Key], dialect: Dialect) -> str:
    """Return keys as a client would write them: `messages[0].content`, Anthropic's with dots."""
    text = ""
    for step in steps:
        if isinstance(step, int) and dialect != "anthropic":
            text += f"[{step}]"
        else:
            text += f".{step}" if text else str(step)
    return text


def _got(value: object) -> str:
    """Return a value as JSON names it, short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, Mapping) else shown(value)


def _lower(words: str) -> str:
    """Return a sentence as one goes on with it behind a colon."""
    return words[:1].lower() + words[1:]

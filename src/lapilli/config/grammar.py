"""Grammar: the form that an answer must have: a JSON schema, a regular expression, choices, Lark.

Holds what was asked for as text. generate/grammar.py compiles it by the library llguidance, which
is not imported here, and nor is pydantic.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from lapilli.errors import GrammarError

Kind = Literal["json_schema", "regex", "choice", "lark"]
NAMES: dict[Kind, str] = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "choice": "the choices",
    "lark": "the Lark grammar",
}
"""Names of the kinds in messages."""

# Time and memory of a compilation grow with these, faster than in proportion; see the tests.
MOST_BYTES = 1 << 18
"""Most bytes of a grammar's text."""
MOST_KEYS = 1000
"""Most keys of one object of a JSON schema."""
MOST_DEPTH = 100
"""Most objects and lists of a JSON schema inside each other."""
_OF_NAMES = frozenset(("$defs", "definitions", "properties", "patternProperties"))
"""Keys of a JSON schema that hold schemas by name."""
_OF_SCHEMAS = frozenset(
    ("additionalProperties", "allOf", "anyOf", "items", "oneOf", "prefixItems", "propertyNames")
)
"""Keys of a JSON schema that hold a schema, or a list of them."""
MOST_REFERENCES = 64
"""Most references of a JSON schema whose values are searched: the work grows with their square."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form of an answer. Make one by `as_grammar` or by the methods that are named by kinds.

    Attributes:
        kind: json_schema, regex, choice or lark.
        text: the JSON schema or a list of choices as JSON, the regular expression, or the Lark
            grammar.
        label: what messages call it; "": its kind.
        parts: grammars of its author's that it was made of: one that cannot be followed is named
            instead of the whole.

    Raises:
        GrammarError: the text is empty or longer than `MOST_BYTES`.
    """

    kind: Kind
    text: str
    label: str = ""
    parts: tuple["Grammar", ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise GrammarError(f"{self.name} must be a text, got {self.text!r:.100}")
        try:
            length = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise GrammarError(f"{self.name} holds half a character: {error}") from error
        if length > MOST_BYTES:
            raise GrammarError(
                f"{self.name} has {length} bytes, at most {MOST_BYTES} are read: make it smaller"
            )

    @property
    def name(self) -> str:
        """Name of the grammar in messages."""
        return self.label or NAMES[self.kind]

    @classmethod
    def json_schema(cls, schema: object, label: str = "") -> "Grammar":
        """Return the grammar of JSON that a schema describes.

        Args:
            schema: a mapping, its text as JSON, or a model class of pydantic, whose objects have
                the declared fields and no others, unless its config says `extra="allow"`.
            label: what messages call it.

        Raises:
            GrammarError: it is none of these, or too large or too deep.
        """
        if isinstance(schema, type) and callable(getattr(schema, "model_json_schema", None)):
            return cls._of_schema(_schema_of_class(schema), label)
        if not isinstance(schema, str):
            return cls._of_schema(schema, label)
        try:
            return cls._of_schema(json.loads(schema), label)
        except RecursionError as error:
            raise GrammarError("the JSON schema has lists or objects too deep") from error
        except ValueError as error:
            if isinstance(error, GrammarError):
                raise
            raise GrammarError(f"the JSON schema is not JSON: {error}") from error

    @classmethod
    def json_object(cls) -> "Grammar":
        """Return the grammar of any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Return the grammar of a regular expression, which the whole answer matches.

        The syntax is that of Rust's crate `regex`: no look-around, no back-references.
        """
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: object) -> "Grammar":
        """Return the grammar of an answer that is one of several texts.

        Raises:
            GrammarError: no choices, or one that is empty or no text.
        """
        texts = [] if isinstance(choices, str) or not isinstance(choices, Iterable) else [*choices]
        if not texts:
            raise GrammarError(f"choices must be a list of texts, got {choices!r:.100}")
        for text in texts:
            if not isinstance(text, str) or not text:
                raise GrammarError(f"a choice must be a text that is not empty, got {text!r:.100}")
        return cls("choice", json.dumps(texts, ensure_ascii=False))

    @classmethod
    def lark(cls, text: str) -> "Grammar":
        """Return the grammar of Lark rules that begin with `start:`.

        The dialect is llguidance's: strings, regular expressions in slashes, `%json {schema}`.
        """
        return cls("lark", text)

    @classmethod
    def _of_schema(cls, schema: object, label: str = "") -> "Grammar":
        if not isinstance(schema, Mapping):
            raise GrammarError(
                f"a JSON schema is an object such as {{'type': 'object'}}, got {schema!r:.100}"
            )
        _check_size(schema)
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
            return cls("json_schema", text, label)
        except (TypeError, ValueError) as error:
            if isinstance(error, GrammarError):
                raise
            raise GrammarError(f"the JSON schema cannot be written as JSON: {error}") from error


def as_grammar(schema: object) -> Grammar:
    """Return the grammar that `schema=` means.

    Args:
        schema: a Grammar; a model class of pydantic, a mapping or a JSON object as text: a JSON
            schema; a list of texts: choices; any other text: a regular expression.

    Raises:
        GrammarError: something else, or a part of it is wrong.
    """
    if isinstance(schema, Grammar):
        return schema
    if isinstance(schema, str):
        # No regular expression begins with a brace, which repeats what stands before it.
        return Grammar.json_schema(schema) if schema.lstrip()[:1] == "{" else Grammar.regex(schema)
    if isinstance(schema, list | tuple):
        return Grammar.choice(schema)
    if isinstance(schema, Mapping | type):
        return Grammar.json_schema(schema)
    raise GrammarError(
        "schema must be a JSON schema (a dict), a pydantic model class, a list of choices, a "
        f"regular expression or a Grammar, got {schema!r:.100}"
    )


def _schema_of_class(model: Any) -> object:  # noqa: ANN401  a class of a library we do not import
    """Return the schema of a pydantic class, whose objects have its fields and no others.

    Pydantic ignores keys that it does not know and leaves its schemas open, so a model would write
    keys of its own until its room is used up. `extra="allow"` is in the schema, and stays.
    """
    try:
        schema = model.model_json_schema()
    except Exception as error:  # it is pydantic's or the user's own code
        raise GrammarError(f"{model.__name__} has no JSON schema: {error}") from error
    if isinstance(schema, Mapping):
        _check_size(schema)  # before it is walked by recursion
    return _closed(schema)


def _closed(schema: object) -> object:
    """Return a schema whose objects allow no keys but those declared, unless they say so.

    Objects without `properties` are dictionaries, whose keys are what they hold.
    """
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, object] = {}
    for key, part in schema.items():
        if key in _OF_NAMES and isinstance(part, Mapping):
            found[key] = {name: _closed(inner) for name, inner in part.items()}
        elif key in _OF_SCHEMAS:
            is_list = isinstance(part, list | tuple)
            found[key] = [_closed(one) for one in part] if is_list else _closed(part)
        else:  # examples and defaults are values, whatever their keys are called
            found[key] = part
    if found.get("type") == "object" and "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


def _check_size(schema: Mapping[str, object]) -> None:
    """Check depth and keys of a JSON schema, without recursion.

    Raises:
        GrammarError: there are more than the limits.
    """
    level: list[object] = [schema]
    for _ in range(MOST_DEPTH):
        for part in level:
            if isinstance(part, Mapping) and len(part) > MOST_KEYS:
                raise GrammarError(
                    f"an object of the JSON schema has {len(part)} keys, at most {MOST_KEYS} are "
                    "read: make it smaller"
                )
        level = [inner for part in level for inner in _inside(part)]
        if not level:
            return
        if len(level) > MOST_BYTES:
            break
    raise GrammarError(
        f"the JSON schema is deeper than {MOST_DEPTH} lists or objects inside each other, or too "
        "large: make it smaller, or use $defs and $ref"
    )


def _inside(part: object) -> Iterator[object]:
    """Yield the lists and objects that stand directly in a list or an object."""
    values = part.values() if isinstance(part, Mapping) else part
    if isinstance(values, Iterable):
        yield from (one for one in values if isinstance(one, Mapping | list | tuple))


def has_finite_instance(schema: object) -> bool:
    """Return whether some value may follow a JSON schema; False only where it is certain.

    A schema whose required parts contain it again, as `{"$ref": "#"}`, has no value that ends.
    Types, `required`, `minItems`, `anyOf`, `oneOf`, `allOf` and references within the schema are
    looked at, everything else allows a value. So does a schema that is too large to be looked at.
    """
    targets = _targets(schema)
    if len(targets) > MOST_REFERENCES:
        return True
    possible: set[str] = set()
    while True:  # a reference has a value as soon as what it leads to has one
        known: dict[int, bool] = {}
        more = {
            name
            for name, part in targets.items()
            if name not in possible and _is_possible(part, targets, possible, known)
        }
        if not more:
            return _is_possible(schema, targets, possible, known)
        possible |= more


def _targets(schema: object) -> dict[str, object]:
    """Return what the references within a schema lead to, by their text."""
    found: dict[str, object] = {}
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        waiting += _inside(part)
        name = part.get("$ref") if isinstance(part, Mapping) else None
        if isinstance(name, str) and name.startswith("#") and name not in found:
            target = _at(schema, name)
            if target is not None:
                found[name] = target
    return found


def _at(schema: object, pointer: str) -> object:
    """Return the part that a reference such as `#/$defs/node` leads to; None: there is none."""
    part = schema
    for step in pointer.removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(part, Mapping):
            part = part.get(name)
        elif isinstance(part, list) and name.isdecimal() and len(name) < 9:
            part = part[int(name)] if int(name) < len(part) else None
        else:
            return None
    return part


def _is_possible(
    schema: object, targets: Mapping[str, object], possible: Set[str], known: dict[int, bool]
) -> bool:
    """Return whether a value may follow a part of a schema.

    Args:
        schema: the part.
        targets: what references lead to; others have a value.
        possible: references of these that are known to have one.
        known: parts that were looked at already, by their identity.
    """
    if not isinstance(schema, Mapping):
        return schema is not False
    if id(schema) not in known:
        parts = _needed(schema)
        name = schema.get("$ref")
        known[id(schema)] = (
            not (isinstance(name, str) and name in targets and name not in possible)
            and all(_is_possible(part, targets, possible, known) for part in parts)
            and all(
                any(_is_possible(part, targets, possible, known) for part in schema[branches])
                for branches in ("anyOf", "oneOf")
                if isinstance(schema.get(branches), list)
            )
        )
    return known[id(schema)]


def _needed(schema: Mapping[str, object]) -> list[object]:
    """Return the parts of a schema without which it has no value."""
    every, kind = schema.get("allOf"), schema.get("type")
    found = [*every] if isinstance(every, list) else []
    parts, required = schema.get("properties"), schema.get("required")
    if kind == "object" and isinstance(parts, Mapping) and isinstance(required, list):
        found += [parts[name] for name in required if isinstance(name, str) and name in parts]
    least = schema.get("minItems")
    if kind == "array" and isinstance(least, int) and least > 0 and "prefixItems" not in schema:
        found.append(schema.get("items"))
    return found

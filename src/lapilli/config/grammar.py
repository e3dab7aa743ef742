"""Grammar: the form that an answer must have: a JSON schema, a regular expression, choices, Lark.

Holds what was asked for as text. generate/grammar.py compiles it by the library llguidance, which
is not imported here, and nor is pydantic.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
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


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form of an answer. Make one by `as_grammar` or by the methods that are named by kinds.

    Attributes:
        kind: json_schema, regex, choice or lark.
        text: the JSON schema or a list of choices as JSON, the regular expression, or the Lark
            grammar.

    Raises:
        GrammarError: the text is empty or longer than `MOST_BYTES`.
    """

    kind: Kind
    text: str

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
        return NAMES[self.kind]

    @classmethod
    def json_schema(cls, schema: object) -> "Grammar":
        """Return the grammar of JSON that a schema describes.

        Args:
            schema: a mapping, its text as JSON, or a model class of pydantic.

        Raises:
            GrammarError: it is none of these, or too large or too deep.
        """
        if isinstance(schema, type) and callable(getattr(schema, "model_json_schema", None)):
            return cls._of_schema(_schema_of_class(schema))
        if not isinstance(schema, str):
            return cls._of_schema(schema)
        try:
            return cls._of_schema(json.loads(schema))
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
    def _of_schema(cls, schema: object) -> "Grammar":
        if not isinstance(schema, Mapping):
            raise GrammarError(
                f"a JSON schema is an object such as {{'type': 'object'}}, got {schema!r:.100}"
            )
        _check_size(schema)
        try:
            return cls("json_schema", json.dumps(schema, ensure_ascii=False, allow_nan=False))
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
    try:
        return model.model_json_schema()
    except Exception as error:  # it is pydantic's or the user's own code
        raise GrammarError(f"{model.__name__} has no JSON schema: {error}") from error


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

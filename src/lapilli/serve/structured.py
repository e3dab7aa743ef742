"""Structured output: the form that a request wants its answer to have, as one Grammar.

    response_format        OpenAI's: json_object, json_schema
    structured_outputs     vLLM's: json, json_object, regex, choice, grammar
    guided_json, ...       what vLLM called them before

One of them at a time. A form that nothing can follow is refused before any picture is opened.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from lapilli.config.grammar import Grammar
from lapilli.errors import GrammarError
from lapilli.serve.errors import invalid

KINDS = ("json", "json_object", "regex", "choice", "grammar")


class StructuredBody(BaseModel):
    """Fields that name the form of an answer."""

    model_config = ConfigDict(extra="ignore")

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    def grammar(self) -> Grammar | None:
        """Return the form; None where the answer is free.

        Raises:
            ApiError: two of them at once, or one that cannot be used.
        """
        found: dict[str, Grammar] = {}
        form = format_grammar(self.response_format, "response_format")
        if form is not None:
            found["response_format"] = form
        asked = self.structured_outputs or {}
        for kind in KINDS:
            pattern = asked.get("whitespace_pattern")
            form = kind_grammar(kind, asked.get(kind), f"structured_outputs.{kind}", pattern)
            if form is not None:
                found[f"structured_outputs.{kind}"] = form
            if kind == "json_object":
                continue
            name, pattern = f"guided_{kind}", self.guided_whitespace_pattern
            form = kind_grammar(kind, getattr(self, name), name, pattern)
            if form is not None:
                found[name] = form
        if len(found) > 1:
            names = " and ".join(found)
            raise invalid(f"an answer has one form, not {names}: leave one out")
        return next(iter(found.values()), None)


def format_grammar(given: object, where: str) -> Grammar | None:
    """Return the form that `response_format`, or `text.format` of the Responses API, names.

    A schema is followed exactly, whether `strict` says so or not.

    Raises:
        ApiError: another type than text, json_object or json_schema, or no schema.
    """
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or kind == "text":
        if kind is None:
            raise invalid(f"{where} must be an object with a type", where)
        return None
    if kind == "json_object":
        return Grammar.json_object()
    if kind == "json_schema":
        inner = given.get("json_schema", given)  # the Responses API has it flat
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if schema is None:
            raise invalid(f"{where} has the type json_schema and no schema", where)
        return kind_grammar("json", schema, where)
    raise invalid(
        f"{where} has the type {kind!r}: expected text, json_object or json_schema", where
    )


def kind_grammar(
    kind: str, given: object, where: str, whitespace: str | None = None
) -> Grammar | None:
    """Return the form of one kind; None where nothing is given.

    Args:
        kind: one of `KINDS`.
        given: a schema, an expression, choices, rules, or whether any JSON object is wanted.
        where: the field, for errors.
        whitespace: regular expression of what stands between the values of JSON; None: JSON in
            one line.

    Raises:
        ApiError: it cannot be used.
    """
    if given is None or given is False:
        return None
    try:
        return _of_kind(kind, given, whitespace)
    except GrammarError as error:
        raise invalid(f"{where}: {error}", where) from error


def _of_kind(kind: str, given: object, whitespace: str | None) -> Grammar:
    if kind == "json_object":
        return Grammar.json_object()
    if kind == "json":
        return _of_schema(given, whitespace)
    if kind == "choice":
        return Grammar.choice(given)
    if not isinstance(given, str):
        raise GrammarError(f"expected a text, got {given!r:.100}")
    return Grammar.regex(given) if kind == "regex" else Grammar.lark(_as_lark(given))


def _of_schema(given: object, whitespace: str | None) -> Grammar:
    if whitespace is None:
        return Grammar.json_schema(given)
    schema = json.loads(Grammar.json_schema(given).text)
    written = {
        "item_separator": ",",
        "key_separator": ":",
        "whitespace_flexible": True,
        "whitespace_pattern": whitespace,
    }
    return Grammar.json_schema({**schema, "x-guidance": written})


def _as_lark(rules: str) -> str:
    """Return rules as Lark; those of llama.cpp (GBNF, `root ::= ...`) are translated.

    Raises:
        GrammarError: they cannot be translated.
    """
    if "::=" not in rules:
        return rules
    try:
        from llguidance.gbnf_to_lark import any_to_lark

        return str(any_to_lark(rules))
    except Exception as error:  # it is a program for people's own files, and says all in this way
        raise GrammarError(f"the GBNF grammar cannot be translated to Lark: {error}") from error

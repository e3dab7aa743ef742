"""What `schema=` may be, and what is refused before any library sees it."""

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from lapilli.config.generation import Option, SamplingParams
from lapilli.config.grammar import (
    MOST_BYTES,
    MOST_DEPTH,
    MOST_KEYS,
    Grammar,
    as_grammar,
    has_finite_instance,
)
from lapilli.errors import GenerationError, GrammarError

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}}
TEXT = '{"type": "object", "properties": {"é": {"type": "integer"}}}'


class Model:
    """Like a class of pydantic."""

    @staticmethod
    def model_json_schema() -> dict:
        return SCHEMA


class Broken:
    @staticmethod
    def model_json_schema() -> dict:
        raise TypeError("no schema for a socket")


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        (SCHEMA, "json_schema", TEXT),
        (f"\n {TEXT}", "json_schema", TEXT),
        (Model, "json_schema", f'{TEXT[:-1]}, "additionalProperties": false}}'),
        (["a", "b"], "choice", '["a", "b"]'),
        (("a",), "choice", '["a"]'),
        ("[a-z]+", "regex", "[a-z]+"),
        (Grammar.lark("start: /x/"), "lark", "start: /x/"),
    ],
    ids=str,
)
def test_every_form_of_a_schema(given, kind, text):
    assert as_grammar(given) == Grammar(kind, text)
    assert SamplingParams.from_options(schema=given).grammar == Grammar(kind, text)
    assert SamplingParams().updated(grammar=given).grammar == Grammar(kind, text)


def test_a_class_of_pydantic_has_its_fields_and_no_others():
    pydantic = pytest.importorskip("pydantic")
    default = {"type": "object", "properties": {}}
    inner = pydantic.create_model("Thing", shape=(str, ...))
    free = pydantic.create_model("Free", __config__={"extra": "allow"}, size=(int, 1))
    model = pydantic.create_model(
        "Scene",
        things=(list[inner], ...),
        free=(free | None, None),
        sizes=(dict[str, int], {}),
        value=(dict, pydantic.Field(default)),
    )
    schema = json.loads(as_grammar(model).text)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Thing"]["additionalProperties"] is False
    assert schema["$defs"]["Free"]["additionalProperties"] is True
    assert schema["properties"]["sizes"]["additionalProperties"] == {"type": "integer"}
    assert schema["properties"]["value"]["default"] == default
    assert schema["properties"]["value"].get("additionalProperties", True) is True


def test_schemas_as_text_or_dict_stay_as_they_are():
    assert "additionalProperties" not in as_grammar(SCHEMA).text
    assert "additionalProperties" not in as_grammar(TEXT).text


BOTH = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
NODE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}


@pytest.mark.parametrize(
    ("schema", "is_finite"),
    [
        ({"$ref": "#"}, False),
        ({"$defs": BOTH, "$ref": "#/$defs/a"}, False),
        ({"$defs": BOTH, "allOf": [{"$ref": "#/$defs/b"}]}, False),
        (NODE, False),
        (NODE | {"required": []}, True),
        (NODE | {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}, True),
        (NODE | {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}}}, False),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, False),
        ({"type": "array", "items": {"$ref": "#"}}, True),
        ({"$ref": "#/$defs/gone"}, True),
        ({"$ref": "https://example.com/a"}, True),
        ({"not": {"$ref": "#"}}, True),
        ({"anyOf": [False]}, False),
    ],
    ids=str,
)
def test_a_schema_without_a_finite_instance_is_told(schema, is_finite):
    assert has_finite_instance(schema) is is_finite


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "schema must be a JSON schema"),
        (None.__class__, "a JSON schema is an object"),
        (Broken, "Broken has no JSON schema: no schema for a socket"),
        ("", "the regular expression must be a text"),
        ("{", "the JSON schema is not JSON"),
        ('{"a":' * 5000, "the JSON schema (is not JSON|has lists or objects too deep)"),
        ([], "choices must be a list of texts"),
        (["a", ""], "a choice must be a text that is not empty"),
        (["a", 1], "a choice must be a text"),
        ("\ud800", "half a character"),
        ("a" * (MOST_BYTES + 1), f"has {MOST_BYTES + 1} bytes, at most {MOST_BYTES}"),
        ({"minimum": float("nan")}, "cannot be written as JSON"),
        ({"enum": [object()]}, "cannot be written as JSON"),
        ({str(i): {} for i in range(MOST_KEYS + 1)}, f"{MOST_KEYS + 1} keys, at most {MOST_KEYS}"),
        (nested(MOST_DEPTH + 1), f"deeper than {MOST_DEPTH}"),
        (nested(100_000), f"deeper than {MOST_DEPTH}"),
    ],
    ids=lambda given: repr(given)[:30] if not isinstance(given, dict) else "schema",
)
def test_what_is_refused(given, message):
    with pytest.raises(GrammarError, match=message):
        as_grammar(given)
    with pytest.raises(GenerationError, match=message):
        SamplingParams.from_options(schema=given)


def test_a_schema_that_holds_itself_is_refused():
    schema: dict = {}
    schema["items"] = schema
    with pytest.raises(GrammarError, match="deeper"):
        as_grammar(schema)


def test_options_that_contradict_each_other():
    with pytest.raises(GenerationError, match="the same option"):
        SamplingParams.from_options(schema="a", grammar="b")
    with pytest.raises(GenerationError, match="num_beams 2: beams cannot follow a grammar"):
        SamplingParams.from_options(schema="a", num_beams=2)
    with pytest.raises(GenerationError, match=r"pass schema=\.\.\."):
        Option("").check("grammar", "a", Grammar)
    assert SamplingParams.from_options(schema=None).grammar is None


def test_grammars_are_values():
    grammar = as_grammar(SCHEMA)
    assert hash(grammar) == hash(as_grammar(TEXT))
    assert pickle.loads(pickle.dumps(grammar)) == grammar
    with pytest.raises(dataclasses.FrozenInstanceError):
        grammar.text = ""
    assert Grammar.json_object() == as_grammar({"type": "object"})


def test_nothing_is_imported_before_a_grammar_is_compiled():
    program = (
        "import sys; from lapilli.config.generation import SamplingParams\n"
        "SamplingParams.from_options(schema='[a-z]')\n"
        "assert not {'llguidance', 'torch', 'pydantic'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

"""Tools: declarations, choices, and calls that a grammar forces."""

import json

import pytest

from lapilli.config.generation import SamplingParams
from lapilli.config.grammar import Grammar
from lapilli.serve.calls import AnswerReader
from lapilli.serve.errors import ApiError
from lapilli.serve.tools import Tool, choice_of, tool_use, tools_of
from tests.serve.conftest import asked, data_uri, picture

COLOR = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "blue"]}},
    "required": ["color"],
}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": COLOR}}
CLEAR = {"type": "function", "function": {"name": "clear"}}
QUESTION = "What color is the circle?"


def allowed(mode, *names):
    """Return the choice among some of the tools, as chat has it."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("tools", "choice", "match"),
    [
        ([{"type": "web_search"}], "auto", "functions only"),
        ([{"type": "function", "function": {"name": "a b"}}], "auto", "no name of a function"),
        ([PAINT, PAINT], "auto", "declared twice"),
        ([PAINT], {"type": "function", "function": {"name": "fly"}}, "names 'fly'"),
        ([PAINT], "always", "not known"),
        ([PAINT], allowed("auto", "paint", "fly"), "names 'fly': the tools are paint"),
        ([PAINT], allowed("auto"), "not known"),
        ([PAINT], allowed("none", "paint"), "not known"),
        ([PAINT], {"type": "allowed_tools", "mode": "auto", "tools": ["auto"]}, "not known"),
        ([], "required", "there are no tools"),
        ([{"type": "function", "function": {"name": "a", "parameters": 3}}], "auto", "schema"),
    ],
)
def test_what_cannot_be_declared_is_refused(client, tools, choice, match):
    response = client.post(
        "/v1/chat/completions", json=asked("Hi", tools=tools, tool_choice=choice)
    )
    assert response.status_code == 400
    assert match in response.json()["error"]["message"]


def test_a_schema_that_cannot_be_followed_is_refused_before_the_picture(client):
    broken = {"type": "object", "properties": {"a": {"type": "number", "multipleOf": "x"}}}
    tool = {"type": "function", "function": {"name": "a", "parameters": broken}}
    body = asked("Hi", data_uri(b"no picture"), tools=[tool], tool_choice="required")
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "GrammarError"


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_fits_its_schema(client, named, stream):
    choice = {"type": "function", "function": {"name": "paint"}} if named else "required"
    body = asked(QUESTION, data_uri(picture()), tools=[PAINT], tool_choice=choice, max_tokens=200)
    body |= {"parallel_tool_calls": False, "stream": stream}
    response = client.post("/v1/chat/completions", json=body)
    if not stream:
        [choice] = response.json()["choices"]
        [call] = choice["message"]["tool_calls"]
        assert choice["message"]["content"] is None
        assert choice["finish_reason"] == "tool_calls"
        name, arguments = call["function"]["name"], call["function"]["arguments"]
    else:
        lines = [one[6:] for one in response.text.splitlines() if one.startswith("data: {")]
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
        pieces = [one for delta in deltas for one in delta.get("tool_calls", ())]
        name, arguments = pieces[0]["function"]["name"], ""
        for piece in pieces:
            assert piece["index"] == 0
            arguments += piece["function"]["arguments"]
        assert len(pieces) > 2
    assert name == "paint"
    assert json.loads(arguments)["color"] in ("red", "blue")


def test_forced_calls_are_as_many_as_allowed():
    tools = [*tools_of([PAINT, CLEAR])]
    several = tool_use(tools, "required").params(SamplingParams()).grammar
    one = tool_use(tools, "required", is_parallel=False).params(SamplingParams()).grammar
    assert several is not None
    assert one is not None
    assert "{0,7}" in several.text
    assert "{0,7}" not in one.text
    named = tool_use(tools, *choice_of({"type": "function", "name": "clear"}))
    assert named.names == {"clear"}
    assert "paint" not in named.instructions()


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_some_of_the_tools_are_allowed(mode):
    tools = tools_of([PAINT, CLEAR, {"type": "function", "function": {"name": "fly"}}])
    use = tool_use(tools, *choice_of(allowed(mode, "paint", "clear")))
    assert (use.choice, use.names) == (mode, {"paint", "clear"})
    assert "fly" not in use.instructions()
    grammar = use.params(SamplingParams()).grammar
    assert (grammar is None) == (mode == "auto")
    flat = [{"type": "function", "name": name} for name in ("paint", "clear")]
    assert choice_of({"type": "allowed_tools", "mode": mode, "tools": flat}) == (
        mode,
        ["paint", "clear"],
    )


def test_one_allowed_tool_may_be_called_more_than_once():
    use = tool_use(tools_of([PAINT, CLEAR]), *choice_of(allowed("required", "clear")))
    grammar = use.params(SamplingParams()).grammar
    assert grammar is not None
    assert "{0,7}" in grammar.text
    assert "paint" not in grammar.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_required_call_is_of_an_allowed_tool(client, path):
    tools = [CLEAR, PAINT]
    body = {**asked("Hi", tools=tools, tool_choice=allowed("required", "paint")), "max_tokens": 200}
    if path == "/v1/responses":
        body |= {
            "input": body.pop("messages"),
            "tools": [tool["function"] | tool for tool in tools],
        }
    answer = client.post(path, json=body | {"parallel_tool_calls": False}).json()
    if path == "/v1/responses":
        [call] = answer["output"]
    else:
        [call] = [one["function"] for one in answer["choices"][0]["message"]["tool_calls"]]
    assert call["name"] == "paint"
    assert json.loads(call["arguments"])["color"] in ("red", "blue")


def test_auto_with_one_call_ends_behind_it():
    use = tool_use([Tool(name="paint")], is_parallel=False)
    params = use.params(SamplingParams(stop=("END",)))
    assert params.stop == ("END", "</tool_call>")
    assert tool_use([Tool(name="paint")]).params(SamplingParams()).stop == ()
    reader = AnswerReader(use.names)
    reader.push('<tool_call>\n{"name": "paint", "arguments": {}}\n')
    assert reader.calls[0].is_whole


@pytest.mark.parametrize("form", [Grammar.choice(["red"]), Grammar.regex("r(e|/)d")])
def test_auto_leaves_the_choice_between_a_form_and_a_call(pebble, form):
    use = tool_use([Tool(name="paint")])
    params = use.params(SamplingParams(grammar=form))
    answer = pebble.ask(QUESTION, picture(), grammar=params.grammar)
    assert answer == "red" or answer.startswith("<tool_call>")
    with pytest.raises(ApiError, match="cannot stand beside tools"):
        use.params(SamplingParams(grammar=Grammar.lark('start: "a"')))


def test_no_tools_are_declared_where_none_may_be_called(client):
    body = asked(QUESTION, data_uri(picture()))
    plain = client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]
    none = client.post(
        "/v1/chat/completions", json={**body, "tools": [PAINT], "tool_choice": "none"}
    )
    auto = client.post("/v1/chat/completions", json={**body, "tools": [PAINT]})
    assert none.json()["usage"]["prompt_tokens"] == plain
    assert auto.json()["usage"]["prompt_tokens"] > plain + 50


def test_a_picture_in_a_message_of_a_tool_is_seen(client):
    body = asked(QUESTION, data_uri(picture("red")))
    part = {"type": "image_url", "image_url": {"url": data_uri(picture("blue"))}}
    call = {"id": "call_1", "type": "function", "function": {"name": "paint", "arguments": "{}"}}
    body["messages"] += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [part]},
    ]
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 2 * 64
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body["messages"][-1]["content"] = [broken]
    assert client.post("/v1/chat/completions", json=body).status_code == 400


def test_a_picture_in_the_instructions_is_refused(client):
    body = asked(QUESTION, data_uri(picture()))
    body["messages"].insert(0, {**body["messages"][0], "role": "system"})
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "instructions hold a picture" in response.json()["error"]["message"]


NODE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}


@pytest.mark.parametrize("tools", [["tree"], ["paint", "tree"]])
def test_a_schema_that_no_value_fits_is_named_by_its_tool(client, tools):
    schemas = {"tree": NODE, "paint": COLOR}
    declared = [
        {"type": "function", "function": {"name": name, "parameters": schemas[name]}}
        for name in tools
    ]
    body = asked("Hi", tools=declared, tool_choice="required")
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "the schema of the tool 'tree' cannot be followed" in message
    assert "contain the schema again" in message
    assert "Lark" not in message

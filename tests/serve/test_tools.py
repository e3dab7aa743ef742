"""Tools: declarations, calls in text as it comes, and calls that a grammar forces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.config.generation import SamplingParams
from lapilli.config.grammar import Grammar
from lapilli.serve.calls import AnswerReader, CallArguments, CallEnd, CallStart, Text, call_text
from lapilli.serve.errors import ApiError
from lapilli.serve.tools import Tool, choice_of, tool_use, tools_of
from tests.serve.conftest import asked, data_uri, picture

NAMES = frozenset(("paint", "clear"))
COLOR = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "blue"]}},
    "required": ["color"],
}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": COLOR}}
CLEAR = {"type": "function", "function": {"name": "clear"}}
QUESTION = "What color is the circle?"


def read(text, cuts=(), names=NAMES):
    """Return the reader of a text that comes in pieces, and what it said on the way."""
    reader, said = AnswerReader(names), []
    at = 0
    for cut in (*sorted(cuts), len(text)):
        said += reader.push(text[at:cut])
        at = cut
    return reader, said + reader.flush()


def test_a_call_and_the_text_before_it():
    reader, said = read(
        ' Look: <tool_call>\n{"name": "paint", "arguments": {"n": 1}}\n</tool_call>\n'
    )
    assert reader.text == "Look:"
    [call] = reader.calls
    assert (call.name, call.arguments, call.is_whole) == ("paint", '{"n": 1}', True)
    assert call.id.startswith("call_")
    assert [type(one) for one in said] == [Text, CallStart, CallArguments, CallEnd]


def test_several_calls_have_numbers_and_ids():
    reader, _ = read(
        "\n".join([call_text("paint", {"a": [1, {"b": "}"}]}), call_text("clear", {})])
    )
    assert [(one.number, one.name) for one in reader.calls] == [(0, "paint"), (1, "clear")]
    assert json.loads(reader.calls[0].arguments) == {"a": [1, {"b": "}"}]}
    assert len({one.id for one in reader.calls}) == 2
    assert reader.text == ""


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "fly", "arguments": {}}</tool_call>',  # nobody declared it
        "<tool_call>paint it</tool_call>",
        '<tool_call>{"name": "paint", "arguments": 3}</tool_call>',
        "<tool_call>",
        "a <tool",
    ],
)
def test_what_is_no_call_is_text(text):
    reader, _ = read(text)
    assert reader.calls == []
    assert reader.text == text


def test_keys_in_another_order():
    reader, _ = read('<tool_call>{"arguments": {"a": 1}, "name": "paint"}</tool_call> done')
    assert json.loads(reader.calls[0].arguments) == {"a": 1}
    assert reader.text == "done"


def test_a_call_that_is_cut_is_not_whole():
    reader, said = read('<tool_call>{"name": "paint", "arguments": {"a": "b')
    assert not reader.calls[0].is_whole
    assert reader.calls[0].arguments == '{"a": "b'
    assert isinstance(said[-1], CallEnd)


def test_without_tools_everything_is_text():
    text = call_text("paint", {})
    reader, _ = read(text, names=frozenset())
    assert (reader.text, reader.calls) == (text, [])


PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "\n",
        " ",
        "word",
        "<",
        '{"name": "paint", "arguments": {"a": "\\"}"}}',
        '{"name": "fly", "arguments": {}}',
        '{"parameters": {}, "name": "clear"}',
        '{"name": "paint", "arguments": {"a": [',
        "}",
        '"',
    ]
)


@given(st.lists(PIECES, max_size=12).map("".join), st.data())
def test_pieces_do_not_matter(text, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    whole, _ = read(text)
    reader, said = read(text, cuts)
    assert reader.text == whole.text
    facts = [(one.name, one.arguments, one.is_whole) for one in whole.calls]
    assert [(one.name, one.arguments, one.is_whole) for one in reader.calls] == facts
    assert "".join(one.text for one in said if isinstance(one, Text)) == reader.text
    for call in reader.calls:
        pieces = [one.text for one in said if isinstance(one, CallArguments) and one.call is call]
        assert "".join(pieces) == call.arguments


@given(st.text(max_size=40))
def test_text_without_tags_is_only_trimmed(text):
    reader, _ = read(text, range(len(text)))
    if "<tool_call>" not in text:
        assert reader.text == text.strip()


@pytest.mark.parametrize(
    ("tools", "choice", "match"),
    [
        ([{"type": "web_search"}], "auto", "functions only"),
        ([{"type": "function", "function": {"name": "a b"}}], "auto", "no name of a function"),
        ([PAINT, PAINT], "auto", "declared twice"),
        ([PAINT], {"type": "function", "function": {"name": "fly"}}, "names 'fly'"),
        ([PAINT], "always", "not known"),
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


def test_auto_with_one_call_ends_behind_it():
    use = tool_use([Tool(name="paint")], is_parallel=False)
    params = use.params(SamplingParams(stop=("END",)))
    assert params.stop == ("END", "</tool_call>")
    assert tool_use([Tool(name="paint")]).params(SamplingParams()).stop == ()
    reader, _ = read('<tool_call>\n{"name": "paint", "arguments": {}}\n')
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

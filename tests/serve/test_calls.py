"""Calls: how they are read from text that comes in pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.serve.calls import AnswerReader, CallArguments, CallEnd, CallStart, Text, call_text

NAMES = frozenset(("paint", "clear"))


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

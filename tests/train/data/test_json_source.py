"""One value and nothing lost, or a message with place, what was found and what to do."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.errors import DataError
from lapilli.train.data.json_source import decode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(VALUES, st.booleans())
def test_json_is_read_as_pythons_own_reader_does(value, is_ascii):
    assert decode(json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "replace"), "x") == (
        json.loads(json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "replace"))
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a": 1},', r"Extra data at character 9, found ','"),
        (b'{"a": 1} {"b": 2}', "Extra data at character 10, found '{\"b\": 2}'"),
        (b'{"a": ', r"Expecting value at character 7, found the end"),
        (b"{'a': 1}", r"Expecting property name .* at character 2"),
        (b'{"a": "x\ny"}', r"Invalid control character at at character 9"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', r"the key 'b' comes twice in one object"),
        (b'{"a": NaN}', r"NaN is no JSON: write null"),
        (b'{"a": [-Infinity]}', r"-Infinity is no JSON"),
        (b'{"a": "\xe9"}', r"utf-8.*position 7"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"digits"),
        (b"[" * 99_999, r"recursion"),
        (b"", r"Expecting value at character 1, found the end"),
    ],
)
def test_invalid_json_is_refused_with_its_place(data, expected):
    with pytest.raises(DataError, match=rf"^d.jsonl:7: no valid JSON: .*{expected}"):
        decode(data, "d.jsonl:7")


def test_a_byte_order_mark_is_skipped():
    assert decode('{"a": "é"}'.encode("utf-8-sig"), "x") == {"a": "é"}

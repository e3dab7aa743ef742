"""Keys of prefixes: the same picture has one, however it is named, and uploads become data."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.serve.affinity import prefix_key, with_files
from lapilli.serve.errors import UnknownMediumError
from lapilli.serve.files import Files
from lapilli.serve.front import labelled
from tests.serve.conftest import asked, data_uri


def key(body: object, owner: str = "a") -> str:
    return prefix_key(json.dumps(body).encode(), owner)


def test_one_picture_has_one_key_in_every_protocol():
    data = base64.b64encode(b"picture").decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    forms = [
        asked("What?", data_uri(b"picture")),
        asked("And where?", data_uri(b"picture", "image/jpeg"), data_uri(b"another")),
        {"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]},
        {"messages": [{"role": "user", "content": "What?", "images": [data]}]},
    ]
    assert len({key(one) for one in forms}) == 1
    assert key(asked("What?", data_uri(b"another"))) != key(forms[0])


def test_a_uuid_goes_before_the_picture_and_belongs_to_its_owner():
    def named(url):
        part = {"type": "image_url", "image_url": url, "uuid": "u"}
        return {"messages": [{"role": "user", "content": [part]}]}

    first = key(named({"url": data_uri(b"picture")}))
    assert first == key(named(None))
    assert first != key(named(None), "b")


def test_a_conversation_without_pictures_keeps_its_key():
    first = {"messages": [{"role": "system", "content": "Be brief"}]}
    longer = {"messages": [*first["messages"], {"role": "user", "content": "Hi"}]}
    assert key(first) == key(longer)
    assert key(first) != key({"messages": [{"role": "user", "content": "Hi"}]})


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("image_url"), inner),
)


@given(json_values)
def test_every_body_has_a_key(value):
    assert key(value) == key(value)
    assert with_files(json.dumps(value).encode(), Files(100), "a")


@given(st.binary())
def test_bytes_that_are_no_json_have_a_key(body):
    assert len(prefix_key(body)) == 32


def test_uploads_become_data():
    files = Files(1000)
    name = files.add("a", "x.png", "vision", b"picture").file_id
    for part in (
        {"image_url": {"url": name}},
        {"image_url": name},
        {"type": "input_image", "file_id": name},
    ):
        body = json.dumps({"messages": [{"content": [part]}]}).encode()
        found = with_files(body, files, "a")
        assert name.encode() not in found
        assert prefix_key(found) == key(asked("What?", data_uri(b"picture")))
        with pytest.raises(UnknownMediumError):
            with_files(body, files, "b")
    said = json.dumps({"messages": [{"content": "what is file-1?"}]}).encode()
    assert json.loads(with_files(said, files, "a")) == json.loads(said)


def test_labels_of_replicas():
    text = '# HELP a b\nlapilli:x{model_name="m"} 1.0\nlapilli:y 2.0\n\n'
    expected = 'lapilli:x{replica="r",model_name="m"} 1.0\nlapilli:y{replica="r"} 2.0\n'
    assert labelled(text, "r") == expected

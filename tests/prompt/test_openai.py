"""Messages in OpenAI's form: what they become, and what is refused by its place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.errors import PromptError
from lapilli.prompt.message import MediaPart, Message, TextPart
from lapilli.prompt.openai import messages_of

USER = {"role": "user", "content": "What is it?"}


def of(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_texts_and_pictures_stay_in_order():
    found = messages_of(
        of(
            {"type": "text", "text": "First "},
            {"type": "input_text", "text": "this:"},
            {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
            {"type": "text", "text": "then this:"},
            {"type": "input_image", "image_url": "b.png", "detail": "auto"},
            {"type": "image", "image": "c.png"},
        )
    )
    assert found == (
        Message(
            "user",
            (
                TextPart("First this:"),
                MediaPart("a.png"),
                TextPart("then this:"),
                MediaPart("b.png"),
                MediaPart("c.png"),
            ),
        ),
    )


def test_roles_are_those_that_templates_know():
    said = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello", "name": "ann"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]},
        {"role": "system", "content": "Be polite."},
        {"role": "user", "content": "One."},
        {"role": "user", "content": "Two?"},
    ]
    assert messages_of(said) == (
        Message.system("Be brief.\n\nBe polite."),
        Message.user("Hello"),
        Message.assistant("Hi."),
        Message.user("One.\nTwo?"),
    )


def test_a_key_of_null_is_none():
    """A table has every key in every part."""
    text = {"type": "text", "text": "Is it?", "image_url": None}
    picture = {"type": "image_url", "text": None, "image_url": {"url": "a.png", "detail": None}}
    expected = (Message("user", (TextPart("Is it?"), MediaPart("a.png"))),)
    assert messages_of(of(text, picture)) == expected


def test_a_declared_modality_is_a_part_of_its_name():
    parts = {"type": "item", "item": "i7"}, {"type": "text", "text": "Is it good?"}
    [message] = messages_of(of(*parts), ["item"])
    assert message.media == (MediaPart("i7", "item"),)
    with pytest.raises(PromptError, match=r"content\[0\] has the type 'item': expected one of"):
        messages_of(of(*parts))


TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("hello", "messages must be a list of at least one message, got 'hello'"),
        ([], "messages must be a list of at least one message"),
        (["hello"], r"messages\[0\] must be an object, got 'hello'"),
        ([USER | {"contents": "b"}], r"messages\[0\] has the unknown key 'contents': expected"),
        ([{"role": "tool", "content": "3"}], r"messages\[0\] has the role 'tool': expected one"),
        ([{"role": ["user"], "content": "3"}], r"messages\[0\] has the role \['user'\]"),
        ([USER, {"role": "user"}], r"messages\[1\]: content must be a text or a list, got None"),
        (of("a"), r"messages\[0\]\.content\[0\] must be an object with a type, got 'a'"),
        (of(TEXT, {"type": "video_url"}), r"content\[1\] has the type 'video_url': expected one"),
        (of({"type": "text", "txt": "a"}), r"content\[0\] has the unknown key 'txt': expected"),
        (of({"type": "text", "text": 7}), r"content\[0\]: text must be a text, got 7"),
        (of({"type": "image_url"}), r"content\[0\] has 0 pictures: expected one, under image_url"),
        (of({"type": "image_url", "image_url": {"uri": "a"}}), "has the unknown key 'uri'"),
        (of({"type": "image_url", "image_url": {}}), "must be a path, a URL or a data URI"),
        (of({"type": "image_url", "image_url": "a", "file_id": "b"}), "unknown key 'file_id'"),
        ([{"role": "system", "content": "a"}], "the last of the messages must be the user's"),
        ([USER, {"role": "assistant", "content": "a"}], "there is nothing to answer"),
        ([{"role": "user", "content": " "}], "the last of the messages is empty"),
        (
            [{"role": "system", "content": [{"type": "image", "image": "a"}]}, USER],
            r"messages\[0\] holds a picture: show it in a message of the user",
        ),
    ],
)
def test_another_form_is_refused_by_its_place(said, message):
    with pytest.raises(PromptError, match=message):
        messages_of(said)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user"]),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url"]), inside
        )
    ),
)


@given(JSON)
def test_whatever_json_holds_is_messages_or_an_error(said):
    try:
        found = messages_of(said)
    except PromptError:
        return
    assert found[-1].role == "user"

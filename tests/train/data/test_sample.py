import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.errors import DataError
from lapilli.prompt.message import MediaPart, Message, TextPart
from lapilli.prompt.template import TEMPLATES, to_text
from lapilli.train.data import to_sample
from lapilli.train.data.formats import signed_words
from tests.train.data.conftest import turns


def read(record, **options):
    return to_sample(record, where="d.json:4", **options)


def said(sample):
    return [(message.role, message.text) for message in sample.messages]


LLAVA = {"id": 7, "image": "a.png", "conversations": turns("<image>\nQ", "A", "R", "B")}
SHAREGPT = {
    "id": "7",
    "images": ["a.png"],
    "conversations": [
        {"from": "user", "value": "<image>Q"},
        {"from": "assistant", "value": "A"},
        {"from": "human", "value": "R"},
        {"from": "model", "value": "B"},
    ],
}


def openai(picture, *answers):
    """Parts of several kinds, of which `picture` is one."""
    return {
        "id": "7",
        "messages": [
            {"role": "user", "content": [picture, {"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": answers[0]},
            {"role": "user", "content": [{"type": "text", "text": "R"}]},
            {"role": "assistant", "content": answers[1]},
        ],
    }


IN_PARTS = [[{"type": "text", "text": text}] for text in "AB"]
OWN_PICTURE = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}
SAME = {
    "llava": LLAVA,
    "sharegpt": SHAREGPT,
    "openai": openai(OWN_PICTURE, *IN_PARTS),
    "openai_mixed": openai(OWN_PICTURE, "A", IN_PARTS[1]),
    "openai_named": openai({"type": "image", "image": "a.png"}, *IN_PARTS),
    "openai_listed": openai({"type": "image"}, *IN_PARTS) | {"images": ["a.png"]},
    "text": SHAREGPT | {"conversations": json.dumps(SHAREGPT["conversations"])},
    "columns": SHAREGPT
    | {
        "conversations": {
            key: [turn[key] for turn in SHAREGPT["conversations"]] for key in ("from", "value")
        }
    },
}


def same_messages(picture):
    texts = Message.assistant("A"), Message.user("R"), Message.assistant("B")
    return Message.user("Q", picture), *texts


@pytest.mark.parametrize("name", SAME)
def test_one_conversation_in_every_format(name):
    sample = read(SAME[name])
    assert (sample.id, sample.messages) == ("7", same_messages("a.png"))


def test_a_row_of_a_table_is_one_question():
    a, b = MediaPart("a"), MediaPart("b")
    row = {"image": ["a", "b"], "question": "Which?", "answer": "A"}
    expected = (Message("user", (a, b, TextPart("Which?"))), Message.assistant("A"))
    assert read(row).messages == expected
    inside = row | {"question": "<image> or <image>?"}
    parts = (a, TextPart(" or "), b, TextPart("?"))
    assert read(inside, placement="written").messages[0].parts == parts
    caption = read({"image": "a", "question": None, "caption": "A boat."})
    assert caption.messages == (Message("user", (a,)), Message.assistant("A boat."))
    assert said(read({"question": "Hello?", "answer": ""})) == [
        ("user", "Hello?"),
        ("assistant", ""),
    ]
    assert signed_words(row) == 3  # the placeholders are one of them


@pytest.mark.parametrize("key", ["image_url", "image", "url", "path"])
def test_parts_name_their_picture_in_many_ways(key):
    content = [{"type": "image", key: "a.png", "text": None}, {"type": "text", "text": "Q"}, None]
    sample = read({"messages": [{"role": "user", "content": content}]})
    assert sample.messages == (Message.user("Q", "a.png"),)


def test_pictures_stand_in_front_or_where_they_were_written():
    record = {"image": ["a", "b"], "conversations": turns("One <image>, two <image>? ", "A")}
    a, b = MediaPart("a"), MediaPart("b")
    assert read(record).messages[0].parts == (a, b, TextPart("One , two ?"))
    parts = (TextPart("One "), a, TextPart(", two "), b, TextPart("? "))
    assert read(record, placement="written").messages[0].parts == parts


def test_one_picture_that_is_named_twice_is_shown_once():
    record = {"image": "a", "conversations": turns("Two <image> of <image> it", "A")}
    sample = read(record)
    assert sample.messages[0].parts == (MediaPart("a"), TextPart("Two  of  it"))
    assert sample.notes == ("turn 0 has 2 <image> for 1 image, which is shown once",)
    with pytest.raises(DataError, match="1 images but at least 2"):
        read(record, placement="written")


def test_text_without_pictures_is_left_as_it_is():
    record = {"image": "a", "conversations": turns(" Q ", " A ", "<image> R ", "B")}
    assert [m.text for m in read(record).messages] == [" Q ", " A ", "R", "B"]


@pytest.mark.parametrize("nothing", [None, "", []])
def test_no_picture_can_be_written_in_many_ways(nothing):
    assert read({"image": nothing, "conversations": turns("Q", "A")}).media == ()


def test_systems_and_first_answers():
    first = {"conversations": [{"from": "gpt", "value": "Hello"}, *turns("Q", "A")]}
    assert said(read(first)) == [("user", "Q"), ("assistant", "A")]
    assert read(first).notes == ("the first turn is an answer, which is left out",)
    after = {"conversations": [{"from": "system", "value": "S"}, *first["conversations"]]}
    assert [role for role, _ in said(read(after))] == ["system", "user", "assistant"]
    swapped = [{"from": turn["from"], "value": "x"} for turn in turns("Q", "A", "R", "B")[1:]]
    swapped.append({"from": "human", "value": "x"})
    assert read({"conversations": swapped}).notes == (
        "the first turn is an answer, which is left out",
        "the last turn has no answer",
    )
    assert read({"conversations": turns("Q")}).notes == ()
    system = {"system": "Be brief.", "conversations": turns("Q", "A")}
    assert said(read(system))[0] == ("system", "Be brief.")
    turn = {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    }
    assert said(read(turn)) == [("system", "Be brief."), ("user", "Q")]


@pytest.mark.parametrize(("question", "answer"), [(3, 4.5), (0, 10**400), (1.0, "a")])
def test_numbers_of_a_table_are_its_text(question, answer):
    record = {"question": question, "answer": answer}
    assert said(read(record)) == [("user", str(question)), ("assistant", str(answer))]
    assert signed_words(record) == -2


@pytest.mark.parametrize(
    "record",
    [
        {"photo": "", "img": None, "conversations": turns("Q", "A")},
        {"photo": "b.png", **LLAVA},
        {"image_url": "b.png", **openai(OWN_PICTURE, *IN_PARTS)},
    ],
)
def test_other_keys_do_no_harm_beside_pictures_or_empty(record):
    assert len(read(record).messages) in (2, 4)


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_instructions_have_several_names(key):
    record = {key: "Be brief.", "conversations": turns("Q", "A")}
    assert said(read(record)) == [("system", "Be brief."), ("user", "Q"), ("assistant", "A")]
    both = record | {"system": "Be brief."}
    both["conversations"] = [{"from": "system", "value": "Be brief."}, *turns("Q", "A")]
    assert said(read(both)) == said(read(record))


def text_of(record, placement="front", template="vicuna_v1"):
    """The user's turn as the original's templates write it."""
    sample = read(record, placement=placement)
    text = to_text(TEMPLATES[template].render(sample.messages, open_turn=False))
    return text.partition("USER: ")[2].partition(" ASSISTANT:")[0]


@pytest.mark.parametrize(
    ("question", "front"),
    [
        ("<image><image>\nWhich?", None),
        ("<image> <image>Which? ", None),
        ("\n<image>\n\n<image>\nWhich?", None),
        ("<image>\n<image>\nWhich?", None),
        ("One <image>, two <image>?", "<image>\n<image>\nOne , two ?"),
    ],
)
def test_text_with_placeholders_is_kept_as_it_is(question, front):
    """Pictures that stand in front already are not laid anew; others are, where that is asked."""
    record = {"image": ["a", "b"], "conversations": turns(question, "A")}
    assert text_of(record, "written") == question
    assert text_of(record) == (question if front is None else front)


@pytest.mark.parametrize(
    ("question", "front"),
    [
        ("<image>\nQ", "<image>\nQ"),
        ("<image>Q", "<image>\nQ"),
        ("Q <image> ", "<image>\nQ"),
        ("<image>", "<image>"),
        ("\n<image>\n", "<image>"),
    ],
)
def test_one_picture_is_laid_as_the_original_does(question, front):
    """Source: LLaVA train.py, preprocess_multimodal."""
    record = {"image": "a", "conversations": turns(question, "A")}
    assert text_of(record) == front
    assert text_of(record, "written") == question


def test_a_question_of_a_table_is_laid_by_the_template():
    row = {"image": ["a", "b"], "question": "Which?", "answer": "A"}
    for placement in ("front", "written"):
        assert text_of(row, placement) == "<image>\n<image>\nWhich?"
    assert text_of(row | {"question": "<image><image>Which?"}) == "<image><image>Which?"


def test_keys_that_say_what_is_asked_are_noted():
    record = {"conversations": turns("Q", "A"), "tools": ["t"], "choices": [], "width": 3}
    assert read(record).notes == ("its 'tools' is not read",)
    user = [{"from": "human", "value": "Q", "weight": 0}, *turns("Q", "A")[1:]]
    assert read({"conversations": user}).notes == ()
    answer = {"from": "gpt", "value": "A", "weight": 1, "loss": True}
    assert read({"conversations": [*turns("Q"), answer]}).notes == ()


def test_names_of_pictures_are_resolved():
    record = {"image": "a", "conversations": turns("<image>", "A")}
    sample = read(record, resolve=lambda name: f"folder/{name}")
    assert sample.media == (MediaPart("folder/a"),)
    assert sample.id == sample.label == "d.json:4"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (["a"], "d.json:4 holds a list: expected an object"),
        (
            {},
            "no list 'conversations' or 'messages' and no text 'answer' or 'caption', found the "
            "keys none",
        ),
        ({"question": "Q"}, "found the keys 'question'"),
        ({"conversations": "Q"}, "is a text that is no JSON"),
        ({"conversations": {"from": "gpt"}}, "is a dict: expected a list of turns"),
        ({"conversations": {}}, "is a dict: expected a list of turns"),
        (
            {"conversations": {"from": ["human"], "value": []}},
            r"different lengths \('from': 1, 'value': 0\)",
        ),
        ({"question": "Q", "answer": ["A", "B"]}, "its 'answer' is a list: expected a text"),
        ({"question": True, "answer": "A"}, "its 'question' is a bool: expected a text"),
        ({"question": "Q", "answer": float("nan")}, "its 'answer' is nan: expected a text"),
        ({"question": "Q", "answer": None}, "its 'answer' is null"),
        (
            {"image_path": "a.png", "question": "Q", "answer": "A"},
            "shows no picture, and its 'image_path' is not read: call it 'image'",
        ),
        ({"image": "", "img": ["a.png"], "conversations": turns("Q", "A")}, "its 'img' is not"),
        ({"conversations": ["Q"]}, "turn 0 is a str: expected an object"),
        ({"conversations": []}, "it has no turns"),
        ({"conversations": turns("Q", "A")[1:]}, "it has no turns"),
        (
            {"conversations": [{"from": "robot", "value": "Q"}]},
            "turn 0 is from 'robot': expected human",
        ),
        ({"conversations": [{"from": ["x"], "value": "Q"}]}, r"turn 0 is from \['x'\]"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 says a int: expected a text"),
        ({"conversations": [{"from": "human"}]}, "turn 0 says a NoneType"),
        ({"conversations": turns("<image>", "A")}, "0 images but at least 1 <image>"),
        ({"image": "a", "conversations": turns("Q", "A")}, "1 images but 0 <image>"),
        (
            {"image": "a", "conversations": turns("<image>", "A", "<image>", "B")},
            "1 images but at least 2",
        ),
        ({"image": ["a", "b"], "conversations": turns("<image>", "A")}, "2 images but 1 <image>"),
        (
            {"image": "a", "conversations": [{"from": "gpt", "value": "<image>"}]},
            "the first turn is an answer with an image",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "has the type 'audio'"),
        ({"messages": [{"role": "user", "content": [3]}]}, "a part is a int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "at least 1 parts without",
        ),
        ({"conversations": turns("Q", "half \ud83d")}, "turn 1 has half of a character"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "from 'tool'"),
        (
            {"image": "a", "images": ["a", "b"], "conversations": turns("<image><image>", "A")},
            "its 'image' and its 'images' are not the same: keep one",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "turn 0 says a NoneType"),
        ({"messages": [{"role": "system", "content": "x"}]}, "it has no turns"),
        (
            {"system": ["x"], "conversations": turns("Q", "A")},
            "its system is a list: expected a text",
        ),
        (
            {"video": "v.mp4", "conversations": turns("Q", "A")},
            "has 'video', .* only images are read",
        ),
        ({"image": None, "audios": ["a.wav"], "conversations": turns("Q", "A")}, "has 'audios'"),
        (
            {"system": "a", "system_prompt": "b", "conversations": turns("Q", "A")},
            "its 'system' and its 'system_prompt' are not the same",
        ),
        (
            {
                "system_prompt": "a",
                "conversations": [{"from": "system", "value": "b"}, *turns("Q", "A")],
            },
            "its 'system_prompt' and its first turn are two systems",
        ),
        ({"system_prompt": 3, "conversations": turns("Q", "A")}, "its system_prompt is a int"),
        (
            {"image": "a", "prompt": "What?", "answer": "A"},
            "it has no 'question', and its 'prompt' is not read: call it 'question'",
        ),
        (
            {"messages": [{"role": "user", "content": "Q", "images": ["a"]}]},
            "turn 0 has a key 'images', which is not read there",
        ),
        (
            {"conversations": [*turns("Q"), {"from": "gpt", "value": "A", "weight": 0}]},
            "turn 1 has 'weight' 0, and every answer is learned",
        ),
        (
            {"conversations": [*turns("Q"), {"from": "gpt", "value": "A", "loss": False}]},
            "turn 1 has 'loss' False",
        ),
        (
            {"messages": [{"role": "assistant", "content": "A", "tool_calls": [{"id": "1"}]}]},
            "turn 0 has 'tool_calls', which is not read",
        ),
    ],
)
def test_what_is_wrong_is_said_with_place_and_id(record, expected):
    with pytest.raises(DataError, match=expected):
        read(record)
    if isinstance(record, dict):
        with pytest.raises(DataError, match=r"d.json:4 \(id 'x'\): "):
            read({"id": "x", **record})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "id",
                    "image",
                    "images",
                    "conversations",
                    "messages",
                    "from",
                    "value",
                    "role",
                    "content",
                ]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"conversations": turns("one two", "three")}, -3),
        ({"image": "a", "conversations": turns("<image>\none two", "three")}, 4),
        ({"image": "a", "conversations": turns("", "")}, 1),
        ({"conversations": turns("", "")}, -1),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]}, 1),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a b"}]}]}, -2),
        ({"conversations": [{"from": "robot", "value": "a b"}]}, -1),
        (["a b"], -1),
    ],
)
def test_the_sign_of_the_words_tells_whether_there_are_pictures(record, expected):
    assert signed_words(record) == expected


@pytest.mark.slow
@given(JSON)
def test_no_record_breaks_the_reader(record):
    assert signed_words(record) != 0
    try:
        sample = read(record)
    except DataError:
        return
    assert sample.messages
    assert (signed_words(record) > 0) is bool(
        sample.media or record.get("image") or record.get("images")
    )


NAMES = ("user", "item")
ASKED = {"user": {"film": [1]}, "item": [[1.0], [2.0]]}


def media(sample):
    return [(part.modality, part.source) for part in sample.media]


def test_a_declared_key_stands_at_its_place():
    record = {
        **ASKED,
        "image": "a.png",
        "conversations": turns("<user>\n<image>\nSaw <item>?", "A"),
    }
    sample = read(record, modalities=NAMES, placement="written")
    assert media(sample) == [
        ("user", {"film": [1]}),
        ("image", "a.png"),
        ("item", [[1.0], [2.0]]),  # one place: the whole value
    ]
    assert sample.messages[0].written == ("", "\n", "\nSaw ", "?")
    front = read(record, modalities=NAMES)
    assert media(front) == media(sample)
    assert front.messages[0].text == "Saw ?"
    resolved = read(record, modalities=NAMES, resolve=lambda name: f"at/{name}")
    assert media(resolved)[1] == ("image", "at/a.png")
    assert media(resolved)[0] == ("user", {"film": [1]})


def test_several_places_take_one_each():
    record = {"item": [[1.0], [2.0]], "conversations": turns("<item> or <item>?", "A")}
    assert media(read(record, modalities=NAMES)) == [("item", [1.0]), ("item", [2.0])]


def test_parts_name_a_modality():
    parts = [{"type": "user", "user": 3}, {"type": "item"}, {"type": "text", "text": "Q"}]
    record = {
        "item": [4.0],
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}],
    }
    assert media(read(record, modalities=NAMES)) == [("user", 3), ("item", [4.0])]


def test_a_table_shows_them_in_front():
    record = {"image": "a.png", "user": 1, "question": "Q", "answer": "A"}
    sample = read(record, modalities=NAMES)
    assert media(sample) == [("image", "a.png"), ("user", 1)]
    assert said(sample) == [("user", "Q"), ("assistant", "A")]


def test_what_is_not_declared_is_not_read():
    record = {**ASKED, "history": [1], "conversations": turns("<user>\nQ", "A")}
    sample = read(record)
    assert media(sample) == []
    assert sample.messages[0].text == "<user>\nQ"
    assert sample.notes == ("its 'history' is not read",)
    declared = {"history": [1], "audio": 2, "conversations": turns("<history> <audio>\nQ", "A")}
    assert read(declared, modalities=("history", "audio")).notes == ()


def test_a_record_with_declared_media_has_no_text_alone():
    record = {"user": 1, "conversations": turns("<user>\nQ", "A")}
    assert signed_words(record, ("user",)) > 0 > signed_words(record)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (
            {"conversations": turns("<user>\nQ", "A")},
            "<user> stands in its turns, and it has no 'user': add the key",
        ),
        (
            {"user": 1, "conversations": turns("Q", "A")},
            "its 'user' has no place: write <user> where it belongs",
        ),
        (
            {"item": [1, 2, 3], "conversations": turns("<item><item>", "A")},
            "<item> stands in its turns 2 times, and its 'item' holds 3: give a list with one",
        ),
        (
            {"item": 7, "conversations": turns("<item><item>", "A")},
            "2 times, and its 'item' holds 1",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "user"}]}]},
            "a part of the type 'user' has no 'user'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "sound", "sound": 1}]}]},
            "a part has the type 'sound': expected text, image, image_url, user or item",
        ),
    ],
)
def test_declared_media_and_places_differ(record, match):
    with pytest.raises(DataError, match=match):
        read(record, modalities=NAMES)

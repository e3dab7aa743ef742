import base64
from io import BytesIO

import pytest
from PIL import Image

from lapilli.compat.conversation import SeparatorStyle, conv_templates, default_conversation
from lapilli.errors import MediaError, PromptError


def test_a_copy_grows_on_its_own() -> None:
    template = conv_templates["llava_v1"]
    conv = template.copy()
    conv.append_message(conv.roles[0], "Hello")
    assert len(template.messages) == 0
    assert conv.sep_style is SeparatorStyle.TWO


def test_the_fields_may_be_changed() -> None:
    conv = conv_templates["vicuna_v1"].copy()
    conv.system = "Be brief."
    conv.append_message(conv.roles[0], "Hi")
    conv.append_message(conv.roles[1], None)
    assert conv.get_prompt() == "Be brief. USER: Hi ASSISTANT:"


def test_plain_has_no_second_message() -> None:
    conv = conv_templates["plain"].copy()
    conv.append_message("", "a")
    conv.append_message("", "b")
    with pytest.raises(PromptError):
        conv.get_prompt()


def test_pictures_come_back_by_mode(picture: Image.Image) -> None:
    conv = conv_templates["llava_v1"].copy()
    conv.append_message(conv.roles[0], ("<image> What?", picture, "Pad"))
    conv.append_message(conv.roles[1], "That.")
    (padded,) = conv.get_images(return_pil=True)
    assert padded.size == (60, 60)
    (encoded,) = conv.get_images()
    assert Image.open(BytesIO(base64.b64decode(encoded))).size == (60, 60)


def test_the_chat_window_sees_pairs(picture: Image.Image) -> None:
    conv = conv_templates["llava_v1"].copy()
    conv.append_message(conv.roles[0], ("<image>\nWhat?", picture, "Default"))
    conv.append_message(conv.roles[1], "That.")
    conv.append_message(conv.roles[0], "And?")
    (shown, answer), (question, open_answer) = conv.to_gradio_chatbot()
    assert shown.startswith('<img src="data:image/jpeg;base64,')
    assert shown.endswith("What?")
    assert (answer, question, open_answer) == ("That.", "And?", None)


def test_the_record_holds_text_only(picture: Image.Image) -> None:
    conv = conv_templates["llava_v1"].copy()
    conv.append_message(conv.roles[0], ("<image>\nWhat?", picture, "Default"))
    record = conv.dict()
    assert record["messages"] == [["USER", "<image>\nWhat?"]]
    assert set(record) == {"system", "roles", "messages", "offset", "sep", "sep2"}


def test_an_unknown_picture_mode_is_refused(picture: Image.Image) -> None:
    with pytest.raises(MediaError, match="unknown image mode 'Tilt'"):
        default_conversation.process_image(picture, "Tilt")

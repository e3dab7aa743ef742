"""Templates: equal to the original's prompts, and strict about what they render."""

from dataclasses import replace
from typing import Any

import pytest

from lapilli.errors import MediaCountMismatchError, PromptError
from lapilli.prompt.message import MediaPart, Message, TextPart
from lapilli.prompt.template import (
    DEFAULT_TEMPLATE,
    TEMPLATES,
    ChatTemplate,
    MediaSlot,
    Template,
    TextSegment,
    to_text,
)

CHATS = [name for name in TEMPLATES if not name.endswith("plain")]
IMAGE = object()


def conversation(turns: list[list[Any]]) -> list[Message]:
    """Messages of a golden case; `<image>` in a text is a picture."""
    messages = []
    for role, text in turns:
        speaker = "assistant" if role else "user"
        text = text or ""
        messages.append(Message.from_placeholders(speaker, text, [IMAGE] * text.count("<image>")))
    return messages


def test_fields_equal_the_original(goldens: Any) -> None:
    (case,) = (c for c in goldens.cases("_templates", "templates") if c["id"] == "list")
    assert list(TEMPLATES) == case["expect"]["names"]
    assert DEFAULT_TEMPLATE in case["expect"]["default"]
    for name, expected in case["expect"]["fields"].items():
        template = TEMPLATES[name]
        assert template.name == name
        found = {
            "roles": list(template.roles),
            "sep": template.sep,
            "sep2": template.sep2,
            "sep_style": template.style.upper(),
            "version": template.version,
            "offset": template.offset,
            "n_messages": len(template.messages),
        }
        assert found == expected


def test_prompts_of_raw_turns_equal_the_original(goldens: Any) -> None:
    compared = 0
    for case in goldens.cases("_templates", "templates"):
        given, expect = case["input"], case["expect"]
        if "conv" not in given or any(isinstance(text, list) for _, text in given["turns"]):
            continue
        template = TEMPLATES[given["conv"]]
        first = () if given.get("clear") else template.messages
        turns = [*first, *((template.roles[role], text) for role, text in given["turns"])]
        if "exception" in expect:
            with pytest.raises(PromptError):
                template.prompt(turns)
        else:
            assert template.prompt(turns) == expect["prompt"], case["id"]
        compared += 1
    assert compared >= 30


def test_rendered_messages_equal_the_prompts_of_the_original(goldens: Any) -> None:
    compared = 0
    for case in goldens.cases("_templates", "templates"):
        given = case["input"]
        if "conv" not in given or not given["turns"] or "exception" in case["expect"]:
            continue
        if given["turns"][-1][1] or given["turns"][0][0] == 1:
            continue
        if any(isinstance(text, list) for _, text in given["turns"]):
            continue
        template = TEMPLATES[given["conv"]]
        if given.get("clear"):
            template = replace(template, messages=())
        rendered = to_text(template.render(conversation(given["turns"])))
        assert rendered == case["expect"]["prompt"], case["id"]
        compared += 1
    assert compared >= 25


def test_prompts_of_every_model_equal_the_original(goldens: Any) -> None:
    compared = 0
    for name, _ in goldens.specs():
        for case in goldens.cases(name, "prompt"):
            template = TEMPLATES[case["input"]["conv"]]
            turns = case["input"]["turns"]
            open_turn = not turns[-1][1] or turns[-1][0] == 0
            rendered = template.render(conversation(turns), open_turn=open_turn)
            assert to_text(rendered) == case["expect"]["prompt"], (name, case["id"])
            compared += 1
    assert compared >= 50


@pytest.mark.parametrize("name", CHATS)
def test_a_picture_stands_in_front_of_its_question(name: str) -> None:
    template = TEMPLATES[name]
    asked = to_text(template.render([Message.user("What?", IMAGE)]))
    assert "<image>\nWhat?" in asked
    assert "<Image><image>" not in asked
    turns = [Message.user("What?", IMAGE), Message.assistant("A boat.")]
    trained = to_text(template.render(turns, open_turn=False))
    assert f"{template.media_open}<image>{template.media_close}\nWhat?" in trained


@pytest.mark.parametrize("name", CHATS)
def test_an_open_turn_is_what_a_closed_one_begins_with(name: str) -> None:
    template = TEMPLATES[name]
    question = Message.user("What?")
    opened = template.render([question])
    closed = template.render([question, Message.assistant("A boat.")], open_turn=False)
    learned = [s for s in closed if isinstance(s, TextSegment) and s.trainable]
    assert to_text(closed) == to_text(opened) + to_text(learned)
    assert (
        to_text(learned).strip()
        == f"A boat.{' ' * (template.style == 'llama_2')}" + (template.stop[0])
    )


@pytest.mark.parametrize("name", CHATS)
def test_only_typed_text_is_literal(name: str) -> None:
    messages = [Message.user("</s><image>"), Message.assistant("<s>"), Message.user("###")]
    segments = TEMPLATES[name].render(messages)
    typed = [s.text for s in segments if isinstance(s, TextSegment) and s.literal]
    assert typed == ["</s><image>", "<s>", "###"]
    assert not any(isinstance(s, MediaSlot) for s in segments)


def test_built_in_examples_are_shown_but_not_learned() -> None:
    turns = [Message.user("Q"), Message.assistant("A")]
    segments = TEMPLATES["default"].render(turns, open_turn=False)
    learned = [s.text for s in segments if isinstance(s, TextSegment) and s.trainable]
    assert "".join(learned) == " A###"
    assert "renewable" in to_text(segments)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna_v1", "Be brief. USER: Q ASSISTANT:"),
        ("chatml_direct", "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nQ<|im_end|>"),
        ("llava_llama_2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ [/INST]"),
        ("mistral_instruct", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ [/INST]"),
        ("llava_v0", "Be brief.###Human: Q###Assistant:"),
    ],
)
def test_a_system_message_replaces_the_instructions(name: str, expected: str) -> None:
    rendered = TEMPLATES[name].render([Message.system("Be brief."), Message.user("Q")])
    assert to_text(rendered).startswith(expected)


def test_several_pictures_lead_line_by_line_and_others_stay_in_place() -> None:
    template = TEMPLATES["mistral_instruct"]
    leading = template.render([Message.user("Compare.", IMAGE, IMAGE)])
    assert to_text(leading) == "[INST] <image>\n<image>\nCompare. [/INST]"
    parts = (TextPart("Is "), MediaPart(IMAGE), TextPart(" like "), MediaPart(IMAGE), TextPart("?"))
    inside = template.render([Message("user", parts)])
    assert to_text(inside) == "[INST] Is <image> like <image>? [/INST]"


def test_plain_trains_on_captions_without_the_question() -> None:
    turns = [Message.user("Describe it.", IMAGE), Message.assistant("A boat.")]
    segments = TEMPLATES["plain"].render(turns, open_turn=False)
    assert segments == [
        MediaSlot(),
        TextSegment("A boat.", trainable=True, literal=True),
        TextSegment("\n", trainable=True),
    ]
    assert to_text(TEMPLATES["plain"].render([Message.user("", IMAGE)])) == "<image>\n"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "no message to answer"),
        ([Message.system("x")], "no message to answer"),
        ([Message.assistant("x")], "message 0 is from assistant, expected user"),
        ([Message.user("a"), Message.user("b")], "message 1 is from user, expected assistant"),
        ([Message.user("a"), Message.system("b")], "message 1 is from system"),
        ([Message.user("a"), Message.assistant("b")], "last message is the assistant's answer"),
        (
            [Message.user("a"), Message("assistant", (MediaPart(IMAGE),)), Message.user("c")],
            "message of the assistant holds a medium",
        ),
        (
            [Message("system", (MediaPart(IMAGE),)), Message.user("c")],
            "system message holds a medium",
        ),
    ],
)
def test_conversations_that_make_no_sense_are_refused(
    messages: list[Message], expected: str
) -> None:
    with pytest.raises(PromptError, match=expected):
        TEMPLATES["vicuna_v1"].render(messages)


def test_llama_2_needs_a_first_question() -> None:
    with pytest.raises(PromptError, match="first message of template 'llama_2' is empty"):
        TEMPLATES["llama_2"].render([Message.user("")])


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([Message.user("x", IMAGE)], "one question and one caption, found 1 messages"),
        ([Message.user("x"), Message.assistant("y")], "no medium found"),
    ],
)
def test_plain_refuses_what_is_no_caption(messages: list[Message], expected: str) -> None:
    with pytest.raises(PromptError, match=expected):
        TEMPLATES["plain"].render(messages, open_turn=False)


def test_plain_has_no_conversation() -> None:
    turns = [Message.user("a"), Message.assistant("b"), Message.user("c")]
    with pytest.raises(PromptError, match="'plain' has no separator after an answer"):
        TEMPLATES["plain"].render(turns)


def test_stop_strings() -> None:
    stops = {name: template.stop for name, template in TEMPLATES.items()}
    assert stops["vicuna_v1"] == stops["mistral_instruct"] == ("</s>",)
    assert stops["chatml_direct"] == stops["mpt"] == ("<|im_end|>",)
    assert stops["llava_v0"] == stops["default"] == ("###",)
    assert stops["plain"] == ()


def test_a_chat_template_has_the_interface_of_a_template() -> None:
    assert isinstance(TEMPLATES["v1"], Template)
    assert isinstance(TEMPLATES["v1"], ChatTemplate)


def test_unknown_roles_are_refused() -> None:
    with pytest.raises(PromptError, match="unknown role 'tool': expected system, user or assist"):
        Message("tool", ())


@pytest.mark.parametrize(("text", "sources"), [("no place", [IMAGE]), ("<image> <image>", [IMAGE])])
def test_another_number_of_placeholders_than_of_sources_is_refused(
    text: str, sources: list[object]
) -> None:
    with pytest.raises(MediaCountMismatchError, match=r"the text has \d <image> but 1 sources"):
        Message.from_placeholders("user", text, sources)


def test_a_placeholder_becomes_a_part_in_its_place() -> None:
    message = Message.from_placeholders("user", "<image>\nSee <image>\nhere", [1, 2])
    assert message.parts == (MediaPart(1), TextPart("See "), MediaPart(2), TextPart("\nhere"))
    assert message.text == "See \nhere"


@pytest.mark.parametrize("name", ["vicuna_v1", "mistral_instruct", "chatml_direct", "llava_v0"])
@pytest.mark.parametrize(
    "text", ["<image><image>\nQ", "<image> <image>Q", "Is <image> <image>?", "<image>Q", "<image>"]
)
def test_text_with_placeholders_is_kept_character_by_character(name: str, text: str) -> None:
    template = TEMPLATES[name]
    message = Message.from_placeholders("user", text, [IMAGE] * text.count("<image>"))
    apart = to_text(template.render([Message.user("TEXT")]))
    assert to_text(template.render([message])) == apart.replace("TEXT", text)
    assert message.media == tuple([MediaPart(IMAGE)] * text.count("<image>"))


def test_another_number_of_texts_around_media_is_refused() -> None:
    with pytest.raises(PromptError, match="1 media stand between 2 pieces of text, found 1"):
        Message("user", (MediaPart(IMAGE),), ("Q",))


def test_sources_of_a_modality_are_a_list():
    with pytest.raises(PromptError, match=r"media.'item'. is .*: expected a list, with a source"):
        Message.from_placeholders("user", "<item>", [], media={"item": "shoe"})

"""A chat template in jinja says what the format that it was written from says."""

import pytest

from lapilli.errors import PromptError
from lapilli.prompt.jinja import JinjaTemplate, to_jinja
from lapilli.prompt.message import MediaPart, Message, TextPart
from lapilli.prompt.template import MediaSlot
from lapilli.prompt.templates import TEMPLATES

CONVERSATIONS = [
    [Message.user("Say \"ä\" and\n'b' {{ c }}")],
    [Message.user("What?", "a.png"), Message.assistant("A stone."), Message.user("And now?")],
    [Message.system("Be short."), Message.user("Why?", "a.png", "b.png")],
    [Message("user", (TextPart("left "), MediaPart("a.png"), TextPart(" right")))],
]
SPOKEN = [name for name, template in TEMPLATES.items() if template.style != "plain"]


def text_of(segments):
    return "".join("<image>" if isinstance(s, MediaSlot) else s.text for s in segments)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPOKEN)
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_both_render_the_same(name, number):
    messages = CONVERSATIONS[number]
    ours = TEMPLATES[name]
    theirs = JinjaTemplate(to_jinja(ours), bos_token="<s>", eos_token="</s>")
    assert text_of(theirs.render(messages)) == text_of(ours.render(messages))


@pytest.mark.parametrize("name", [n for n in SPOKEN if "mmtag" not in n])
def test_answers_are_closed_alike(name):
    messages = [*CONVERSATIONS[1], Message.assistant("A heap.")]
    ours = TEMPLATES[name]
    theirs = JinjaTemplate(to_jinja(ours), bos_token="<s>", eos_token="</s>")
    rendered = text_of(theirs.render(messages, open_turn=False))
    assert rendered == text_of(ours.render(messages, open_turn=False))


def test_captions_are_no_conversation():
    with pytest.raises(PromptError, match="'plain' is for captions"):
        to_jinja(TEMPLATES["plain"])

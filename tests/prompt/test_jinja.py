"""Chat templates in jinja: a checkpoint's own as transformers has it, ours as we render them."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from lapilli.errors import PromptError
from lapilli.prompt.jinja import JinjaTemplate, to_jinja
from lapilli.prompt.message import MediaPart, Message, TextPart
from lapilli.prompt.template import TEMPLATES, MediaSlot, Template, TextSegment, to_text

IMAGE = object()
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

PARTS = """\
{% for message in messages %}
    {% if message['role'] != 'system' %}
        {{- message['role'].upper() + ': ' }}
    {%- endif %}
    {%- for content in message['content'] | selectattr('type', 'equalto', 'image') %}
        {{- '<image>\n' }}
    {%- endfor %}
    {%- if message['role'] != 'assistant' %}
        {%- for content in message['content'] | selectattr('type', 'equalto', 'text') %}
            {{- content['text'] + ' ' }}
        {%- endfor %}
    {%- else %}
        {%- for content in message['content'] | selectattr('type', 'equalto', 'text') %}
            {%- generation %}
            {{- content['text'] + eos_token }}
            {%- endgeneration %}
        {%- endfor %}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""
STRING = """\
{%- set ns = namespace(turn=0) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '[SYS]' + (message.content | trim) + '[/SYS]' }}
        {%- continue %}
    {%- endif %}
    {%- set ns.turn = ns.turn + 1 %}
    {%- if (message.role == 'user') != (ns.turn % 2 == 1) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + (message.content | trim) + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
CONVERSATION = [
    Message.system(" Be brief. "),
    Message.user("What is this?", IMAGE),
    Message.assistant("A boat."),
    Message.user(" and that?\n"),
]

CONVERSATIONS = [
    [Message.user("Say \"ä\" and\n'b' {{ c }}")],
    [Message.user("What?", "a.png"), Message.assistant("A stone."), Message.user("And now?")],
    [Message.system("Be short."), Message.user("Why?", "a.png", "b.png")],
    [Message("user", (TextPart("left "), MediaPart("a.png"), TextPart(" right")))],
]
SPOKEN = [name for name, template in TEMPLATES.items() if template.style != "plain"]


def oracle(source: str, messages: list[Message], *, as_string: bool, open_turn: bool) -> str:
    """What transformers makes of the same messages."""
    converted = []
    for message in messages:
        parts = [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in message.parts
        ]
        content: object = parts
        if as_string:
            content = "".join(str(p.get("text", "<image>\n")) for p in parts)
        converted.append({"role": message.role, "content": content})
    (text,), _ = render_jinja_template(
        [converted], chat_template=source, add_generation_prompt=open_turn, **TOKENS
    )
    return str(text)


@pytest.mark.parametrize(("source", "as_string"), [(PARTS, False), (STRING, True)])
@pytest.mark.parametrize("open_turn", [True, False])
def test_text_equals_transformers(source: str, as_string: bool, open_turn: bool) -> None:
    template = JinjaTemplate(source, **TOKENS)
    messages = CONVERSATION if open_turn else CONVERSATION[:-1]
    expected = oracle(source, messages, as_string=as_string, open_turn=open_turn)
    assert to_text(template.render(messages, open_turn=open_turn)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("source", [PARTS, STRING])
@settings(max_examples=30, deadline=None)
@given(typed=st.text(st.sampled_from("<image> </s>[]{{}}%\n✓a0:"), max_size=12))
def test_typed_text_survives_and_never_becomes_a_picture(source: str, typed: str) -> None:
    template = JinjaTemplate(source, **TOKENS)
    segments = template.render([Message.user(f"x{typed}<image>y", IMAGE)])
    literal = [s.text for s in segments if isinstance(s, TextSegment) and s.literal]
    assert literal == [f"x{typed}<image>y"]
    assert sum(isinstance(s, MediaSlot) for s in segments) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [(PARTS, [" A boat.</s>", " Two.</s>"]), (STRING, ["A boat.<|im_end|>", "Two.<|im_end|>"])],
)
def test_answers_and_their_end_are_trainable(source: str, expected: list[str]) -> None:
    template = JinjaTemplate(source, **TOKENS)
    messages = [*CONVERSATION, Message.assistant("Two.")]
    learned = [""]
    for segment in template.render(messages, open_turn=False):
        if isinstance(segment, TextSegment) and segment.trainable:
            learned[-1] += segment.text
        elif learned[-1]:
            learned.append("")
    assert [text for text in learned if text] == expected


def test_stop_is_what_follows_an_answer() -> None:
    assert JinjaTemplate(PARTS, **TOKENS).stop == ("</s>",)
    assert JinjaTemplate(STRING, **TOKENS).stop == ("<|im_end|>",)
    bare = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert JinjaTemplate(bare).stop == ()


def test_a_picture_inside_a_text_stays_in_its_place() -> None:
    parts = (TextPart("Is "), MediaPart(IMAGE), TextPart(" old?"))
    text = to_text(JinjaTemplate(STRING, **TOKENS).render([Message("user", parts)]))
    assert "Is <image> old?" in text


WRITTEN = ("<image><image>\nWhich?", "Is <image> old?", "<image>\n<image>Q", "<image>Q", "<image>")


@pytest.mark.parametrize("source", [PARTS, STRING])
@pytest.mark.parametrize("text", WRITTEN)
def test_text_with_placeholders_is_left_as_it_is(source: str, text: str) -> None:
    """Whatever the template makes of pictures that are given apart from the text."""
    template = JinjaTemplate(source, **TOKENS)
    message = Message.from_placeholders("user", text, [IMAGE] * text.count("<image>"))
    found = to_text(template.render([message]))
    assert found == to_text(template.render([Message.user("TEXT")])).replace("TEXT", text)


def test_an_empty_answer_is_the_one_to_be_generated() -> None:
    template = JinjaTemplate(STRING, **TOKENS)
    opened = [Message.user("Q"), Message.assistant("")]
    assert template.render(opened) == template.render([Message.user("Q")])
    with pytest.raises(PromptError, match="last message is the assistant's answer"):
        template.render([Message.user("Q"), Message.assistant("A")])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}", "not a template: line 1"),
        ("{{ raise_exception('no pictures here') }}", "refuses these 1 messages.*no pictures"),
        ("{{ messages[0].content.nothing.more }}", "refuses these 1 messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these 1 messages.*unsafe"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "may not store '_x'"),
        ("{{ namespace(_x=1) }}", "may not store '_x'"),
        ("{{ messages.append(1) }}", "refuses these 1 messages"),
        ("nothing", "writes the text 'Q' 0 times"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "writes the text 'Q' 2 times"),
        ("{{ messages[0].content[-1].text }}", "wrote 0 <image> for 1 media"),
    ],
)
def test_templates_that_fail_are_refused(source: str, expected: str) -> None:
    with pytest.raises(PromptError, match=expected):
        JinjaTemplate(source).render([Message.user("Q", IMAGE)])


def test_a_template_that_rewrites_its_history_cannot_be_trained_on() -> None:
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    turns = [Message.user("a"), Message.assistant("b"), Message.user("c"), Message.assistant("d")]
    with pytest.raises(PromptError, match="writes message 1 differently when more follow"):
        JinjaTemplate(source).render(turns, open_turn=False)


def test_tojson_and_time_are_those_of_transformers() -> None:
    source = (
        "{{ {'é<': 1} | tojson }}{{ strftime_now('%Y') }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    text = to_text(JinjaTemplate(source).render([Message.user("Q")]))
    assert re.fullmatch(r'\{"é<": 1\}\d{4}Q', text)


def test_a_jinja_template_has_the_interface_of_a_template() -> None:
    assert isinstance(JinjaTemplate(STRING), Template)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPOKEN)
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_a_template_written_in_jinja_renders_the_same(name, number):
    messages = CONVERSATIONS[number]
    ours = TEMPLATES[name]
    theirs = JinjaTemplate(to_jinja(ours), bos_token="<s>", eos_token="</s>")
    assert to_text(theirs.render(messages)) == to_text(ours.render(messages))


@pytest.mark.parametrize("name", [n for n in SPOKEN if "mmtag" not in n])
def test_a_template_written_in_jinja_closes_answers_alike(name):
    messages = [*CONVERSATIONS[1], Message.assistant("A heap.")]
    ours = TEMPLATES[name]
    theirs = JinjaTemplate(to_jinja(ours), bos_token="<s>", eos_token="</s>")
    rendered = to_text(theirs.render(messages, open_turn=False))
    assert rendered == to_text(ours.render(messages, open_turn=False))


def test_captions_are_no_conversation():
    with pytest.raises(PromptError, match="'plain' is for captions"):
        to_jinja(TEMPLATES["plain"])

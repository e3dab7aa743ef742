"""Which template is taken, and the reason that people read."""

import pytest

from lapilli.errors import ConfigError, PromptError
from lapilli.prompt.choose import (
    TemplateFacts,
    check_base_template,
    choose_template,
    template_for_name,
    template_of_base,
)
from lapilli.prompt.jinja import JinjaTemplate
from lapilli.prompt.message import Message
from lapilli.prompt.template import TEMPLATES, to_text

OWN = JinjaTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
LLAMA = {"model_type": "llava_llama", "projector": "mlp2x_gelu"}


@pytest.mark.parametrize(
    ("facts", "expected", "reason"),
    [
        (LLAMA, "llava_v1", "projector mlp2x_gelu: LLaVA 1.5 and later"),
        (LLAMA | {"base": "lmsys/vicuna-7b-v1.5"}, "llava_v1", "projector mlp2x_gelu"),
        (LLAMA | {"base": "./checkpoints/Llama-2-13b-chat"}, "llava_llama_2", "was made from ./ch"),
        (LLAMA | {"has_chatml": True}, "chatml_direct", "tokens of the vocabulary"),
        (LLAMA | {"projector": "linear"}, "llava_v0", "a linear projector"),
        (LLAMA | {"recorded": "llava_llama_2"}, "llava_llama_2", "lapilli_template llava_llama_2"),
        ({"model_type": "llava_mistral"}, "mistral_instruct", "model_type llava_m"),
        (
            {"model_type": "llava_mistral", "has_chatml": True},
            "chatml_direct",
            "tokens of the vocabulary",
        ),
        ({"model_type": "llava_mpt", "has_chatml": True}, "mpt", "model_type llava_mpt"),
        (
            {"layout": "hf_llava", "model_type": "llava", "text_type": "mistral"},
            "mistral_instruct",
            "model_type mistral",
        ),
        ({"layout": "text", "model_type": "llama"}, "vicuna_v1", "original's default"),
    ],
)
def test_a_checkpoint_without_a_recorded_template(
    facts: dict[str, object], expected: str, reason: str
) -> None:
    choice = choose_template(TemplateFacts(**facts))  # type: ignore[arg-type]
    assert choice.template == TEMPLATES[expected]
    assert reason in choice.reason
    assert choice.note is None


@pytest.mark.parametrize("layout", ["hf_llava", "hf_llava_next", "text"])
def test_a_chat_template_comes_first_for_hugging_face(layout: str) -> None:
    facts = TemplateFacts(layout=layout, model_type="llava_mistral")  # type: ignore[arg-type]
    choice = choose_template(facts, chat_template=OWN)
    assert choice.template is OWN
    assert choice.reason == "the checkpoint's own chat template"


def test_an_original_checkpoint_does_not_follow_its_base_models_chat_template() -> None:
    facts = TemplateFacts(model_type="llava_mistral")
    choice = choose_template(facts, chat_template=OWN)
    assert choice.template == TEMPLATES["mistral_instruct"]


def test_a_chat_template_is_followed_in_every_layout_where_it_is_recorded() -> None:
    facts = TemplateFacts(model_type="llava_mistral", recorded="chat_template")
    choice = choose_template(facts, chat_template=OWN)
    assert choice.template is OWN
    assert choice.reason == "config.json says lapilli_template chat_template"
    with pytest.raises(PromptError, match="no chat template lies beside it: bring"):
        choose_template(facts)


def test_what_was_asked_for_wins_with_a_note() -> None:
    facts = TemplateFacts(model_type="llava_mpt")
    choice = choose_template(facts, explicit="vicuna_v1")
    assert choice.template == TEMPLATES["vicuna_v1"]
    assert choice.note == (
        "template vicuna_v1 was asked for, the checkpoint says mpt (model_type llava_mpt)"
    )
    assert choose_template(facts, explicit="mpt").note is None
    assert choose_template(facts, explicit=OWN).template is OWN
    assert choose_template(facts, explicit="chat_template", chat_template=OWN).template is OWN


def test_start_and_end_tokens_stand_around_every_picture() -> None:
    facts = TemplateFacts(model_type="llava_mistral", use_start_end=True)
    for explicit in (None, "mistral_instruct"):
        template = choose_template(facts, explicit=explicit).template
        text = to_text(template.render([Message.user("Q", object())]))
        assert text == "[INST] <im_start><image><im_end>\nQ [/INST]"
    assert choose_template(facts, explicit=OWN).template is OWN


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(PromptError, match="'vicuna_v2': choose from default, v0, v1, vicuna_v1"):
        choose_template(TemplateFacts(), explicit="vicuna_v2")
    with pytest.raises(PromptError, match="no chat template of its own: choose from default"):
        choose_template(TemplateFacts(), explicit="chat_template")
    with pytest.raises(PromptError, match="no template is called 'gone'"):
        choose_template(TemplateFacts(recorded="gone"))
    asked = choose_template(TemplateFacts(recorded="gone"), explicit="mpt")
    assert asked.template == TEMPLATES["mpt"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LLaVA-Llama-2-13b", "llava_llama_2"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-v1.5-7b-lora", "llava_v1"),
        ("llava-mpt-7b", "mpt"),
        ("llava-mixtral", "llava_v0"),
    ],
)
def test_the_original_chooses_by_the_name_of_the_model(name: str, expected: str) -> None:
    assert template_for_name(name) == expected


BASES = [
    ("{{ '<|im_start|>' }}{{ '[INST]' }}", "", "chatml_direct"),
    ("{{ '<|im_start|>' }}", "mpt", "mpt"),
    ("{{ '[INST]' }}", "mpt", "mistral_instruct"),
    ("{{ '[INST]' }}", "mistral", "mistral_instruct"),
    ("{{ '<<SYS>>' }}{{ '[INST]' }}", "llama", "llava_llama_2"),
    ("{{ 'USER: ' }}", "llama", "vicuna_v1"),
    ("{{ '### Human: ' }}", "llama", "llava_v0"),
    ("{{ 'Question: ' }}", "llama", None),
    (None, "mpt", None),
]


@pytest.mark.parametrize(("chat_template", "family", "expected"), BASES)
def test_a_base_is_recognised_by_what_begins_its_turns(
    chat_template: str | None, family: str, expected: str | None
) -> None:
    assert template_of_base(chat_template, family=family) == expected
    for name, template in TEMPLATES.items():
        fits = expected is None or template.style in ("plain", TEMPLATES[expected].style)
        if fits:
            check_base_template(name, chat_template, "base")
            continue
        with pytest.raises(ConfigError, match=f"'{name}' is wrong for base: .*, or leave it out"):
            check_base_template(name, chat_template, "base", otherwise="leave it out")

"""Which template a checkpoint is spoken to with, and why.

In this order; the first that says something decides:

    asked for        `template=` of the person, always
    recorded         the template's name in config.json (`lapilli_template`, written by lapilli)
    chat template    of a checkpoint in the layout of Hugging Face, or of a plain language model
    model type       llava_mpt -> mpt
    vocabulary       <|im_start|> and <|im_end|> are tokens -> chatml_direct (Yi-34B, Hermes)
    model type       llava_mistral -> mistral_instruct
    name             the rules of the original's run_llava (the only place where a name counts)
    projector        linear, the first generation -> llava_v0; deeper -> vicuna_v1
    nothing          vicuna_v1, the default of the original's training and of its evaluation

A chat template beside an original-layout checkpoint is not followed: it belongs to the base model
and says nothing about how LLaVA was trained. An original checkpoint whose name tells nothing got
llava_v0 from the original's programs, which is right for none since version 1.

Knows plain facts, never files.
"""

from dataclasses import dataclass, replace
from typing import Literal

from lapilli.errors import PromptError
from lapilli.prompt.jinja import JinjaTemplate
from lapilli.prompt.template import ChatTemplate, Template
from lapilli.prompt.templates import DEFAULT_TEMPLATE, TEMPLATES

__all__ = [
    "RECORD_KEY",
    "START_END",
    "Template",
    "TemplateChoice",
    "TemplateFacts",
    "choose_template",
    "template_by_name",
    "template_for_name",
]

RECORD_KEY = "lapilli_template"
"""The key of config.json under which lapilli writes the template that it trained with."""


START_END = ("<im_start>", "<im_end>")
"""What stands around a picture under mm_use_im_start_end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFacts:
    """What the files of a checkpoint say that bears on the template.

    layout: as `ModelConfig.layout`. model_type: of config.json. text_type: of its `text_config`.
    projector: mm_projector_type. has_chatml: <|im_start|> and <|im_end|> are in the vocabulary.
    recorded: value of `RECORD_KEY`. use_start_end: mm_use_im_start_end, which puts every picture
    between <im_start> and <im_end> in whatever template of ours is taken.
    """

    layout: Literal["llava", "hf_llava", "hf_llava_next", "text"] = "llava"
    model_type: str = ""
    text_type: str = ""
    projector: str | None = None
    has_chatml: bool = False
    recorded: str | None = None
    use_start_end: bool = False


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """A template, why it was taken, and a note where a person overrode the checkpoint."""

    template: Template
    reason: str
    note: str | None = None


def choose_template(
    facts: TemplateFacts,
    *,
    name: str = "",
    explicit: str | Template | None = None,
    chat_template: JinjaTemplate | None = None,
) -> TemplateChoice:
    """The template of a checkpoint, by the table of this file.

    Args:
        facts: what its files say.
        name: of its folder or hub id.
        explicit: what a person asked for: a name, `"chat_template"`, or a template of their own.
        chat_template: the checkpoint's own.

    Raises:
        PromptError: no template has that name.

    Source: LLaVA run_llava.py and serve/cli.py for the rules by name.
    """
    choice = _choose(facts, name, explicit, chat_template)
    if not facts.use_start_end:
        return choice
    return replace(choice, template=around_media(choice.template, use_start_end=True))


def around_media(template: Template, *, use_start_end: bool) -> Template:
    """The template with what a checkpoint puts around a picture.

    Args:
        template: one of another form (Jinja) says that itself and stays as it is.
        use_start_end: see TemplateFacts.
    """
    if not isinstance(template, ChatTemplate):
        return template
    return replace(template, media_tokens=START_END if use_start_end else ("", ""))


def _choose(
    facts: TemplateFacts,
    name: str,
    explicit: str | Template | None,
    chat_template: JinjaTemplate | None,
) -> TemplateChoice:
    if explicit is None:
        return _by_evidence(facts, name, chat_template)
    template = _asked_for(explicit, chat_template)
    try:
        other = _by_evidence(facts, name, chat_template)
    except PromptError:  # a recorded name that we do not have: what was asked for replaces it
        return TemplateChoice(template, "asked for")
    if other.template == template:
        return TemplateChoice(template, f"asked for; the checkpoint says the same: {other.reason}")
    note = (
        f"template {template.name} was asked for, the checkpoint says {other.template.name} "
        f"({other.reason})"
    )
    return TemplateChoice(template, "asked for", note)


def template_by_name(name: str) -> ChatTemplate:
    """A template of the original.

    Raises:
        PromptError: no template has this name.
    """
    if name not in TEMPLATES:
        raise PromptError(f"no template is called {name!r}: choose from {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def template_for_name(model_name: str) -> tuple[str, str | None]:
    """(template, the part of the model's name that decided, or None), as run_llava and cli choose.

    Source: LLaVA run_llava.py, serve/cli.py; the first rule that matches, in lower case.
    """
    rules = {
        "llama-2": "llava_llama_2",
        "mistral": "mistral_instruct",
        "v1.6-34b": "chatml_direct",
        "v1": "llava_v1",
        "mpt": "mpt",
    }
    lowered = model_name.lower()
    for part, template in rules.items():
        if part in lowered:
            return template, part
    return "llava_v0", None


def _asked_for(explicit: str | Template, chat_template: JinjaTemplate | None) -> Template:
    if not isinstance(explicit, str):
        return explicit
    if explicit != "chat_template":
        return template_by_name(explicit)
    if chat_template is None:
        raise PromptError(
            "this checkpoint has no chat template of its own: choose from " + ", ".join(TEMPLATES)
        )
    return chat_template


def _by_evidence(
    facts: TemplateFacts, name: str, chat_template: JinjaTemplate | None
) -> TemplateChoice:
    if facts.recorded:
        template = template_by_name(facts.recorded)
        return TemplateChoice(template, f"config.json says {RECORD_KEY} {facts.recorded}")
    if chat_template is not None and facts.layout != "llava":
        return TemplateChoice(chat_template, "the checkpoint's own chat template")
    chosen, reason = _by_model(facts) or _by_name(name) or _by_projector(facts)
    return TemplateChoice(TEMPLATES[chosen], reason)


def _by_model(facts: TemplateFacts) -> tuple[str, str] | None:
    for kind in (facts.model_type, facts.text_type):
        if kind.endswith("mpt"):
            return "mpt", f"model_type {kind}"
    if facts.has_chatml:
        return "chatml_direct", "<|im_start|> and <|im_end|> are tokens of the vocabulary"
    for kind in (facts.model_type, facts.text_type):
        if kind.endswith("mistral"):
            return "mistral_instruct", f"model_type {kind}"
    return None


def _by_name(name: str) -> tuple[str, str] | None:
    template, part = template_for_name(name)
    if part is None:
        return None
    return template, f"the name {name!r} contains {part!r} (rule of the original)"


def _by_projector(facts: TemplateFacts) -> tuple[str, str]:
    if facts.layout == "llava" and facts.projector == "linear":
        return "llava_v0", "a linear projector: the first generation of LLaVA"
    if facts.projector is not None:
        return DEFAULT_TEMPLATE, f"projector {facts.projector}: LLaVA 1.5 and later"
    return DEFAULT_TEMPLATE, "nothing in the checkpoint tells: the original's default"

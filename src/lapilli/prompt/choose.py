"""Which template a checkpoint is spoken to with, and why.

In this order; the first that says something decides:

    asked for        `template=` of the person, always
    recorded         `lapilli_template` in config.json, which lapilli writes: a template's name, or
                     "chat_template" for the one that lies beside
    chat template    of a checkpoint in the layout of Hugging Face, or of a plain language model
    family           whose template comes before the vocabulary: mpt -> mpt
    vocabulary       <|im_start|> and <|im_end|> are tokens -> chatml_direct (Yi-34B, Hermes)
    family           with a template: mistral -> mistral_instruct (config/families)
    base             config.json names a chat version of Llama 2 as the base -> llava_llama_2
    projector        linear, the first generation -> llava_v0; deeper -> llava_v1
    nothing          vicuna_v1, the default of the original's training

What the folder is called counts nowhere here: the same files are asked alike under every name. The
original's programs go by the name of the folder (`template_for_name`), and so do the names of
lapilli.compat; there a 1.5 gets llava_v1 where "v1" is in its name, and llava_v0 where not.

A chat template beside an original-layout checkpoint is not followed unless it is recorded: it
belongs to the base model and says nothing about how LLaVA was trained.

Knows plain facts, never files.
"""

from dataclasses import dataclass, replace
from typing import Literal

from lapilli.config.families import find_family
from lapilli.errors import PromptError
from lapilli.prompt.jinja import JinjaTemplate
from lapilli.prompt.template import ChatTemplate, Template
from lapilli.prompt.templates import DEFAULT_TEMPLATE, TEMPLATES

__all__ = [
    "OWN",
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

OWN = "chat_template"
"""What a checkpoint's own chat template is called, by people and under `RECORD_KEY`."""

INFERENCE_TEMPLATE = "llava_v1"
"""What the original's programs ask a LLaVA 1.5 with; it was trained with `DEFAULT_TEMPLATE`."""

START_END = ("<im_start>", "<im_end>")
"""What stands around a picture under mm_use_im_start_end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFacts:
    """What the files of a checkpoint say that bears on the template.

    layout: as `ModelConfig.layout`. model_type: of config.json. text_type: of its `text_config`.
    base: `_name_or_path` of config.json. projector: mm_projector_type. has_chatml: <|im_start|> and
    <|im_end|> are in the vocabulary. recorded: value of `RECORD_KEY`. use_start_end:
    mm_use_im_start_end, which puts every picture between <im_start> and <im_end> in whatever
    template of ours is taken; media_gap goes there too (see `prompt.encode.media_gap`).
    """

    layout: Literal["llava", "hf_llava", "hf_llava_next", "text"] = "llava"
    model_type: str = ""
    text_type: str = ""
    base: str = ""
    projector: str | None = None
    has_chatml: bool = False
    recorded: str | None = None
    use_start_end: bool = False
    media_gap: str = ""


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """A template, why it was taken, and a note where a person overrode the checkpoint."""

    template: Template
    reason: str
    note: str | None = None


def choose_template(
    facts: TemplateFacts,
    *,
    explicit: str | Template | None = None,
    chat_template: JinjaTemplate | None = None,
) -> TemplateChoice:
    """The template of a checkpoint, by the table of this file.

    Args:
        facts: what its files say.
        explicit: what a person asked for: a name, `"chat_template"`, or a template of their own.
        chat_template: the checkpoint's own.

    Raises:
        PromptError: no template has that name.
    """
    choice = _choose(facts, explicit, chat_template)
    template = around_media(choice.template, use_start_end=facts.use_start_end, gap=facts.media_gap)
    return replace(choice, template=template)


def around_media(template: Template, *, use_start_end: bool, gap: str = "") -> Template:
    """The template with what a checkpoint puts around a picture.

    Args:
        template: one of another form (Jinja) says that itself and stays as it is.
        use_start_end: see TemplateFacts.
        gap: what text after a picture begins with; see `prompt.encode.media_gap`.
    """
    if not isinstance(template, ChatTemplate):
        return template
    return replace(template, media_tokens=START_END if use_start_end else ("", ""), media_gap=gap)


def _choose(
    facts: TemplateFacts,
    explicit: str | Template | None,
    chat_template: JinjaTemplate | None,
) -> TemplateChoice:
    if explicit is None:
        return _by_evidence(facts, chat_template)
    template = _asked_for(explicit, chat_template)
    try:
        other = _by_evidence(facts, chat_template)
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
    if explicit != OWN:
        return template_by_name(explicit)
    if chat_template is None:
        raise PromptError(
            "this checkpoint has no chat template of its own: choose from " + ", ".join(TEMPLATES)
        )
    return chat_template


def _by_evidence(facts: TemplateFacts, chat_template: JinjaTemplate | None) -> TemplateChoice:
    if facts.recorded:
        return TemplateChoice(
            _recorded(facts.recorded, chat_template),
            f"config.json says {RECORD_KEY} {facts.recorded}",
        )
    if chat_template is not None and facts.layout != "llava":
        return TemplateChoice(chat_template, "the checkpoint's own chat template")
    chosen, reason = _by_model(facts) or _by_base(facts.base) or _by_projector(facts)
    return TemplateChoice(TEMPLATES[chosen], reason)


def _recorded(name: str, chat_template: JinjaTemplate | None) -> Template:
    if name != OWN:
        return template_by_name(name)
    if chat_template is None:
        raise PromptError(
            f"config.json says {RECORD_KEY} {OWN}, but no chat template lies beside it: bring "
            f"chat_template.jinja back, or choose from {', '.join(TEMPLATES)}"
        )
    return chat_template


def _by_model(facts: TemplateFacts) -> tuple[str, str] | None:
    found = [(kind, find_family(kind)) for kind in (facts.model_type, facts.text_type)]
    named = [
        (family.template, f"model_type {kind}", family.template_first)
        for kind, family in found
        if family is not None and family.template is not None
    ]
    for template, reason, comes_first in named:
        if comes_first:
            return template, reason
    if facts.has_chatml:
        return "chatml_direct", "<|im_start|> and <|im_end|> are tokens of the vocabulary"
    return next(((template, reason) for template, reason, _ in named), None)


def _by_base(base: str) -> tuple[str, str] | None:
    lowered = base.lower()
    if "llama-2" in lowered and "chat" in lowered:
        return "llava_llama_2", f"config.json says that it was made from {base}"
    return None


def _by_projector(facts: TemplateFacts) -> tuple[str, str]:
    if facts.layout == "llava" and facts.projector == "linear":
        return "llava_v0", "a linear projector: the first generation of LLaVA"
    if facts.projector is not None:
        return INFERENCE_TEMPLATE, (
            f"projector {facts.projector}: LLaVA 1.5 and later, whatever the folder is called"
        )
    return DEFAULT_TEMPLATE, "nothing in the checkpoint tells: the original's default"

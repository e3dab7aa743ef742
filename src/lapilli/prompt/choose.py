"""Choice of the template that a checkpoint is asked with, and the reason for it.

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
belongs to the base model and says nothing about how LLaVA was trained. A model that is built or
trained takes turns as its base does: `template_of_base`, `check_base_template`.

Knows texts and plain facts, never files.
"""

from dataclasses import dataclass, replace
from typing import Literal

from lapilli.config.families import find_family
from lapilli.config.llava import RECORD_KEY
from lapilli.config.reader import shown
from lapilli.errors import ConfigError, PromptError, TemplateFileError
from lapilli.prompt.jinja import JinjaTemplate
from lapilli.prompt.template import DEFAULT_TEMPLATE, TEMPLATES, ChatTemplate, Template

__all__ = [
    "OWN",
    "START_END",
    "Template",
    "TemplateChoice",
    "TemplateFacts",
    "around_media",
    "check_base_template",
    "check_template",
    "choose_template",
    "template_by_name",
    "template_for_name",
    "template_of_base",
]

OWN = "chat_template"
"""Name of a checkpoint's own chat template, for people and under `RECORD_KEY`."""

START_END = ("<im_start>", "<im_end>")
"""Tokens around a picture under mm_use_im_start_end."""

_CHOICES = f"choose from {', '.join(TEMPLATES)}"
# What a chat template begins turns with, in the order in which they are looked for, and the
# template of ours that does so too.
_MARKS = {
    "<|im_start|>": "chatml_direct",
    "[INST]": "mistral_instruct",
    "USER:": "vicuna_v1",
    "### Human:": "llava_v0",
}
_SYSTEM_BLOCK = "<<SYS>>"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFacts:
    """Everything in the files of a checkpoint that bears on the template.

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
    """Choose the template of a checkpoint by the table of this file.

    `explicit` is what a person asked for: a name, "chat_template" for the checkpoint's own, or a
    template of their own.

    Raises:
        PromptError: no template has that name.
        TemplateFileError: no template has the name that is recorded.
    """
    if explicit is None:
        choice = _by_evidence(facts, chat_template)
    else:
        choice = _asked_for(explicit, facts, chat_template)
    template = around_media(choice.template, use_start_end=facts.use_start_end, gap=facts.media_gap)
    return replace(choice, template=template)


def around_media(template: Template, *, use_start_end: bool, gap: str = "") -> Template:
    """Return the template with what a checkpoint puts around a picture.

    One of another form (Jinja) says that itself and stays as it is. `gap` is that of `media_gap`.
    """
    if not isinstance(template, ChatTemplate):
        return template
    return replace(template, media_tokens=START_END if use_start_end else ("", ""), media_gap=gap)


def check_template(template: object) -> None:
    """Refuse what cannot render messages.

    Raises:
        PromptError: no template.
    """
    # isinstance(..., Template) would run a template for the strings that end an answer.
    if not callable(getattr(template, "render", None)):
        raise PromptError(
            "a template must have the methods of Template (lapilli.prompt.template.TEMPLATES has "
            f"those that have a name), got {shown(template)}"
        )


def template_by_name(name: str) -> ChatTemplate:
    """Return a template of the original.

    Raises:
        PromptError: no template has this name.
    """
    if name not in TEMPLATES:
        raise PromptError(f"no template is called {name!r}: {_CHOICES}")
    return TEMPLATES[name]


def template_for_name(model_name: str) -> str:
    """Return the template that run_llava and cli choose by the name of the model.

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
    return next((template for part, template in rules.items() if part in lowered), "llava_v0")


def template_of_base(chat_template: str | None, *, family: str = "") -> str | None:
    """Return the name of our template that takes turns as a base's chat template; None: none does.

    `family` is the model_type of the language model: mpt has a system text of its own.
    """
    mark = _mark_in(chat_template)
    if mark is None:
        return None
    known = find_family(family)
    own = known.template if known is not None and known.template_first else None
    if own is not None and TEMPLATES[own].style == TEMPLATES[_MARKS[mark]].style:
        return own
    if mark == "[INST]" and _SYSTEM_BLOCK in (chat_template or ""):
        return "llava_llama_2"
    return _MARKS[mark]


def check_base_template(
    asked: str, chat_template: str | None, base: str, *, otherwise: str = "insist (--force)"
) -> None:
    """Refuse a template that contradicts the chat template of the base.

    The marks before a turn tell them apart. A base without a chat template, or with marks that none
    of our templates has, contradicts nothing, and captions (the plain style) have no marks.

    `otherwise` says what a person can do who does not want the template that fits.

    Raises:
        ConfigError: it contradicts it; the message names the template that fits.
    """
    mark, style = _mark_in(chat_template), TEMPLATES[asked].style
    if mark is None or style in ("plain", TEMPLATES[_MARKS[mark]].style):
        return
    raise ConfigError(
        f"template {asked!r} is wrong for {base}: its own chat template begins turns with "
        f"{mark!r}, and a model that is trained with other marks forgets what it "
        f"knows about conversations; take {template_of_base(chat_template)!r}, or {otherwise}"
    )


def _mark_in(chat_template: str | None) -> str | None:
    return next((mark for mark in _MARKS if mark in (chat_template or "")), None)


def _asked_for(
    explicit: str | Template, facts: TemplateFacts, chat_template: JinjaTemplate | None
) -> TemplateChoice:
    template = explicit
    if isinstance(template, str):
        template = _named(
            template, chat_template, "this checkpoint has no chat template of its own: "
        )
    check_template(template)
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


def _named(name: str, chat_template: JinjaTemplate | None, missing: str) -> Template:
    if name != OWN:
        return template_by_name(name)
    if chat_template is None:
        raise PromptError(f"{missing}{_CHOICES}")
    return chat_template


def _by_evidence(facts: TemplateFacts, chat_template: JinjaTemplate | None) -> TemplateChoice:
    if facts.recorded is not None:
        says = f"config.json says {RECORD_KEY} {facts.recorded}"
        missing = (
            f"{says}, but no chat template lies beside it: bring chat_template.jinja back, or "
        )
        try:
            return TemplateChoice(_named(facts.recorded, chat_template, missing), says)
        except PromptError as error:
            where = "" if facts.recorded == OWN else f"{says}: "
            raise TemplateFileError(f"{where}{error}") from error
    if chat_template is not None and facts.layout != "llava":
        return TemplateChoice(chat_template, "the checkpoint's own chat template")
    chosen, reason = _by_model(facts) or _by_parts(facts)
    return TemplateChoice(TEMPLATES[chosen], reason)


def _by_model(facts: TemplateFacts) -> tuple[str, str] | None:
    named = [
        (family.template, f"model_type {kind}", family.template_first)
        for kind in (facts.model_type, facts.text_type)
        if (family := find_family(kind)) is not None and family.template is not None
    ]
    first = [choice for choice in named if choice[2]]
    if facts.has_chatml and not first:
        return "chatml_direct", "<|im_start|> and <|im_end|> are tokens of the vocabulary"
    return next(((template, reason) for template, reason, _ in first + named), None)


def _by_parts(facts: TemplateFacts) -> tuple[str, str]:
    base = facts.base.lower()
    if "llama-2" in base and "chat" in base:
        return "llava_llama_2", f"config.json says that it was made from {facts.base}"
    if facts.layout == "llava" and facts.projector == "linear":
        return "llava_v0", "a linear projector: the first generation of LLaVA"
    if facts.projector is not None:  # as the original's programs, not as it was trained
        reason = f"projector {facts.projector}: LLaVA 1.5 and later, whatever the folder is called"
        return "llava_v1", reason
    return DEFAULT_TEMPLATE, "nothing in the checkpoint tells: the original's default"

"""How a language model was taught to take turns, and whether a template contradicts it.

A chat template marks every turn; the marks tell the families apart. A base without a chat template,
or with marks that none of our templates has, contradicts nothing.

Knows texts and templates, no files.
"""

from lapilli.config.families import find_family
from lapilli.errors import ConfigError
from lapilli.prompt.template import ChatTemplate, Template
from lapilli.prompt.templates import TEMPLATES

# What begins a turn, in the order in which they are looked for, and the style that writes it.
_MARKS = {
    "<|im_start|>": "mpt",
    "[INST]": "llama_2",
    "USER:": "two",
    "### Human:": "single",
}
# The template that a base is spoken to with when nobody says; the first that fits.
_BY_STYLE = {
    "mpt": "chatml_direct",
    "llama_2": "mistral_instruct",
    "two": "vicuna_v1",
    "single": "llava_v0",
}
_SYSTEM_BLOCK = "<<SYS>>"


def mark_in(chat_template: str | None) -> str | None:
    """What a chat template (jinja) writes before a turn; None: nothing that we know."""
    return next((mark for mark in _MARKS if mark in (chat_template or "")), None)


def template_of_base(chat_template: str | None, *, family: str = "") -> str | None:
    """The name of our template that speaks as a base's chat template; None: none does.

    Args:
        chat_template: the jinja text beside the base.
        family: model_type of the language model; mpt has a system text of its own.
    """
    mark = mark_in(chat_template)
    if mark is None:
        return None
    known = find_family(family)
    own = known.template if known is not None and known.template_first else None
    if own is not None and TEMPLATES[own].style == _MARKS[mark]:
        return own
    if mark == "[INST]" and _SYSTEM_BLOCK in (chat_template or ""):
        return "llava_llama_2"
    return _BY_STYLE[_MARKS[mark]]


def contradicts(asked: Template, chat_template: str | None) -> bool:
    """Whether a base takes turns otherwise than the template that was asked for.

    Captions (the plain style) and checkpoints' own templates contradict nothing.
    """
    mark = mark_in(chat_template)
    if mark is None or not isinstance(asked, ChatTemplate) or asked.style == "plain":
        return False
    return _MARKS[mark] != asked.style


def refuse_wrong_template(
    asked: str, chat_template: str | None, base: str, *, otherwise: str = "insist (--force)"
) -> None:
    """Refuse a template that contradicts the chat template of the base.

    Args:
        asked: its name.
        chat_template: the jinja text beside the base.
        base: where that is.
        otherwise: what a person can do who does not want the one that fits.

    Raises:
        ConfigError: it does; the message names the template that fits.
    """
    if not contradicts(TEMPLATES[asked], chat_template):
        return
    raise ConfigError(
        f"template {asked!r} is wrong for {base}: its own chat template begins turns with "
        f"{mark_in(chat_template)!r}, and a model that is trained with other marks forgets what it "
        f"knows about conversations; take {template_of_base(chat_template)!r}, or {otherwise}"
    )

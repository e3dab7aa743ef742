"""The conversation template of a checkpoint: gathers the facts, lapilli.prompt.choose decides."""

from collections.abc import Mapping
from pathlib import Path

from lapilli.checkpoint.files import read_optional_json, read_optional_text
from lapilli.checkpoint.plan import Plan
from lapilli.prompt.choose import (
    RECORD_KEY,
    Template,
    TemplateChoice,
    TemplateFacts,
    choose_template,
)
from lapilli.prompt.jinja import JinjaTemplate


def choose_for(plan: Plan, explicit: str | Template | None = None) -> TemplateChoice:
    """The template of a plan, and why.

    Args:
        plan: of the checkpoint.
        explicit: what a person asked for instead.

    Raises:
        PromptError: no template has the name that was asked for or recorded.
    """
    return choose_template(
        template_facts(plan), name=plan.name, explicit=explicit, chat_template=own_template(plan)
    )


def template_facts(plan: Plan) -> TemplateFacts:
    """What the files say that bears on the template."""
    text = plan.raw.get("text_config")
    recorded = plan.raw.get(RECORD_KEY)
    projector = plan.config.projector
    ends = ("<|im_start|>", "<|im_end|>")
    return TemplateFacts(
        layout=plan.config.layout,
        model_type=str(plan.raw.get("model_type") or ""),
        text_type=str(text.get("model_type") or "") if isinstance(text, Mapping) else "",
        projector=None if projector is None else projector.kind,
        has_chatml=all(plan.tokenizer.token_to_id(token) is not None for token in ends),
        recorded=recorded if isinstance(recorded, str) else None,
        use_start_end=plan.config.tokens.use_start_end,
    )


def own_template(plan: Plan) -> JinjaTemplate | None:
    """The checkpoint's own chat template, where it has one that counts.

    Beside a checkpoint in the original layout it belongs to the base model and is not read.

    Raises:
        PromptError: a text that is no template.
    """
    if plan.config.layout == "llava":
        return None
    source = find_chat_template(plan.tokenizer_path)
    if source is None and plan.base_path is not None:  # an adapter's tokenizer, without one
        source = find_chat_template(plan.base_path)
    if source is None:
        return None
    tokenizer, tokens = plan.tokenizer, plan.config.tokens

    def text_of(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.id_to_token(token_id)

    image = text_of(tokens.image_id)
    more = {} if image is None else {"image_token": image}
    return JinjaTemplate(
        source, bos_token=text_of(tokenizer.bos_id), eos_token=text_of(tokenizer.eos_id), **more
    )


def find_chat_template(directory: Path) -> str | None:
    """The jinja text, from the newest place that has one."""
    found = read_optional_text(directory / "chat_template.jinja")
    if found is not None:
        return found
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        value = (read_optional_json(directory / name) or {}).get("chat_template")
        if isinstance(value, list):
            # Several by name; the one for conversation is called default.
            named = {entry.get("name"): entry for entry in value if isinstance(entry, Mapping)}
            value = named.get("default", {}).get("template")
        if isinstance(value, str):
            return value
    return None

"""Conversation template of a checkpoint, read and written.

Reading gathers the facts that lapilli.prompt.choose decides by. Writing names the template in
config.json and, if it is none of the original's, adds chat_template.jinja.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lapilli.checkpoint.read.plan import PEFT_ADAPTER, Plan
from lapilli.checkpoint.source import in_folder, read_optional_json, read_optional_text
from lapilli.config.model import ModelConfig
from lapilli.errors import ConfigError, TemplateFileError
from lapilli.prompt.choose import (
    OWN,
    Template,
    TemplateChoice,
    TemplateFacts,
    around_media,
    choose_template,
    template_by_name,
)
from lapilli.prompt.encode import media_gap
from lapilli.prompt.jinja import JinjaTemplate, to_jinja, with_gaps
from lapilli.prompt.template import TEMPLATES, ChatTemplate
from lapilli.prompt.tokenizer import Tokenizer


def choose_for(plan: Plan, explicit: str | Template | None = None) -> TemplateChoice:
    """Choose the template of a plan, or the one that the caller gives; the choice has a reason.

    A chat template that cannot be used is no fault where the caller gives another one.

    Raises:
        PromptError: no template has the name that was given.
        TemplateFileError: no template has the name that config.json records, or the checkpoint's
            own cannot be used.
    """
    try:
        own = own_template(plan)
    except TemplateFileError:
        if explicit is None or explicit == OWN:
            raise
        own = None
    with in_folder(plan.path):
        return choose_template(template_facts(plan), explicit=explicit, chat_template=own)


def template_facts(plan: Plan) -> TemplateFacts:
    """Gather the facts in the files by which the template is chosen."""
    text = plan.raw.get("text_config")
    projector, tokens = plan.config.projector, plan.config.tokens
    ends = ("<|im_start|>", "<|im_end|>")
    return TemplateFacts(
        layout=plan.config.layout,
        model_type=str(plan.raw.get("model_type") or ""),
        text_type=str(text.get("model_type") or "") if isinstance(text, Mapping) else "",
        base=str(plan.raw.get("_name_or_path") or ""),
        projector=None if projector is None else projector.kind,
        has_chatml=all(plan.tokenizer.token_to_id(token) is not None for token in ends),
        # The template of a PEFT adapter takes precedence over that of its base.
        recorded=None if _of_adapter(plan) is not None else plan.config.template,
        use_start_end=tokens.use_start_end,
        media_gap=media_gap(plan.tokenizer, tokens.image_id),
    )


def own_template(plan: Plan) -> JinjaTemplate | None:
    """Return the checkpoint's own chat template, or None.

    Beside a checkpoint in the original layout it belongs to the base model and is not read, unless
    config.json records that it is the model's.

    Raises:
        TemplateFileError: it is no template.
    """
    if plan.config.layout == "llava" and plan.config.template != OWN:
        return None
    # A PEFT adapter's folder holds no files of the checkpoint below.
    first = plan.base_path if plan.form == PEFT_ADAPTER else plan.path
    found = _of_adapter(plan) or _find(first or plan.path, plan.tokenizer_path)
    if found is None:
        return None
    tokenizer, tokens = plan.tokenizer, plan.config.tokens

    def text_of(token_id: int | None) -> str | None:
        known = token_id is not None and token_id < tokenizer.vocab_size
        return tokenizer.id_to_token(token_id) if known and token_id is not None else None

    image = text_of(tokens.image_id)
    more = {} if image is None else {"image_token": image}
    file, source = found
    return JinjaTemplate(
        source,
        file=str(file),
        bos_token=text_of(tokenizer.bos_id),
        eos_token=text_of(tokenizer.eos_id),
        special_tokens=tokenizer.named_tokens | more,
        **more,
    )


def _of_adapter(plan: Plan) -> tuple[Path, str] | None:
    """Return the chat template in the folder of a PEFT adapter, with which it was trained.

    Such a folder has no config.json to record a name in. Over a checkpoint in the original layout
    it is not read, like every chat template beside one.
    """
    if plan.form != PEFT_ADAPTER or plan.adapter is None or plan.config.layout == "llava":
        return None
    return _find(plan.adapter.path)


def find_chat_template(*directories: Path) -> str | None:
    """Find the jinja text in the first directory, and there the newest file, that has one."""
    found = _find(*directories)
    return None if found is None else found[1]


def _find(*directories: Path) -> tuple[Path, str] | None:
    """Find the same with its file."""
    for directory in directories:
        file = directory / "chat_template.jinja"
        found = read_optional_text(file)
        if found is not None:
            return file, found
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            value = (read_optional_json(directory / name) or {}).get("chat_template")
            if isinstance(value, list):
                # Several by name; the one for conversation is called default.
                named = {entry.get("name"): entry for entry in value if isinstance(entry, Mapping)}
                value = named.get("default", {}).get("template")
            if isinstance(value, str):
                return directory / name, value
    return None


@dataclass(frozen=True, slots=True)
class WrittenTemplate:
    """A template in the form of a checkpoint's files.

    Attributes:
        name: for `lapilli_template` in config.json: a template of the original, or "chat_template".
        jinja: text for chat_template.jinja; None: the name is enough.
    """

    name: str | None = None
    jinja: str | None = None

    def for_whole_prompts(
        self, tokenizer: Tokenizer, image_id: int, *, was_whole: bool
    ) -> str | None:
        """Return chat_template.jinja for Hugging Face's layout; None: there is no template.

        With `was_whole` prompts were tokenized whole before, so that a chat template has the text
        after a picture already.

        Raises:
            PromptError: captions (the plain style) are no conversation.
        """
        token, gap = tokenizer.id_to_token(image_id), media_gap(tokenizer, image_id)
        if self.jinja is not None:
            return self.jinja if was_whole else with_gaps(self.jinja, gap, token)
        if self.name is None:
            return None
        return with_gaps(to_jinja(TEMPLATES[self.name], token), gap, token)


def written_template(
    template: str | Template | None, config: ModelConfig, tokenizer_path: Path | None
) -> WrittenTemplate:
    """Return the form in which a template is written beside a model.

    Args:
        template: one, or its name; "chat_template" is the one among the tokenizer's files. None:
            the recorded one of the configuration, or the chat template where the layout is not the
            original's.
        config: of the model, in the layout that it was loaded in.
        tokenizer_path: a directory with the tokenizer's files.

    Raises:
        ConfigError: a template of a class that no file can hold.
        PromptError: no template has the name, or there is no chat template.
    """
    source = None if tokenizer_path is None else find_chat_template(tokenizer_path)
    if template is None:
        template = config.template
        if template is None and source is not None and config.layout != "llava":
            template = OWN
    if template is None:
        return WrittenTemplate()
    if isinstance(template, str):
        if template == OWN:
            if source is None:
                raise ConfigError(
                    f"template {OWN!r} is to be written, but there is no chat template in "
                    f"{tokenizer_path}: give one by name ({', '.join(TEMPLATES)})"
                )
            return WrittenTemplate(OWN, source)
        return WrittenTemplate(template_by_name(template).name)
    if isinstance(template, JinjaTemplate):
        return WrittenTemplate(OWN, template.source)
    if not isinstance(template, ChatTemplate):
        raise ConfigError(
            f"the template {template.name!r} is a {type(template).__name__}, which no file of a "
            f"checkpoint can hold: give one by name ({', '.join(TEMPLATES)}), a ChatTemplate or a "
            "JinjaTemplate"
        )
    if TEMPLATES.get(template.name) == around_media(template, use_start_end=False):
        return WrittenTemplate(template.name)
    return WrittenTemplate(OWN, with_gaps(to_jinja(template), template.media_gap))

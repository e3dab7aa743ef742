"""Ops without a model and without pictures: templates, names, tokenizers, stopping."""

from typing import Any

import torch

from tests.conformance.cases import Case
from tests.conformance.checkpoints import Workshop
from tests.conformance.compare import Check


def templates(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.conversation import conv_templates

    if case.given.get("list"):
        _template_list(case, check)
        return
    conv = conv_templates[case.given["conv"]].copy()
    if case.given.get("clear"):
        conv.messages = []

    def prompt() -> str:
        for role, text in case.given["turns"]:
            conv.append_message(conv.roles[role], tuple(text) if isinstance(text, list) else text)
        return conv.get_prompt()

    if case.raises:
        check.raises(case.raises, prompt)
    else:
        check.equal("prompt", prompt(), case.expect["prompt"])


def _template_list(case: Case, check: Check) -> None:
    from llava.conversation import conv_templates, default_conversation

    check.equal("names", list(conv_templates), case.expect["names"])
    same = [name for name, conv in conv_templates.items() if conv is default_conversation]
    check.equal("default", same, case.expect["default"])
    for name, expected in case.expect["fields"].items():
        conv = conv_templates[name]
        found = {
            "roles": conv.roles,
            "sep": conv.sep,
            "sep2": conv.sep2,
            "sep_style": conv.sep_style.name,
            "version": conv.version,
            "offset": conv.offset,
            "n_messages": len(conv.messages),
        }
        check.equal(name, found, expected)


def model_name(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.mm_utils import get_model_name_from_path

    def names() -> list[str]:
        return [get_model_name_from_path(path) for path in case.given["paths"]]

    if case.raises:
        check.raises(case.raises, names)
    else:
        check.equal("names", names(), case.expect["names"])


def open_tokenizer(workshop: Workshop, given: dict[str, Any]) -> Any:
    """A fresh tokenizer (it may be changed); fast where the original's class was fast."""
    from lapilli.compat.tokenizer import PreTrainedTokenizer

    fast = given.get("fast", False) or given.get("type") == "neox"
    return PreTrainedTokenizer.from_pretrained(workshop.tokenizer_folder(given), use_fast=fast)


def tokenize(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.mm_utils import tokenizer_image_token

    tokenizer = open_tokenizer(workshop, case.given["tokenizer"])
    for tokens in case.given.get("add_tokens", []):
        tokenizer.add_tokens(tokens, special_tokens=True)
    texts, expect = case.given["texts"], case.expect
    check.equal("class", type(tokenizer).__name__, expect["cls"])
    check.equal("length", len(tokenizer), expect["length"])
    ids = [tokenizer(text).input_ids for text in texts]
    check.equal("plain", ids, expect["plain"])
    with_images = [tokenizer_image_token(text, tokenizer) for text in texts]
    check.equal("image_token", with_images, expect["image_token"])
    check.equal("tokens", [tokenizer.convert_ids_to_tokens(row) for row in ids], expect["tokens"])
    check.equal("decode", [tokenizer.decode(row) for row in ids], expect["decode"])
    without = tokenizer.batch_decode(ids, skip_special_tokens=True)
    check.equal("decode_skip_special", without, expect["decode_skip_special"])


def decode(case: Case, workshop: Workshop, check: Check) -> None:
    tokenizer = open_tokenizer(workshop, case.given["tokenizer"])
    rows = case.given["ids"]
    check.equal("text", [tokenizer.decode(row) for row in rows], case.expect["text"])
    without = tokenizer.batch_decode(rows, skip_special_tokens=True)
    check.equal("text_skip", without, case.expect["text_skip"])


def stopping(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.mm_utils import KeywordsStoppingCriteria

    tokenizer = open_tokenizer(workshop, case.given["tokenizer"])
    prompt = torch.tensor([case.given["prompt_ids"]])
    criteria = KeywordsStoppingCriteria(case.given["keywords"], tokenizer, prompt)
    check.equal("keyword_ids", criteria.keyword_ids, case.expect["keyword_ids"])
    check.equal("max_keyword_len", criteria.max_keyword_len, case.expect["max_keyword_len"])
    outputs = [torch.tensor(o if isinstance(o[0], list) else [o]) for o in case.given["outputs"]]
    check.equal("stop", [criteria(o, None) for o in outputs], case.expect["stop"])


def prompt(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    from tests.conformance.ops.vision import loaded

    conv = conv_templates[case.given["conv"]].copy()
    for role, text in case.given["turns"]:
        conv.append_message(conv.roles[role], text)

    def ids() -> list[int]:
        return tokenizer_image_token(conv.get_prompt(), loaded(workshop).tokenizer)

    if case.raises:
        check.raises(case.raises, ids)
        return
    check.equal("prompt", conv.get_prompt(), case.expect["prompt"])
    check.equal("input_ids", ids(), case.expect["input_ids"])

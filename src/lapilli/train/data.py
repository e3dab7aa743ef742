r"""LLaVA's JSON conversations as encoded rows with their loss mask; knows no model.

{"id": "7", "image": "a.png",
 "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", ...}]}
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapilli.errors import PromptError
from lapilli.prompt.encode import EncodedPrompt, encode
from lapilli.prompt.message import Message, Role
from lapilli.prompt.template import ChatTemplate
from lapilli.prompt.tokenizer.base import Tokenizer

_ROLES: Mapping[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


def read_conversations(path: Path) -> list[dict[str, Any]]:
    """Samples of a LLaVA JSON file.

    Raises:
        PromptError: the file is no list of objects with "conversations".
    """
    samples = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(samples, list):
        raise PromptError(f"{path} holds a {type(samples).__name__}: expected a list of samples")
    for i, sample in enumerate(samples):
        if not isinstance(sample, dict) or not isinstance(sample.get("conversations"), list):
            raise PromptError(f'{path}: sample {i} has no list "conversations"')
    return samples


def images_of(sample: Mapping[str, Any]) -> list[str]:
    """The sample's image names; LLaVA has one, as a string, or none."""
    image = sample.get("image")
    if image is None:
        return []
    return [image] if isinstance(image, str) else list(image)


def messages_of(sample: Mapping[str, Any]) -> list[Message]:
    """Turns as messages; an answer of the model that stands first is dropped, as in the original.

    Raises:
        PromptError: an unknown role, or a sample without an answer.
        MediaCountMismatchError: another number of placeholders than of images.

    Source: LLaVA train.py preprocess_v1 and its siblings (reference behaviour of the data format).
    """
    turns: Sequence[Mapping[str, str]] = sample["conversations"]
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    images = images_of(sample)
    messages, used = [], 0
    for turn in turns:
        if turn["from"] not in _ROLES:
            raise PromptError(
                f"sample {sample.get('id')!r} has a turn from {turn['from']!r}: "
                f"expected {', '.join(_ROLES)}"
            )
        number = turn["value"].count("<image>")
        messages.append(
            Message.from_placeholders(
                _ROLES[turn["from"]], turn["value"], images[used : used + number]
            )
        )
        used += number
    if used != len(images):
        raise PromptError(
            f"sample {sample.get('id')!r} has {len(images)} images but {used} <image> placeholders"
        )
    return messages


def encode_sample(
    sample: Mapping[str, Any],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
) -> EncodedPrompt:
    """The row of a sample.

    Args:
        sample: LLaVA's format.
        template: how turns become text.
        tokenizer: of the language model.
        lengths: positions of each of its images.

    Raises:
        PromptError: nothing in the row is supervised.
    """
    segments = template.render(messages_of(sample), open_turn=False)
    prompt = encode(segments, tokenizer, lengths)
    if not any(prompt.loss_mask):
        raise PromptError(
            f"sample {sample.get('id')!r} has no supervised token: every answer in it is empty"
        )
    return prompt

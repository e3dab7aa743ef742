"""Golden `sample` cases of the original as rows of the trainer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from lapilli.checkpoint.load import Loaded
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from lapilli.train.data.encoder import EncodedSample

IMAGE = -200
VARIANTS = (
    "llava-v1.5-tiny-pad",
    "llava-v1.5-tiny-last-cls",
    "llava-llama-2-tiny-chat",
    "llava-tiny-identity",
    "llava-mpt-tiny",
    "llava-v1.6-mistral-tiny",
    "llava-v1.6-tiny-anyres-flat",
    "llava-v1.6-tiny-anyres-spatial",
    "llava-v1.6-vicuna-tiny-336",
)


def with_gradients(conformance: Path, variant: str) -> Iterator[dict[str, Any]]:
    """The cases of a variant that have gradients."""
    file = next((conformance / "cases").glob(f"*/{variant}/cases.json"))
    for case in json.loads(file.read_text())["cases"]:
        if case["op"] == "sample" and "grad_norms" in case["expect"]:
            yield case


def encoded_dataset(case: dict[str, Any], loaded: Loaded, pictures: Path) -> list[EncodedSample]:
    """Its prompts with the features' places, labelled as the case says."""
    image = loaded.model.modality("image")
    names = iter(case["input"]["images"])
    rows = []
    for number, given in enumerate(case["expect"]["input_ids"]):
        name = next(names)  # a row of text uses one up
        ids: list[int] = []
        mask: list[bool] = []
        spans, media = [], []
        for at, token in enumerate(given):
            if token != IMAGE:
                ids.append(token)
                mask.append(at >= case["input"]["labels_from"])
                continue
            item = image.prepare(Image.open(next(pictures.glob(f"*/{name}"))).convert("RGB"))
            length = image.num_tokens(item)
            spans.append(Span(0, len(ids), length))
            media.append(item)
            ids += [PLACEHOLDER] * length
            mask += [False] * length
        rows.append(
            EncodedSample(EncodedPrompt(ids, mask, tuple(spans)), tuple(media), str(number))
        )
    return rows

"""Processor: messages -> ProcessedPrompt; media fetched, prepared and counted, text encoded.

Knows where a medium goes on its way; must not know the conversation before or the answer after.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lapilli.config.generation import SamplingParams
from lapilli.errors import MediaError, UnsupportedModelError
from lapilli.generate.reference import check_context
from lapilli.media.fetch import FetchLimits, fetch
from lapilli.modality.image.decode import Alpha, to_rgb
from lapilli.modality.image.image import ImageModality
from lapilli.modality.image.pixels import PreparedImage
from lapilli.model.vlm import VisionLanguageModel
from lapilli.prompt.choose import Template
from lapilli.prompt.encode import EncodedPrompt, encode
from lapilli.prompt.message import MediaPart, Message
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.shapes import Float, Tensor


@dataclass(frozen=True, slots=True)
class ProcessedPrompt:
    """A conversation as the model takes it: `model.embed_prompts([encoded], [media])`.

    Attributes:
        encoded: ids, and where the media go.
        media: per medium what its modality prepared, or features [n, D].
    """

    encoded: EncodedPrompt
    media: tuple[Any, ...]

    @property
    def text_ids(self) -> list[int]:
        """Token ids outside the media."""
        covered = {i for s in self.encoded.spans for i in range(s.start, s.start + s.length)}
        return [token for i, token in enumerate(self.encoded.input_ids) if i not in covered]


def process(
    messages: Sequence[Message],
    items: Sequence[Any],
    *,
    model: VisionLanguageModel,
    template: Template,
    tokenizer: Tokenizer,
    context_length: int,
    image_id: int | None = None,
    row: int = 0,
) -> ProcessedPrompt:
    """Return the prompt of a conversation; its spans have the lengths of its media.

    `items` are what `prepare` made of the media of all messages, in their order; `image_id` is the
    vocabulary's own image token, in checkpoints of Hugging Face's layout.

    Raises:
        ContextTooLongError: the conversation leaves no room for an answer.
        PromptError: the template cannot render these messages.
    """
    parts = [part for message in messages for part in message.media]
    lengths = [
        len(item) if isinstance(item, Tensor) else model.modality(part.modality).num_tokens(item)
        for part, item in zip(parts, items, strict=True)
    ]
    encoded = encode(template.render(messages), tokenizer, lengths, image_id=image_id)
    check_context(len(encoded.input_ids), context_length, row=row, visual=sum(lengths))
    return ProcessedPrompt(encoded, tuple(items))


def with_stops(params: SamplingParams, template: Template, tokenizer: Tokenizer) -> SamplingParams:
    """Return the parameters with the template's end of an answer among the stops.

    Where the tokenizer has the stop string as one token, that token stops too: special tokens
    are not part of the text that stop strings are looked for in.
    """
    token_ids = [tokenizer.token_to_id(text) for text in template.stop]
    return params.updated(
        stop=dict.fromkeys((*params.stop, *template.stop)),
        stop_token_ids=(*params.stop_token_ids, *(i for i in token_ids if i is not None)),
    )


def prepare(
    part: MediaPart, model: VisionLanguageModel, limits: FetchLimits, *, alpha: Alpha = "drop"
) -> Any:  # noqa: ANN401 - every modality has its own
    """Return a medium prepared for its modality; features stay features.

    Raises:
        UnsupportedModelError: the model does not read this kind of medium.
        MediaError: it cannot be fetched or decoded, or features of another shape.
    """
    if part.modality not in model.modalities:
        known = ", ".join(model.modalities) or "text only"
        raise UnsupportedModelError(
            f"this model cannot take an {part.modality}, it reads {known}: leave it out, or load a "
            "LLaVA checkpoint"
        )
    modality = model.modality(part.modality)
    source = part.source
    if not isinstance(modality, ImageModality):
        return modality.prepare(source)
    if isinstance(source, PreparedImage):
        return source
    if isinstance(source, Tensor):
        return _project_features(source, modality, model.language_model.config.hidden_size)
    fetched = fetch(source, limits=limits, stdin=getattr(sys.stdin, "buffer", None))
    return modality.prepare(to_rgb(fetched.data, alpha=alpha, name=fetched.name))


@torch.inference_mode()
def _project_features(
    features: Tensor, modality: ImageModality, width: int
) -> Float[Tensor, "n D"]:
    """Return features that somebody computed before, as wide as the language model reads them.

    They are [n, width], or [n, width of the tower], which go through the projector; `width` is that
    of the language model, which counts if both are equal.

    Raises:
        MediaError: another shape, or whole numbers.
    """
    tower = modality.vision.hidden_size
    shape = list(features.shape)
    fits = features.ndim == 2 and shape[0] > 0 and shape[1] in (width, tower)
    if not fits or not features.is_floating_point():
        raise MediaError(
            f"features must be floating point [n, {width}] (language model) or [n, {tower}] "
            f"(vision tower), got {features.dtype} {shape}; pass a picture as a Pillow image or an "
            "array"
        )
    weight = next(modality.parameters())
    features = features.to(weight.device, weight.dtype)
    if shape[1] == width:
        return features
    projected: Tensor = modality.projector(features)
    return projected

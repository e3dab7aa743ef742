"""Display of samples for a terminal: pieces of text, supervised or not, without colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from lapilli.errors import DataError, LapilliError
from lapilli.prompt.choose import Template
from lapilli.prompt.encode import EncodedPrompt
from lapilli.prompt.template import MediaSlot
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.train.data.check import ImageChecker, size_only
from lapilli.train.data.encoder import SampleEncoder
from lapilli.train.data.sample import Sample


@dataclass(frozen=True, slots=True)
class TextSpan:
    """A piece of text.

    Attributes:
        text: as the model reads it; of a medium its name and positions.
        supervised: the loss counts it.
        is_media: it stands for a medium.
    """

    text: str
    supervised: bool = False
    is_media: bool = False


def rendered(sample: Sample, template: Template) -> list[TextSpan]:
    """Return the sample as a template writes it, without tokens.

    Raises:
        DataError: turns that the template cannot have.
    """
    try:
        segments = template.render(sample.messages, open_turn=False)
    except LapilliError as error:
        raise DataError(f"{sample.label}: {error}") from error
    found = [
        TextSpan(f"<{segment.modality}>", is_media=True)
        if isinstance(segment, MediaSlot)
        else TextSpan(segment.text, segment.trainable)
        for segment in segments
    ]
    return _joined(found)


def tokenized(sample: Sample, encoder: SampleEncoder, images: ImageChecker) -> list[TextSpan]:
    """Return the sample as the model reads it, token by token, with the sizes of its pictures.

    Raises:
        DataError: a picture that cannot be opened, or turns that the template cannot have.
    """
    try:
        media = [size_only(images.look(part.source).size) for part in sample.media]
        prompt = encoder.encode_prompt(sample, encoder.count(sample, media))
    except LapilliError as error:
        raise DataError(f"{sample.label}: {error}") from error
    return text_spans(prompt, encoder.tokenizer)


def text_spans(prompt: EncodedPrompt, tokenizer: Tokenizer) -> list[TextSpan]:
    """Return an encoded sample as text: every token is shown, also special ones."""
    found, at = [], 0
    for span in prompt.spans:
        found += _text_of(prompt, at, span.start, tokenizer)
        label = f"<{span.modality}: {span.length} positions>"
        found.append(TextSpan(label, is_media=True))
        at = span.start + span.length
    return found + _text_of(prompt, at, len(prompt), tokenizer)


def _text_of(prompt: EncodedPrompt, start: int, end: int, tokenizer: Tokenizer) -> list[TextSpan]:
    out = []
    for supervised, places in groupby(range(start, end), key=prompt.loss_mask.__getitem__):
        data = b"".join(tokenizer.token_bytes(prompt.input_ids[i]) for i in places)
        out.append(TextSpan(data.decode("utf-8", "replace"), supervised))
    return out


def _joined(found: Sequence[TextSpan]) -> list[TextSpan]:
    """Join neighbours of one kind."""
    out: list[TextSpan] = []
    for kind, group in groupby(found, key=lambda s: (s.supervised, s.is_media)):
        if kind[1]:
            out += group
        else:
            out.append(TextSpan("".join(s.text for s in group), *kind))
    return out

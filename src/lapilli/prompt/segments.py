"""What a template renders to: stretches of text and places for media."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class TextSegment:
    """A stretch of text.

    `trainable`: the loss counts its tokens. `literal`: typed by a person, special tokens inside it
    stay text.
    """

    text: str
    trainable: bool = False
    literal: bool = False


@dataclass(frozen=True, slots=True)
class MediaSlot:
    """The place of one medium."""

    modality: str = "image"


Segment = TextSegment | MediaSlot


def trainable(segments: Iterable[Segment]) -> list[Segment]:
    """The same segments with every text counted by the loss."""
    return [replace(s, trainable=True) if isinstance(s, TextSegment) else s for s in segments]


def to_text(segments: Iterable[Segment], *, placeholder: str = "<image>") -> str:
    """The prompt as one string, as the original shows it: for people, never to be encoded."""
    return "".join(s.text if isinstance(s, TextSegment) else placeholder for s in segments)

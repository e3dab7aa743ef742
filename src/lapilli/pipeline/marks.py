"""Marks: unguessable stand-ins in the text of a message, found again in the rendered prompt.

    Message  "Query: boats [mark]"  --template-->  segments  --reveal-->  before the mark | behind

So a prompt of any conversation template is cut at a place inside a message. Knows segments; must
not know what goes into the place.
"""

import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from lapilli.errors import PromptError
from lapilli.prompt.template import MediaSlot, Segment, TextSegment
from lapilli.shapes import Tensor


class Marks:
    """Unguessable stand-ins in a text, for the item and for vectors of the query."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(16)
        self._vectors: list[Tensor] = []
        self.item = f"[{self._nonce}:item]"

    def vectors(self, given: Tensor) -> str:
        """Return the stand-in of these vectors."""
        self._vectors.append(given)
        return f"[{self._nonce}:{len(self._vectors) - 1}]"

    def reveal(
        self, segments: Sequence[Segment], prepared: Sequence[Any]
    ) -> tuple[list[Segment], list[Any], int]:
        """Return segments with places for vectors, all media in order, and where the item goes.

        Raises:
            PromptError: a conversation template that wrote a mark not once.
        """
        found: list[Segment] = []
        media: list[Any] = []
        places: list[int] = []
        rest = iter(prepared)
        for segment in segments:
            if isinstance(segment, MediaSlot):
                found.append(segment)
                media.append(next(rest))
                continue
            for piece in self._cut(segment):
                if isinstance(piece, TextSegment):
                    found.append(piece)
                elif piece == "item":
                    places.append(len(found))
                else:
                    found.append(MediaSlot())
                    media.append(self._vectors[int(piece)])
        if len(places) != 1 or len(media) != len(prepared) + len(self._vectors):
            raise PromptError(
                f"the conversation template writes the place of the item {len(places)} times and "
                f"{len(media)} of {len(prepared) + len(self._vectors)} media: choose a template by "
                "name"
            )
        return found, media, places[0]

    def _cut(self, segment: TextSegment) -> Iterator[TextSegment | str]:
        """Yield texts, and the names of the marks between them."""
        for i, piece in enumerate(re.split(rf"\[{self._nonce}:(\w+)\]", segment.text)):
            if i % 2:
                yield piece
            elif piece:
                yield TextSegment(piece, literal=segment.literal)

r"""Prompts of a ranking: what stands before the item, the item, and what stands after it.

    template      "Query: {query}\n...\n{item}"     in the model's own conversation template
    rendered      "USER: Query: boats\n...\n" | ITEM | " ASSISTANT:"
                  prefix                        item   suffix

The three are made into tokens one by one, as the texts between media are (prompt/encode.py), and
never across a border: a text, a vector or both in the place of the item leave the tokens around it
as they are, and a prompt has the same tokens however many items are scored together. What the
template, the query and the items say is text as it was typed, so nothing in it is a special token.

Knows messages, templates and tokenizers; must not know how a prompt is scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from lapilli.config.reader import shown
from lapilli.errors import ContextTooLongError, MediaError, PromptError
from lapilli.pipeline import Chat, ProcessedPrompt
from lapilli.pipeline.marks import Marks
from lapilli.prompt.encode import encode
from lapilli.prompt.message import MediaPart, Message, Part, TextPart, check_conversation
from lapilli.prompt.template import MediaSlot, Segment, TextSegment
from lapilli.shapes import Tensor

QUERY, ITEM = "{query}", "{item}"
POINTWISE = f"Query: {QUERY}\nDoes this item match the query? Answer yes or no.\n{ITEM}"
SETWISE = f"Query: {QUERY}\nWhich of these items matches the query best? Name its letter.\n{ITEM}"

Content = str | Tensor | np.ndarray | MediaPart
"""A text, one or more vectors of the language model's width, or a medium that the model reads."""

Query = Content | Message | Sequence[Message | Content]
"""A text, vectors, messages that end with the user's, or parts."""

Item = Content | Sequence[Content]
"""One part, or several in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTemplate:
    """What is said of a query and an item.

    Everything before the item is read once for all items, so little should stand behind it.

    Attributes:
        user: message of the user, with {query} and {item} in it.
        system: instructions; None: those of the chat, or of the model's template.

    Raises:
        PromptError: not one {query} and after it one {item}.
    """

    user: str = POINTWISE
    system: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.user, str):
            raise PromptError(f"a template of a ranking must be a text, got {shown(self.user)}")
        if self.user.count(QUERY) != 1 or self.user.count(ITEM) != 1:
            raise PromptError(
                f"a template of a ranking has {QUERY} once and {ITEM} once, found {QUERY} "
                f"{self.user.count(QUERY)} times and {ITEM} {self.user.count(ITEM)} times"
            )
        if self.user.index(ITEM) < self.user.index(QUERY):
            raise PromptError(
                f"{QUERY} stands behind {ITEM} in the template of a ranking, so that nothing of it "
                f"could be read once for all items: put {QUERY} first"
            )


@dataclass(frozen=True, slots=True)
class Frame:
    """A prompt without its item: what stands before it and what stands after it."""

    prefix: ProcessedPrompt
    suffix: ProcessedPrompt


class PromptSplitter:
    """Makes prompts of queries and items, in three pieces.

    Args:
        chat: the model, its tokenizer and its conversation template.
        template: what is said.
    """

    def __init__(self, chat: Chat, template: RankTemplate) -> None:
        self._chat = chat
        self._template = template
        self._width = chat.model.language_model.config.hidden_size

    def frame(self, query: Query) -> Frame:
        """Return everything of a prompt but the item.

        Raises:
            PromptError: a query with nothing in it, or one that is none; a conversation template
                that does not write the item's place.
            MediaError: a medium of the query cannot be read, or a vector of it is of another width.
        """
        marks = Marks()
        messages = self._messages(query, marks)
        prepared = [self._chat.prepare(part) for message in messages for part in message.media]
        segments, media, at = marks.reveal(self._chat.template.render(messages), prepared)
        image_id = self._chat.config.tokens.image_id
        num_before = sum(isinstance(segment, MediaSlot) for segment in segments[:at])
        before, after = media[:num_before], media[num_before:]
        return Frame(
            self._encode(segments[:at], before, image_id=image_id),
            self._encode(segments[at:], after, add_bos=False),
        )

    def item(self, item: Item, name: str) -> ProcessedPrompt:
        """Return an item as it goes into the frame; `name` is how errors call it.

        Raises:
            PromptError: an item with nothing in it, or something that is none.
            MediaError: vectors of another width, or of numbers that are not finite.
        """
        segments: list[Segment] = []
        media: list[Any] = []
        for part in _parts(item, name):
            if isinstance(part, str):
                segments.append(TextSegment(part, literal=True))
            elif isinstance(part, MediaPart):
                segments.append(MediaSlot(part.modality))
                media.append(self._chat.prepare(part))
            else:
                segments.append(MediaSlot())
                media.append(self._vectors(part, name))
        return self._encode(segments, media, add_bos=False)

    def check_length(self, frame: Frame, item: ProcessedPrompt, name: str) -> None:
        """Refuse a prompt that the model cannot read.

        Raises:
            ContextTooLongError: query, item and template are longer than the context.
        """
        around = len(frame.prefix.encoded) + len(frame.suffix.encoded)
        length, limit = len(item.encoded), self._chat.context_length
        if around >= limit:
            raise ContextTooLongError(
                f"the query has {around} positions with what the template says, but the model "
                f"reads {limit}: shorten it"
            )
        if around + length > limit:
            raise ContextTooLongError(
                f"{name} has {length} positions and what stands around it {around}, but the model "
                f"reads {limit}: shorten the item or the query"
            )

    def _messages(self, query: Query, marks: Marks) -> list[Message]:
        """Return the conversation, with the query and marks in the last message."""
        before, last = self._conversation(query, marks)
        if not before or before[0].role != "system":
            system = self._chat.system if self._template.system is None else self._template.system
            before = before if system is None else [Message.system(system), *before]
        opening, _, rest = self._template.user.partition(QUERY)
        between, _, closing = rest.partition(ITEM)
        parts = list(last.parts)
        leading = 0  # media in front stay there, as LLaVA was trained
        while leading < len(parts) and isinstance(parts[leading], MediaPart):
            leading += 1
        texts = [TextPart(opening), *parts[leading:], TextPart(between + marks.item + closing)]
        return [*before, Message("user", (*parts[:leading], *_merged(texts)))]

    def _conversation(self, query: Query, marks: Marks) -> tuple[list[Message], Message]:
        """Return the messages before the query, and the user's message that is the query."""
        given = [query] if isinstance(query, Message) else query
        if isinstance(given, Sequence) and any(isinstance(one, Message) for one in given):
            check_conversation(given)
            *before, last = (one for one in given if isinstance(one, Message))
            if last.role != "user" or not (last.text.strip() or last.media):
                raise PromptError(
                    "the query is empty: its last message must be the user's, with something in it"
                )
            return before, last
        parts: list[Part] = []
        for part in _parts(query, "the query"):
            if isinstance(part, str):
                parts.append(TextPart(part))
            elif isinstance(part, MediaPart):
                parts.append(part)
            else:
                parts.append(TextPart(marks.vectors(self._vectors(part, "the query"))))
        return [], Message("user", tuple(_merged(parts)))

    def _vectors(self, given: Tensor | np.ndarray, name: str) -> Tensor:
        """Return vectors as [n, D].

        Raises:
            MediaError: another width, whole numbers, or numbers that are not finite.
        """
        found = given if isinstance(given, Tensor) else _tensor(given, name)
        shape = list(found.shape)
        is_right = found.ndim in (1, 2) and shape[-1] == self._width and found.numel() > 0
        is_dense = found.is_floating_point() and found.layout == torch.strided
        if not is_right or not is_dense or found.is_meta:
            raise MediaError(
                f"{name}: vectors must be floating point [{self._width}] or [n, {self._width}], as "
                f"wide as the language model, got {found.dtype} {shape} on {found.device}"
            )
        if not bool(found.isfinite().all()):
            raise MediaError(
                f"{name}: {int((~found.isfinite()).sum())} of the numbers of its vectors are NaN "
                "or infinite: encode it again"
            )
        return found.detach().view(-1, self._width) if found.ndim == 1 else found.detach()

    def _encode(
        self,
        segments: Sequence[Segment],
        media: Sequence[Any],
        *,
        image_id: int | None = None,
        add_bos: bool = True,
    ) -> ProcessedPrompt:
        slots = [segment for segment in segments if isinstance(segment, MediaSlot)]
        lengths = [
            self._chat.model.span_length(slot.modality, one)
            for one, slot in zip(media, slots, strict=True)
        ]
        encoded = encode(
            segments, self._chat.tokenizer, lengths, image_id=image_id, add_bos=add_bos
        )
        return ProcessedPrompt(encoded, tuple(media))


def _parts(given: Item | Query, name: str) -> list[Content]:
    """Return what an item or a query is made of.

    Raises:
        PromptError: nothing in it, or something else than texts, vectors and media.
    """
    parts: list[Content] = []
    for part in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(part, Content):
            raise PromptError(
                f"{name}: expected a text, vectors, or a list of them, got {shown(part)}"
            )
        parts.append(part)
    if all(isinstance(part, str) and not part.strip() for part in parts):
        raise PromptError(f"{name} is empty: give it a text or vectors")
    return parts


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with neighbouring texts as one, whose white space no template sees."""
    found: list[Part] = []
    for is_text, some in groupby(parts, key=lambda part: isinstance(part, TextPart)):
        if is_text:
            text = "".join(part.text for part in some if isinstance(part, TextPart))
            found += [TextPart(text)] if text else []
        else:
            found += some
    return found


def _tensor(given: np.ndarray, name: str) -> Tensor:
    try:
        return torch.as_tensor(given)
    except TypeError as error:
        raise MediaError(f"{name}: an array of {given.dtype} holds no vectors") from error

"""Messages of a conversation: text and media in order.

Knows nothing of templates, tokens or pictures: the source of a medium is passed on untouched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lapilli.errors import MediaCountMismatchError, PromptError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text as it was typed; nothing inside it is a special token or a placeholder."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A medium in its place; `source` is whatever the media room can open."""

    source: object
    modality: str = "image"


Part = TextPart | MediaPart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: who speaks.
        parts: text and media in order.
        written: where a program wrote the message with placeholders, the texts around the media,
            one more than there are media, which are kept character by character. None: the
            template writes line breaks behind the media that stand in front.

    Raises:
        PromptError: a role other than system, user or assistant, or another number of pieces.
    """

    role: str
    parts: tuple[Part, ...]
    written: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PromptError(
                f"unknown role {self.role!r}: expected {', '.join(ROLES[:-1])} or {ROLES[-1]}"
            )
        if self.written is not None and len(self.written) != len(self.media) + 1:
            raise PromptError(
                f"{len(self.media)} media stand between {len(self.media) + 1} pieces of text, "
                f"found {len(self.written)}"
            )

    @property
    def text(self) -> str:
        """All text of the turn without its media."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """The media of the turn in order."""
        return tuple(part for part in self.parts if isinstance(part, MediaPart))

    @property
    def in_order(self) -> tuple[Part, ...]:
        """Parts as they are written: `parts`, or the pieces of `written` with the media between."""
        if self.written is None:
            return self.parts
        first, *rest = self.written
        found: list[Part] = [TextPart(first)]
        for part, text in zip(self.media, rest, strict=True):
            found += [part, TextPart(text)]
        return tuple(found)

    @classmethod
    def system(cls, text: str) -> "Message":
        """Return instructions that replace those of the template."""
        return cls("system", (TextPart(text),))

    @classmethod
    def user(cls, text: str, *sources: object) -> "Message":
        """Return a question about `sources`, which stand in front of it as LLaVA was trained."""
        return cls("user", (*(MediaPart(source) for source in sources), TextPart(text)))

    @classmethod
    def assistant(cls, text: str) -> "Message":
        """Return an answer."""
        return cls("assistant", (TextPart(text),))

    @classmethod
    def from_placeholders(
        cls, role: str, text: str, sources: Sequence[object], *, placeholder: str = "<image>"
    ) -> "Message":
        """Return a message that a program wrote with `placeholder` where each source goes.

        The text is kept character by character. In `parts` a line break after a leading
        placeholder is left out, as a template writes it there.

        Raises:
            MediaCountMismatchError: another number of placeholders than of sources.
        """
        pieces = text.split(placeholder)
        if len(pieces) - 1 != len(sources):
            raise MediaCountMismatchError(
                f"the text has {len(pieces) - 1} {placeholder} but {len(sources)} sources were "
                "given: give one source for each placeholder"
            )
        parts: list[Part] = [TextPart(pieces[0])] if pieces[0] else []
        leads = not parts  # no text stands before
        for source, piece in zip(sources, pieces[1:], strict=True):
            parts.append(MediaPart(source))
            rest = piece.removeprefix("\n") if leads else piece
            if rest:
                parts.append(TextPart(rest))
                leads = False
        return cls(role, tuple(parts), tuple(pieces) if sources else None)

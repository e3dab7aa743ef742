"""Messages of a conversation: text and media in order.

Knows nothing of templates, tokens or pictures: the source of a medium is passed on untouched.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from lapilli.config.reader import shown
from lapilli.errors import MediaCountMismatchError, PromptError

Role = Literal["system", "user", "assistant"]
T = TypeVar("T")
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Said:
    """The tokens of a text that a model said, and the token of the prompt before them.

    A text can be cut into tokens in several ways, and a model need not choose the one of its
    tokenizer. Keys and values that are kept belong to the tokens that were said.
    """

    ids: tuple[int, ...]
    after: int


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text as it was typed; nothing inside it is a special token or a placeholder.

    Attributes:
        text: the text.
        said: its tokens where a model said it; None: those of the tokenizer.

    Raises:
        PromptError: something else than text.
    """

    text: str
    said: Said | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_text(self.text)


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
        PromptError: a role other than system, user or assistant, something else than parts, or
            another number of pieces.
    """

    role: str
    parts: tuple[Part, ...]
    written: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PromptError(
                f"unknown role {self.role!r}: expected {', '.join(ROLES[:-1])} or {ROLES[-1]}"
            )
        if not isinstance(self.parts, tuple) or not all(isinstance(p, Part) for p in self.parts):
            raise PromptError(
                f"a message must be a tuple of TextPart and MediaPart, got {shown(self.parts)}: "
                "Message.user makes one of a text and pictures"
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
    def user(cls, text: str, *sources: object, **media: object) -> "Message":
        """Return a question about media, which stand in front of it as LLaVA was trained.

        Args:
            text: the question.
            sources: pictures.
            media: one medium of each modality that is named, such as `user=history`, in the order
                given. Several of one modality are MediaParts of a message made from its parts.
        """
        pictures = [MediaPart(source) for source in sources]
        others = [MediaPart(source, modality) for modality, source in media.items()]
        return cls("user", (*pictures, *others, TextPart(text)))

    @classmethod
    def assistant(cls, text: str, said: Said | None = None) -> "Message":
        """Return an answer, with the tokens of a model that said it."""
        return cls("assistant", (TextPart(text, said),))

    @classmethod
    def from_placeholders(
        cls,
        role: str,
        text: str,
        sources: Sequence[object],
        *,
        placeholder: str = "<image>",
        media: Mapping[str, Sequence[object]] | None = None,
    ) -> "Message":
        """Return a message that a program wrote with `placeholder` where each source goes.

        The text is kept character by character. In `parts` a line break after a leading
        placeholder is left out, as a template writes it there.

        Args:
            role: who speaks.
            text: with the placeholders.
            sources: pictures.
            placeholder: of a picture.
            media: sources of other modalities by name, each for a `<name>` of its own in the text.

        Raises:
            MediaCountMismatchError: another number of placeholders than of sources.
            PromptError: sources that are no list.
        """
        given = {placeholder: [MediaPart(source) for source in sources]}
        for name, others in (media or {}).items():
            if isinstance(others, str) or not hasattr(others, "__len__"):
                raise PromptError(
                    f"media[{name!r}] is {shown(others)}: expected a list, with a source for each "
                    f"<{name}> in the text"
                )
            given[f"<{name}>"] = [MediaPart(source, name) for source in others]
        for mark, waiting in given.items():
            if text.count(mark) != len(waiting):
                raise MediaCountMismatchError(
                    f"the text has {text.count(mark)} {mark} but {len(waiting)} sources were "
                    "given: give one source for each placeholder"
                )
        first, *rest = re.split(f"({'|'.join(map(re.escape, given))})", text)
        pieces = [first, *rest[1::2]]
        parts: list[Part] = [TextPart(pieces[0])] if pieces[0] else []
        leads = not parts  # no text stands before
        for mark, piece in zip(rest[::2], pieces[1:], strict=True):
            parts.append(given[mark].pop(0))
            said = piece.removeprefix("\n") if leads else piece
            if said:
                parts.append(TextPart(said))
                leads = False
        return cls(role, tuple(parts), tuple(pieces) if len(pieces) > 1 else None)


def check_text(text: object) -> None:
    """Refuse what nobody can have typed.

    Raises:
        PromptError: something else than text.
    """
    if not isinstance(text, str):
        raise PromptError(f"a message must be text, a string, got {shown(text)}")


def check_conversation(messages: object) -> None:
    """Refuse what is no conversation.

    Raises:
        PromptError: something else than a list of at least one Message.
    """
    if not messages:
        raise PromptError("the conversation is empty: give at least one message of the user")
    if not isinstance(messages, Sequence) or not all(isinstance(one, Message) for one in messages):
        raise PromptError(f"a conversation must be a list of Message, got {shown(messages)}")


def questions_of(given: Iterable[str | tuple[object, ...] | Message]) -> list[Message]:
    """Return the message of each question: a text, a tuple of a text and pictures, or a Message.

    Raises:
        PromptError: something else; one text alone, too.
    """
    found = []
    for one in several(given):
        if isinstance(one, Message):
            found.append(one)
            continue
        parts = one if isinstance(one, tuple | list) else (one,)
        text, *pictures = parts or (None,)
        if not isinstance(text, str):
            raise PromptError(
                f"a question must be a text, or a tuple of a text and pictures, got {shown(one)}"
            )
        found.append(Message.user(text, *pictures))
    return found


def several(given: Iterable[T]) -> Iterable[T]:
    """Return what was given.

    Raises:
        PromptError: one text, or anything else that is no list.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise PromptError(f"expected a list, one item for each answer, got {shown(given)}")
    return given


def joined(messages: Iterable[Message]) -> list[Message]:
    """Return a conversation as templates know it.

    Instructions that come later join those at the beginning, and neighbouring messages of one
    speaker are one message, as are neighbouring texts in it.

    Raises:
        PromptError: a medium among the instructions.
    """
    instructions: list[str] = []
    turns: list[tuple[str, list[Part]]] = []
    for message in messages:
        if message.role == "system":
            if message.media:
                raise PromptError(
                    "the instructions hold a picture: show it in a message of the user"
                )
            instructions += [part.text for part in message.parts if isinstance(part, TextPart)]
        elif turns and turns[-1][0] == message.role:
            turns[-1][1].extend([TextPart("\n"), *message.parts])
        else:
            turns.append((message.role, list(message.parts)))
    system = [Message.system("\n\n".join(instructions))] if instructions else []
    return system + [Message(role, _whole_texts(parts)) for role, parts in turns]


def _whole_texts(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return parts with neighbouring texts as one."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, TextPart) and found and isinstance(last := found[-1], TextPart):
            found[-1] = TextPart(last.text + part.text)
        else:
            found.append(part)
    return tuple(found)

"""Sample: one conversation to learn from, made of a record of any known format; opens nothing.

A text of a list of turns holds one "<image>" for every picture that the record lists; in a table
the pictures come first. So it is with the modalities that a checkpoint declares: what the key
"user" of a record holds stands where its turns say "<user>", a list with one for each place if
there are several.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lapilli.config.reader import shown
from lapilli.errors import DataError, LapilliError, MediaCountMismatchError
from lapilli.prompt.message import MediaPart, Message, Part, Role, TextPart
from lapilli.train.data.formats import (
    MEDIA_KEYS,
    MOST_LETTERS,
    NOTED,
    PLACEHOLDER,
    SYSTEM_KEYS,
    TEXT_PARTS,
    Record,
    Turn,
    as_list,
    check_keys,
    count_words,
    empty_pictures,
    first_of,
    id_of,
    listed_media,
    source_of,
    turns_key,
    turns_of,
)
from lapilli.train.recipe import Placement

Resolve = Callable[[object], object]


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation to learn from.

    Attributes:
        id: how the data names it; its place, where the data gives it no name.
        messages: turns with their media in place; a medium's source is what media/fetch takes.
        where: "file:line" or the like, for messages.
        words: of all turns as the data has them; a placeholder is one too.
        notes: what is odd about it and was mended.
    """

    id: str
    messages: tuple[Message, ...]
    where: str
    words: int = 0
    notes: tuple[str, ...] = ()

    @property
    def media(self) -> tuple[MediaPart, ...]:
        """Return the media of all turns, in order."""
        return tuple(part for message in self.messages for part in message.media)

    @property
    def label(self) -> str:
        """Return place and id, as messages about the sample begin."""
        return self.where if self.id == self.where else f"{self.where} (id {shown(self.id)})"

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Raise what goes wrong inside as a DataError that begins with the label."""
        try:
            yield
        except LapilliError as error:
            raise DataError(f"{self.label}: {error}") from error


def to_sample(
    record: object,
    *,
    where: str,
    placement: Placement = "front",
    resolve: Resolve | None = None,
    modalities: Sequence[str] = (),
) -> Sample:
    """Return the sample of a record of any known format.

    Args:
        record: of any of the formats.
        where: its place, for messages.
        placement: of the media of a turn.
        resolve: makes of what the record calls a picture something that media/fetch takes.
        modalities: names of the modalities that the checkpoint declares, whose keys are read.

    Raises:
        DataError: no known format, an unknown role, or another number of media than of places.

    Source: LLaVA train.py, preprocess_multimodal (placement) and preprocess_v1 (an answer that
        stands first is dropped).
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where} holds a {type(record).__name__}: expected an object")
    sample = Sample(id_of(record, where=where), (), where)
    try:
        turns = turns_of(record, modalities)
        words = count_words(turns)
        turns, notes = _shown_once(turns, record) if placement == "front" else (turns, ())
        messages = _messages(record, turns, modalities)
        messages, odd = _from_first_question(messages)
        resolve = resolve or (lambda source: source)
        shown = tuple(_place(_resolved(message, resolve), placement) for message in messages)
    except DataError as reason:
        raise DataError(f"{sample.label}: {reason}") from reason
    if not any(message.media for message in shown):
        notes += empty_pictures(record)
    unread = [key for key in NOTED if record.get(key) and key not in modalities]
    notes = (*notes, *odd, *(f"its {key!r} is not read" for key in unread))
    return replace(sample, messages=shown, words=words, notes=notes)


def _messages(record: Record, turns: list[Turn], modalities: Sequence[str]) -> list[Message]:
    one, several = (record.get(key) for key in MEDIA_KEYS)
    if one and several and as_list(one) != as_list(several):
        raise DataError("its 'image' and its 'images' are not the same: keep one of the keys")
    pictures = _Media(listed_media(record), _declared_media(record, turns, modalities))
    messages = [pictures.message(role, content) for role, content in turns]
    if turns_key(record) is None and PLACEHOLDER not in str(record.get("question") or ""):
        messages = [replace(message, written=None) for message in messages]  # a table's own words
    if pictures.used != len(pictures.names):
        raise DataError(
            f"{len(pictures.names)} images but {pictures.used} {PLACEHOLDER} placeholders: write "
            "one for each image"
        )
    _check_length("turns have", sum(len(message.text) for message in messages))
    for number, message in enumerate(messages):
        _check_unicode(f"turn {number}", message.text)
    for name, waiting in pictures.others.items():
        if waiting:
            raise DataError(f"its {name!r} has no place: write <{name}> where it belongs")
    shows = any(part.modality == "image" for message in messages for part in message.media)
    check_keys(record, shows=shows, modalities=modalities)
    return [*_system(record, messages), *messages]


def _check_length(what: str, letters: int) -> None:
    if letters > MOST_LETTERS:
        raise DataError(f"its {what} {letters} letters, at most {MOST_LETTERS} are read")


def _check_unicode(what: str, text: str) -> None:
    """Refuse half of a pair that stands for one character: JSON can hold it, tokenizers cannot."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{what} has half of a character (a lone surrogate)")


def _system(record: Record, messages: Sequence[Message]) -> list[Message]:
    """Return the record's own instructions, which stand in no turn, as a message; [] for none."""
    key = first_of(record, SYSTEM_KEYS) or "system"
    system = record.get(key) or ""
    if not isinstance(system, str):
        raise DataError(f"its {key} is a {type(system).__name__}: expected a text")
    _check_length(f"{key} has", len(system))
    _check_unicode(f"its {key}", system)
    other = next((k for k in SYSTEM_KEYS if record.get(k) and record[k] != system), None)
    if other is not None:
        raise DataError(f"its {key!r} and its {other!r} are not the same: keep one of the keys")
    if not system:
        return []
    if messages and messages[0].role == "system":
        if messages[0].text == system:
            return []
        raise DataError(f"its {key!r} and its first turn are two systems: keep one of them")
    return [Message.system(system)]


def _from_first_question(messages: list[Message]) -> tuple[list[Message], tuple[str, ...]]:
    """Return the turns from the first question on, and notes on what was left out.

    Source: LLaVA train.py, preprocess_v1 and its siblings.
    """
    start = sum(message.role == "system" for message in messages[:1])
    notes: tuple[str, ...] = ()
    if [message.role for message in messages[start : start + 1]] == ["assistant"]:
        if messages[start].media:
            raise DataError("the first turn is an answer with an image: only the user shows any")
        messages = messages[:start] + messages[start + 1 :]
        notes = ("the first turn is an answer, which is left out",)
    if len(messages) == start:
        raise DataError("it has no turns")
    if len(messages) > start + 1 and messages[-1].role == "user":
        notes = (*notes, "the last turn has no answer")
    return messages, notes


def _shown_once(turns: list[Turn], record: Record) -> tuple[list[Turn], tuple[str, ...]]:
    """Leave out all but one of the places of a picture that a turn names more than once.

    Source: LLaVA train.py, preprocess_multimodal.
    """
    places = [
        (number, content.count(PLACEHOLDER))
        for number, (_, content) in enumerate(turns)
        if isinstance(content, str) and PLACEHOLDER in content
    ]
    if len(listed_media(record)) != 1 or len(places) != 1 or places[0][1] == 1:
        return turns, ()
    number, count = places[0]
    role, content = turns[number]
    mended = str(content).replace(PLACEHOLDER, "", count - 1)
    note = f"turn {number} has {count} {PLACEHOLDER} for 1 image, which is shown once"
    return [*turns[:number], (role, mended), *turns[number + 1 :]], (note,)


def _declared_media(
    record: Record, turns: Sequence[Turn], modalities: Sequence[str]
) -> dict[str, list[object]]:
    """Return what the record gives for every declared modality, one for each of its places."""
    found: dict[str, list[object]] = {}
    for name in modalities:
        value, mark = record.get(name), f"<{name}>"
        places = sum(text.count(mark) for _, text in turns if isinstance(text, str))
        if value is None:
            if places:
                raise DataError(f"{mark} stands in its turns, and it has no {name!r}: add the key")
            found[name] = []
        elif places < 2:
            found[name] = [value]
        elif isinstance(value, list | tuple) and len(value) == places:
            found[name] = list(value)
        else:
            number = len(value) if isinstance(value, list | tuple) else 1
            raise DataError(
                f"{mark} stands in its turns {places} times, and its {name!r} holds {number}: give "
                "a list with one for each place"
            )
    return found


@dataclass(slots=True)
class _Media:
    """The record's pictures, handed out in order, and its media of declared modalities."""

    names: list[object]
    others: dict[str, list[object]]
    used: int = 0

    def message(self, role: Role, content: str | list[Any]) -> Message:
        if isinstance(content, str):
            return self._from_text(role, content)
        parts = [self._part(part) for part in content if part is not None]
        return Message(role, tuple(part for part in parts if part != TextPart("")))

    def _from_text(self, role: Role, text: str) -> Message:
        number = text.count(PLACEHOLDER)
        given = self.names[self.used : self.used + number]
        self.used += number
        media: dict[str, list[object]] = {}
        for name, waiting in self.others.items():
            count = text.count(f"<{name}>")
            media[name], self.others[name] = waiting[:count], waiting[count:]
        try:
            return Message.from_placeholders(role, text, given, media=media)
        except MediaCountMismatchError as error:
            raise DataError(
                f"{len(self.names)} images but at least {self.used} {PLACEHOLDER} placeholders: "
                "list one image for each"
            ) from error

    def _part(self, part: object) -> Part:
        if isinstance(part, str):
            return TextPart(part)
        if not isinstance(part, Mapping):
            raise DataError(f"a part is a {type(part).__name__}: expected an object")
        kind = part.get("type")
        if kind in TEXT_PARTS:
            return TextPart(str(part.get("text") or ""))
        if kind in ("image", "image_url", "input_image"):
            return MediaPart(self._source(part))
        if isinstance(kind, str) and kind in self.others:
            return MediaPart(self._other(kind, part), kind)
        expected = ", ".join(("text", "image", "image_url", *self.others))
        expected = " or ".join(expected.rsplit(", ", 1))
        raise DataError(f"a part has the type {shown(kind)}: expected {expected}")

    def _other(self, name: str, part: Mapping[str, Any]) -> object:
        """Return the medium of a part: its own, or the record's where it has none."""
        if part.get(name) is not None:
            return part[name]
        if not self.others[name]:
            raise DataError(f"a part of the type {name!r} has no {name!r}: add the key to it")
        return self.others[name].pop(0)

    def _source(self, part: Mapping[str, Any]) -> object:
        own = source_of(part)
        if own is not None:
            return own
        self.used += 1  # an empty place: the record lists the picture
        if self.used > len(self.names):
            raise DataError(
                f"{len(self.names)} images but at least {self.used} parts without a picture of "
                "their own"
            )
        return self.names[self.used - 1]


def _resolved(message: Message, resolve: Resolve) -> Message:
    if not message.media:
        return message
    parts = [
        replace(part, source=resolve(part.source))
        if isinstance(part, MediaPart) and part.modality == "image"
        else part
        for part in message.parts
    ]
    return replace(message, parts=tuple(parts))


def _place(message: Message, placement: Placement) -> Message:
    """Move pictures to the front, and strip white space around the text, as the original does.

    The original knows turns with one picture. Several that stand in front already are left as they
    are written, and others are laid as in a question about pictures.
    """
    if placement == "written" or not message.media:
        return message
    text = message.text.strip()
    if message.written is not None:
        if len(message.media) > 1 and not "".join(message.written[:-1]).strip():
            return message
        if len(message.media) == 1 and not text:
            return replace(message, written=("", ""))
    return Message(message.role, (*message.media, *([TextPart(text)] if text else [])))

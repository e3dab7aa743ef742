"""One conversation to learn from; knows messages, no files and no numbers."""

from dataclasses import dataclass

from lapilli.config.reader import shown
from lapilli.prompt.message import MediaPart, Message


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
        """The media of all turns in order."""
        return tuple(part for message in self.messages for part in message.media)

    @property
    def label(self) -> str:
        """Place and id, as messages about the sample begin."""
        return self.where if self.id == self.where else f"{self.where} (id {shown(self.id)})"

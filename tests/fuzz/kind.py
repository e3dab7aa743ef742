"""One row of the table of what is fuzzed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lapilli.errors import CheckpointError
from tests.fuzz import honest, readers
from tests.fuzz.damage import Damage


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file.

    Args:
        make: writes the honest folder; rows with the same maker share it.
        file: what is damaged, relative to the folder.
        damages: of its content; one is drawn for every case. What stands in its place (nothing, a
            directory, a FIFO, a device, ...) is changed in some cases too.
        read: what a user does with the folder.
        errors: what it may end with, besides normally.
        share: of the cases, relative to the other rows.
    """

    make: Callable[[Path], None]
    file: str
    damages: tuple[Damage, ...]
    read: Callable[[Path], None] = readers.load_and_ask
    errors: tuple[type[Exception], ...] = (CheckpointError,)
    share: int = 1

    @property
    def name(self) -> str:
        """For messages and for the seed of a case."""
        return f"{honest.name_of(self.make)}/{self.file}"

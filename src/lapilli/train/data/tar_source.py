"""Tar shards in WebDataset's naming, read by seeking: KEY.json | KEY.txt beside KEY.jpg, KEY.1.png.

read once:  headers  ->  key -> {extension: place in the file}
record(i):  KEY.json decoded (or KEY.txt as the caption of KEY's picture)
media(i):   a place in the file, read when it is fetched
"""

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lapilli.errors import DataError
from lapilli.train.data.formats import listed_media, names_pictures_in_turns
from lapilli.train.data.pictures import is_file_name, picture_of
from lapilli.train.data.strict_json import decode

_IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"})
_LISTED = 8  # members that a message names


@dataclass(slots=True)
class Member:
    """A stretch of a shard; looks like an open file to media/fetch."""

    shard: Path
    name: str
    start: int
    size: int
    position: int = 0

    def read(self, size: int = -1, /) -> bytes:
        """Return the next `size` bytes, all that are left where it is negative."""
        left = self.size - self.position
        with self.shard.open("rb") as file:
            file.seek(self.start + self.position)
            data = file.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data

    def content(self) -> bytes:
        """Return all of it, wherever the reading stands."""
        return replace(self, position=0).read()


class TarSource:
    """The samples of one shard, in its order.

    Raises:
        DataError: no tar archive, a compressed one, one that ends in the middle, or one with two
            members of one name.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._members: dict[str, dict[str, Member]] = {}
        self._read_headers()
        self._keys = list(self._members)

    def _read_headers(self) -> None:
        size = self._path.stat().st_size
        try:
            with tarfile.open(self._path, "r:") as shard:
                for info in shard:
                    if info.isreg():
                        self._add(info, size)
        except tarfile.TarError as error:
            raise DataError(f"{self._path} is no whole tar archive: {error}") from error

    def _add(self, info: tarfile.TarInfo, file_size: int) -> None:
        if info.offset_data + info.size > file_size:
            raise DataError(f"{self._path} was cut off in the middle of {info.name}")
        folder, slash, file = info.name.rpartition("/")
        stem, _, extension = file.partition(".")
        if not stem:
            return  # hidden files, as macOS packs them
        inside = self._members.setdefault(f"{folder}{slash}{stem}", {})
        member = Member(self._path, info.name, info.offset_data, info.size)
        first = inside.setdefault(extension.lower(), member)
        if first is not member:
            raise DataError(
                f"{self._path} has two members of one name, {first.name!r} and {info.name!r}: "
                "delete the wrong one"
            )

    def __len__(self) -> int:
        return len(self._keys)

    def where(self, index: int) -> str:
        """See Source; a shard has keys instead of lines."""
        return f"{self._path}:{self._keys[index]}"

    def record(self, index: int) -> Any:  # noqa: ANN401 - see Source
        """See Source."""
        members = self._members[self._keys[index]]
        if "json" in members:
            record = decode(members["json"].content(), self.where(index))
            if "txt" not in members or _has_turns(record):
                return self._with_pictures(record, index)
        if "txt" in members:
            return self._captioned(members["txt"], index)
        raise DataError(
            f"{self.where(index)} has no member .json or .txt, only {self._listed(index)}"
        )

    def _listed(self, index: int) -> str:
        """Members of a sample for messages: a dot in a name puts many under one key."""
        names = list(self._members[self._keys[index]])
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        return ", ".join(names[:_LISTED]) + more

    def _pictures(self, index: int) -> list[str]:
        members = self._members[self._keys[index]]
        return [name for name in members if name.rpartition(".")[2] in _IMAGES]

    def _with_pictures(self, record: object, index: int) -> object:
        """The record with its members as pictures, where it names none or names them otherwise."""
        if not isinstance(record, Mapping):
            return record
        if record.get("id") is None:
            record = {**record, "id": self._keys[index]}
        own, named = self._pictures(index), listed_media(record)
        if named and (len(named) != len(own) or any(self._find(index, name) for name in named)):
            return record
        if not own or names_pictures_in_turns(record):
            return record
        return {**record, "image": own, "images": None}

    def _captioned(self, member: Member, index: int) -> dict[str, Any]:
        own = self._pictures(index)
        try:
            caption = member.content().decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(index)}: {member.name} is no UTF-8: {error}") from error
        return {"id": self._keys[index], "image": own, "caption": caption}

    def _find(self, index: int, name: object) -> Member | None:
        """A member by its extension or by its name; None where `name` is no name."""
        if not isinstance(name, str):
            return None
        own = self._members[self._keys[index]]
        if name.lower() in own:
            return own[name.lower()]
        folder, slash, file = name.removeprefix("./").rpartition("/")
        stem, _, extension = file.partition(".")
        return self._members.get(f"{folder}{slash}{stem}", {}).get(extension.lower())

    def media(self, index: int, name: object) -> object:
        """See Source."""
        found = self._find(index, name)
        if found is not None:
            return replace(found, position=0)  # each reader begins at its start
        picture = picture_of(name)
        if not is_file_name(picture):
            return picture
        raise DataError(f"the shard has no member {name!r}; this sample has {self._listed(index)}")


def _has_turns(record: object) -> bool:
    return isinstance(record, Mapping) and bool({"conversations", "messages"} & set(record))

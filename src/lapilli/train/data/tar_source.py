"""Tar shards in WebDataset's naming, read by seeking: KEY.json | KEY.txt beside KEY.jpg, KEY.1.png.

read once:  headers  ->  key -> {extension: place in the file}
record(i):  KEY.json decoded (or KEY.txt as the caption of KEY's picture)
media(i):   a place in the file, read when it is fetched
"""

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.errors import DataError
from lapilli.train.data.formats import listed_media
from lapilli.train.data.pictures import is_file_name, picture_of

_IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"})


@dataclass(frozen=True, slots=True)
class Member:
    """A stretch of a shard; looks like an open file to media/fetch."""

    shard: Path
    name: str
    start: int
    size: int

    def read(self, size: int = -1, /) -> bytes:
        """The first `size` bytes."""
        with self.shard.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size if size < 0 else min(size, self.size))


class TarSource:
    """The samples of one shard, in its order.

    Raises:
        DataError: no tar archive, a compressed one, or one that ends in the middle.
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
            raise DataError(
                f"{self._path} is no whole tar archive: {error} (a compressed one must be unpacked "
                "first: samples are read by seeking)"
            ) from error

    def _add(self, info: tarfile.TarInfo, file_size: int) -> None:
        if info.offset_data + info.size > file_size:
            raise DataError(f"{self._path} was cut off in the middle of {info.name}")
        folder, slash, file = info.name.rpartition("/")
        stem, _, extension = file.partition(".")
        if not stem:
            return  # hidden files, as macOS packs them
        inside = self._members.setdefault(f"{folder}{slash}{stem}", {})
        inside[extension.lower()] = Member(self._path, info.name, info.offset_data, info.size)

    def __len__(self) -> int:
        return len(self._keys)

    def where(self, index: int) -> str:
        """See Source; a shard has keys instead of lines."""
        return f"{self._path}:{self._keys[index]}"

    def record(self, index: int) -> Any:  # noqa: ANN401 - see Source
        """See Source."""
        members = self._members[self._keys[index]]
        if "json" in members:
            record = self._decoded(members["json"], index)
            if "txt" not in members or _has_turns(record):
                return self._with_pictures(record, index)
        if "txt" in members:
            return self._captioned(members["txt"], index)
        raise DataError(
            f"{self.where(index)} has no member .json or .txt, only {', '.join(members)}"
        )

    def _decoded(self, member: Member, index: int) -> Any:  # noqa: ANN401 - see Source
        try:
            return json.loads(member.read())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where(index)}: no valid JSON: {error}") from error

    def _pictures(self, index: int) -> list[str]:
        members = self._members[self._keys[index]]
        return [name for name in members if name.rpartition(".")[2] in _IMAGES]

    def _with_pictures(self, record: object, index: int) -> object:
        """The record with its members as pictures, where it names none or names them otherwise."""
        if not isinstance(record, Mapping):
            return record
        if record.get("id") is None:
            record = {**record, "id": self._keys[index]}
        own = self._pictures(index)
        named = listed_media(record)
        if named and (len(named) != len(own) or any(self._find(index, name) for name in named)):
            return record
        return {**record, "image": own} if own else record

    def _captioned(self, member: Member, index: int) -> dict[str, Any]:
        own = self._pictures(index)
        caption = member.read().decode("utf-8", "replace").strip()
        turns = [
            {"from": "human", "value": "<image>" * len(own)},
            {"from": "gpt", "value": caption},
        ]
        return {"id": self._keys[index], "image": own, "conversations": turns}

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
            return found
        try:
            picture = picture_of(name)
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}") from error
        if not is_file_name(picture):
            return picture
        raise DataError(
            f"{self.where(index)}: the shard has no member {name!r}; this sample has "
            f"{', '.join(self._members[self._keys[index]])}"
        )


def _has_turns(record: object) -> bool:
    return isinstance(record, Mapping) and bool({"conversations", "messages"} & set(record))

"""Tar source: shards in WebDataset's naming, KEY.json | KEY.txt beside KEY.jpg, KEY.1.png.

read once:  headers  ->  key -> {extension: place in the file}
record(i):  KEY.json decoded (or KEY.txt as the caption of KEY's picture)
media(i):   a place in the file, read by seeking when it is fetched
links:      hard and symbolic ones are the member of this archive that they lead to
"""

import posixpath
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lapilli.config.reader import shown
from lapilli.errors import DataError
from lapilli.train.data.formats import listed_media, names_pictures_in_turns, turns_key
from lapilli.train.data.source import (
    MOST_BYTES,
    decode,
    is_file_name,
    listed,
    picture_of,
    too_large,
)

_IMAGES = frozenset(
    {
        *(
            "apng",
            "avif",
            "avifs",
            "bmp",
            "cur",
            "dds",
            "dib",
            "gif",
            "heic",
            "heif",
            "icns",
            "ico",
        ),
        *(
            "im",
            "j2c",
            "j2k",
            "jfif",
            "jp2",
            "jpc",
            "jpe",
            "jpeg",
            "jpf",
            "jpg",
            "jpx",
            "pbm",
            "pcx",
        ),
        *("pfm", "pgm", "png", "pnm", "ppm", "psd", "qoi", "ras", "sgi", "tga", "tif", "tiff"),
        *("webp", "xbm", "xpm"),
    }
)
_BESIDE = frozenset({tarfile.DIRTYPE, b"D", b"V"})  # folders, as GNU lists them too, and a label
_MOST_LINKS = 40  # that lead to each other, as in Linux
_LOOKED_AT = 512  # bytes that tell text from anything else
_LISTED = 8  # members that a message names
_LONGEST_NAME = 1000
_BLOCK = tarfile.BLOCKSIZE
_EXTENDED = frozenset(
    {
        *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_SPARSE),
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    }
)
# ValueError and its neighbours: numbers of a header; RecursionError: headers of headers.
_BROKEN = (
    *(tarfile.TarError, OSError, ValueError, OverflowError, IndexError, RecursionError),
    MemoryError,
)
_MOST_EXTENDED = 1 << 16  # bytes of a header of long names and more


@dataclass(slots=True, unsafe_hash=True)
class Member:
    """A member of a shard; looks like an open file to media/fetch.

    Two are the same where they are the same bytes, wherever the reading stands.
    """

    shard: Path
    name: str
    start: int
    size: int
    position: int = field(default=0, compare=False)

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


class _Header(tarfile.TarInfo):
    """A header that is looked at before tarfile follows what it says of the next one."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_Header":
        """Return the next member.

        Raises:
            DataError: it was packed with holes left out, or what is said about it is too long.
        """
        file = tarfile.fileobj
        if file is not None:
            start = file.tell()
            cls._look(file, tarfile.name)
            file.seek(start)
        return super().fromtarfile(tarfile)

    @classmethod
    def _look(cls, file: Any, name: object) -> None:  # noqa: ANN401 - what tarfile opened
        block = file.read(_BLOCK)
        kind = block[156:157]
        if kind not in _EXTENDED:
            return
        size = cls.frombuf(block, tarfile.ENCODING, "surrogateescape").size
        text = file.read(size) if 0 <= size <= _MOST_EXTENDED else b""
        if kind == tarfile.GNUTYPE_SPARSE or b"GNU.sparse." in text:
            raise DataError(
                f"{name} holds a file with its holes left out: pack it again without --sparse"
            )
        # tarfile searches digits in a time that grows with the square of their number.
        if not 0 <= size <= _MOST_EXTENDED or re.search(rb"\d{1000}", text):
            raise DataError(f"{name} is no whole tar archive: a header of {size} bytes")


class TarSource:
    """The samples of one shard, in its order.

    Raises:
        DataError: no tar archive, a compressed, sparse or damaged one, one that ends in the middle,
            or one with two members of one name.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._members: dict[str, dict[str, Member]] = {}
        self._lost: dict[str, str] = {}  # by key: a member that cannot be read, and why
        self._read_headers()
        self._keys = list(self._members)

    def _read_headers(self) -> None:
        try:
            with tarfile.open(self._path, "r:", tarinfo=_Header) as shard:
                end = self._add_all(shard)
        except DataError:
            raise
        except _BROKEN as error:
            raise DataError(f"{self._path} is no whole tar archive: {error}") from error
        self._check_end(end)

    def _add_all(self, shard: tarfile.TarFile) -> int:
        """Add the files of a shard; return where the last one ends."""
        size, end = self._path.stat().st_size, 0
        for info in shard:
            if info.size < 0 or info.offset < end:  # else the same headers come again for ever
                raise DataError(f"{self._path} is no whole tar archive: a member has no size")
            end = info.offset_data
            if info.isreg():
                self._check_member(info, size)
            if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES:
                end += -(-info.size // _BLOCK) * _BLOCK
        links = _Links(shard.getmembers())
        for info in shard.getmembers():
            if info.type not in _BESIDE and not links.is_folder(info):
                self._add(info, links.follow(info))
        return end

    def _check_end(self, end: int) -> None:
        """Refuse a shard whose next header is damaged: tarfile takes that for the end."""
        with self._path.open("rb") as file:
            file.seek(end)
            block = file.read(_BLOCK)
        if block.strip(b"\0"):
            raise DataError(
                f"{self._path} is no whole tar archive: the header at byte {end} is damaged"
            )

    def _check_member(self, info: tarfile.TarInfo, file_size: int) -> None:
        if info.offset_data + info.size > file_size:
            raise DataError(f"{self._path} was cut off in the middle of {shown(info.name)[1:-1]}")
        if len(info.name) > _LONGEST_NAME:
            raise DataError(f"{self._path}: a member's name has {len(info.name)} letters")

    def _add(self, info: tarfile.TarInfo, found: "tarfile.TarInfo | str") -> None:
        """Add a member; `found` is the file that it leads to, or why there is none."""
        folder, slash, file = info.name.rpartition("/")
        stem, _, extension = file.partition(".")
        if not stem:
            return  # hidden files, as macOS packs them
        key = f"{folder}{slash}{stem}"
        inside = self._members.setdefault(key, {})
        if isinstance(found, str):
            self._lost.setdefault(key, f"its member {shown(info.name[:_LONGEST_NAME])} {found}")
            return
        member = Member(self._path, info.name, found.offset_data, found.size)
        first = inside.setdefault(extension.lower(), member)
        is_same = first.start == member.start and first.name == member.name
        if first is not member and not (info is not found and is_same):  # the same file given twice
            raise DataError(
                f"{self._path} has two members of one name, {shown(first.name)} and "
                f"{shown(info.name)}: delete the wrong one"
            )

    def __len__(self) -> int:
        return len(self._keys)

    def where(self, index: int) -> str:
        """See Source; a shard has keys instead of lines."""
        return f"{self._path}:{self._keys[index]}"

    def record(self, index: int) -> Any:  # noqa: ANN401 - see Source
        """See Source."""
        if lost := self._lost.get(self._keys[index]):
            raise DataError(f"{self.where(index)}: {lost}")
        members = self._members[self._keys[index]]
        if "json" in members:
            record = decode(self._text(members["json"], index), self.where(index))
            if "txt" not in members or (
                isinstance(record, Mapping) and turns_key(record) is not None
            ):
                return self._with_pictures(record, index)
        if "txt" in members:
            return self._captioned(members["txt"], index)
        raise DataError(
            f"{self.where(index)} has no member .json or .txt, only {self._listed(index)}"
        )

    def _listed(self, index: int) -> str:
        """Return the first members of a sample: a dot in a name puts many under one key."""
        return listed(list(self._members[self._keys[index]]), _LISTED)

    def _pictures(self, index: int) -> list[str]:
        members = self._members[self._keys[index]]
        return [name for name in members if name.rpartition(".")[2] in _IMAGES]

    def _with_pictures(self, record: object, index: int) -> object:
        """Add the members that are pictures to a record that names none, or otherwise."""
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
            caption = self._text(member, index).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.where(index)}: {shown(member.name)[1:-1]} is no UTF-8: {error}"
            ) from error
        return {"id": self._keys[index], "image": own, "caption": caption}

    def _text(self, member: Member, index: int) -> bytes:
        if member.size > MOST_BYTES:
            raise too_large(self.where(index))
        return member.content()

    def _find(self, index: int, name: object) -> Member | None:
        """Return a member by its extension or by its name; None where `name` is no name."""
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
        raise DataError(
            f"the shard has no member {shown(name)}; this sample has {self._listed(index)}"
        )

    def notes(self, index: int, pictures: Sequence[object]) -> tuple[str, ...]:
        """See Source; says which members nothing reads."""
        members = self._members[self._keys[index]]
        used = {picture for picture in pictures if isinstance(picture, Member)}
        left = {
            name: member
            for name, member in members.items()
            if name not in ("json", "txt") and member not in used
        }
        if not pictures and (other := next(filter(_is_data, left.values()), None)):
            raise DataError(
                f"it would be learned without a picture, and its member {shown(other.name)} is not "
                "read: give it the ending of its format (.jpg, .png, ...), or take it out"
            )
        alone = "no picture stands beside its .txt: it is learned without one"
        return (
            *(f"its member {shown(member.name)} is not read" for member in left.values()),
            *([alone] if not pictures and "json" not in members else []),
        )


def _is_data(member: Member) -> bool:
    """Return whether a member may be a picture or a recording: no plain text, but for drawings."""
    start = replace(member, position=0).read(_LOOKED_AT)
    text = start.decode("utf-8", "replace").rstrip("\ufffd")  # a character may be cut at the end
    return "\ufffd" in text or "\0" in text or text.lstrip().startswith("<")


class _Links:
    """The links of an archive, and what they lead to."""

    def __init__(self, members: list[tarfile.TarInfo]) -> None:
        self._files: dict[str, tarfile.TarInfo] = {}
        for info in members:
            if info.type not in _BESIDE:
                self._files.setdefault(posixpath.normpath(info.name), info)
        self._folders = {posixpath.dirname(name) for name in self._files} | {
            posixpath.normpath(info.name) for info in members if info.isdir()
        }

    def is_folder(self, info: tarfile.TarInfo) -> bool:
        """Return whether a symbolic link leads to a folder of the archive and not to a file."""
        return (
            info.issym()
            and "." not in posixpath.basename(info.name)
            and _target(info) in self._folders
        )

    def follow(self, info: tarfile.TarInfo) -> tarfile.TarInfo | str:
        """Return the file that a member is or leads to, or why there is none."""
        found: tarfile.TarInfo | None = info
        for _ in range(_MOST_LINKS):
            if found is None or found.isreg():
                break
            if not (found.islnk() or found.issym()):
                kind = "a pipe or a device" if found.isdev() else "of a kind that is not read"
                return f"is {kind}: take it out of the archive"
            found = self._files.get(_target(found))
        if found is not None and found.isreg():
            return found
        return (
            f"is a link to {shown(info.linkname[:_LONGEST_NAME])}, which is no file of this "
            "archive: pack it again with --dereference"
        )


def _target(info: tarfile.TarInfo) -> str:
    """Return the name of the member that a link leads to."""
    folder = posixpath.dirname(info.name) if info.issym() else ""
    return posixpath.normpath(posixpath.join(folder, info.linkname))

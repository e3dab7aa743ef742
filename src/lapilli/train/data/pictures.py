"""Pictures that records name: files of a folder, URLs, data URIs, bytes and base64."""

import base64
import binascii
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lapilli.config.reader import shown
from lapilli.errors import DataError, MediaError
from lapilli.media.fetch import Fetched, fetch

LONGEST_NAME = 50
"""Letters of a name in the list of a message."""


def listed(names: Sequence[str], most: int) -> str:
    """Return the first names for a message, long ones cut, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(name[:LONGEST_NAME] for name in names[:most]) or "none") + more


_URL = re.compile(r"(?:https?|data):", re.IGNORECASE)
# How base64 of JPEG, PNG, GIF, WebP, BMP and TIFF begins.
_BASE64 = re.compile(
    r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-9A-Za-z]|SUkq|TU0A)[A-Za-z0-9+/=\s]{60,}"
)
_KEYS = ("bytes", "path", "url")


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """A folder that names of pictures are relative to; URLs and bytes stay as they are."""

    folder: Path

    def find(self, name: object) -> object:
        """Return what media/fetch takes for what a record calls a picture.

        Raises:
            DataError: a picture of an unknown kind, or an empty name.
        """
        picture = picture_of(name)
        return self.folder / str(picture) if is_file_name(picture) else picture


def fetch_picture(source: object) -> Fetched:
    """Fetch the picture of a sample.

    Raises:
        MediaError: it cannot be fetched, or is a pipe or a device; for a file that is not there the
            message says where it is looked for.
    """
    if isinstance(source, Path) and _is_special(source):
        raise MediaError(f"{shown(str(source))} is a pipe or a device: expected a picture file")
    try:
        return fetch(source)
    except MediaError as error:
        if isinstance(source, Path) and isinstance(error.__cause__, FileNotFoundError):
            raise MediaError(
                f"{error}: pictures are looked for beside the data file, or in the folder that "
                "images = ... in the recipe, or --images, names"
            ) from error
        raise


def _is_special(path: Path) -> bool:
    """Return whether a name stands for what may never end; a run would wait for it every time."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # fetch says why
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_file_name(picture: object) -> bool:
    """Return whether it is neither bytes nor a URL or data URI."""
    return isinstance(picture, str) and not _URL.match(picture)


def picture_of(name: object) -> str | bytes:
    """Return the bytes that a record holds, or the file name, URL or data URI.

    Raises:
        DataError: neither bytes nor a name.
    """
    if isinstance(name, Mapping):  # a picture column of Hugging Face's datasets
        given = [name[key] for key in _KEYS if name.get(key) is not None]
        if not given:
            keys = ", ".join(map(shown, list(name)[:8])) or "none"
            raise DataError(
                f"a picture is an object without bytes, path and url: its keys are {keys}"
            )
        name = given[0]
    if isinstance(name, bytes | bytearray | memoryview):
        return bytes(name)
    if not isinstance(name, str) or not name.strip():
        found = shown(name) if isinstance(name, str) or name is None else f"a {type(name).__name__}"
        raise DataError(f"a picture is {found}: expected a file name, a URL, a data URI or bytes")
    if not _BASE64.fullmatch(name, 0, min(len(name), 4096)):
        return name
    try:
        return base64.b64decode(name)
    except binascii.Error as error:
        raise DataError(f"a picture in base64 ({name[:12]}...) is damaged: {error}") from error

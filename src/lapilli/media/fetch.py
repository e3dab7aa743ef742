"""Sources of media: the bytes of a path, a URL, a data URI, a stream or an object in memory.

path, "~/path", file:     read, up to limits.max_bytes
http:// https://          downloaded (media/download.py)
data:...;base64,...       unpacked; base64 alone too, where it begins as a picture does
"-"                       read from the stream that the caller gives
bytes, file-like          read
Pillow image, array       handed on as they are
"""

import base64
import binascii
import io
import os
import re
import select
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lapilli.config.reader import given_path
from lapilli.errors import MediaError, MediaTooLargeError
from lapilli.media.download import FetchLimits, download, url_name

__all__ = ["FetchLimits", "Fetched", "fetch", "is_path"]

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
# How PNG, JPEG, GIF, WebP, BMP, TIFF and AVIF begin in base64, for text that does not say so.
_BASE64 = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-9a-zA-Z]|SUkqA|TU0AK|AAAA[A-Z].Z0eX)")
_SHORTEST_BASE64 = 40  # the smallest GIF has 35 bytes; less is a name
_LONGEST_NAME = 255  # letters between two slashes, on every file system in use
_DEFAULT_LIMITS = FetchLimits()


@runtime_checkable
class Readable(Protocol):
    """An open file, or anything else that can be read from."""

    def read(self, size: int = ..., /) -> Any: ...  # noqa: ANN401 - text streams have it too


@dataclass(frozen=True, slots=True)
class Fetched:
    """A fetched medium and its name in messages."""

    data: bytes | Image.Image | NDArray[Any]
    name: str


def fetch(
    source: object, *, limits: FetchLimits = _DEFAULT_LIMITS, stdin: Readable | None = None
) -> Fetched:
    """Return the bytes of a source, or the image or array that it already is.

    Args:
        source: str, path, bytes, binary file-like, Pillow image or numpy array, see above.
        limits: size for every source, time and redirects for URLs.
        stdin: what "-" stands for, for instance `sys.stdin.buffer`.

    Raises:
        MediaError: nothing there, nothing in it, too much of it, or a kind that is not known.
    """
    if isinstance(source, Image.Image):
        return Fetched(source, getattr(source, "filename", "") or "the picture")
    if isinstance(source, np.ndarray):
        return Fetched(source, "the array")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _checked(bytes(source), "the byte string", limits)
    if isinstance(source, str):
        return _fetch_text(source, limits, stdin)
    if isinstance(source, os.PathLike):
        return _fetch_path(os.fspath(source), limits)
    if isinstance(source, Readable):
        return _fetch_stream(source, str(getattr(source, "name", "the stream")), limits)
    if isinstance(source, list | tuple):
        raise MediaError(
            f"a {type(source).__name__} is no source of a picture: pass several pictures as "
            "separate arguments"
        )
    raise MediaError(
        f"a {type(source).__name__} is no source of a picture: give a path, a URL, a data URI, "
        "bytes, an open file, a Pillow image or a numpy array"
    )


def is_path(source: str) -> bool:
    """Return whether a text names a file: no URL, no data, not standard input."""
    is_elsewhere = source == "-" or source[:5].lower() in ("data:", "file:")
    return not is_elsewhere and not _URL.match(source) and _from_base64(source) is None


def _fetch_text(source: str, limits: FetchLimits, stdin: Readable | None) -> Fetched:
    if source == "-":
        if stdin is None:
            raise MediaError("'-' means standard input, which is not available here: give a path")
        return _fetch_stream(stdin, "standard input", limits)
    if source[:5].lower() == "data:":
        return _fetch_data_uri(source, limits)
    if source[:5].lower() == "file:":
        return _fetch_path(_path_of_url(source), limits)
    if _URL.match(source):
        return _checked(download(source, limits), url_name(source), limits)
    data = _from_base64(source)
    if data is not None and not os.path.lexists(source):
        return _checked(data, f"the base64 text ({len(source)} letters)", limits)
    return _fetch_path(source, limits)


def _path_of_url(url: str) -> str:
    """Return the path in `file:///path`, `file:/path` or `file://localhost/path`."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise MediaError(f"{_short(url)!r} is no URL: {error}") from error
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise MediaError(
            f"{_short(url)} names no file on this machine: write file:///path, or the path alone"
        )
    return url2pathname(parts.path)


def _from_base64(source: str) -> bytes | None:
    """Unpack a picture in base64; None: the text is something else."""
    if len(source) < _SHORTEST_BASE64 or not _BASE64.match(source):
        return None
    packed = "".join(source.split())
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except ValueError:
        return None


def _fetch_path(source: str | bytes, limits: FetchLimits) -> Fetched:
    named = os.fsdecode(source)
    if not named:
        raise MediaError("the path of the picture is empty")
    try:
        path = given_path(named)
        named = str(path) if named.startswith("~") else named
        if path.is_dir():
            raise MediaError(f"{named} is a directory: give a picture file")
        if path.is_file() and path.stat().st_size > limits.max_bytes:
            raise _too_large(named, path.stat().st_size, limits)
        with _opened(path, named, limits) as stream:
            return _fetch_stream(stream, named, limits)
    except FileNotFoundError as error:
        start = "" if path.is_absolute() else f" (from {Path.cwd()})"
        raise MediaError(f"{_short(named)} does not exist{start}") from error
    except OSError as error:
        hint = ""
        if max(map(len, named.split("/"))) > _LONGEST_NAME:
            hint = "; if it is a picture in base64, write data:image/png;base64, before it"
        raise MediaError(f"{_short(named)} cannot be read: {_reason(error)}{hint}") from error
    except ValueError as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{_short(named)!r} is no path: {error}") from error


@contextmanager
def _opened(path: Path, name: str, limits: FetchLimits) -> Iterator[Readable]:
    """Open a file, or a pipe that is waited for no longer than a download."""
    if not stat.S_ISFIFO(path.stat().st_mode) or not hasattr(select, "poll"):
        with path.open("rb") as stream:
            yield stream
        return
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield io.BufferedReader(_Pipe(pipe, name, limits))
    finally:
        os.close(pipe)


class _Pipe(io.RawIOBase):
    """A named pipe, read until its writers are gone or the time is up."""

    def __init__(self, number: int, name: str, limits: FetchLimits) -> None:
        super().__init__()
        self._number = number
        self._name = name
        self._timeout_s = limits.timeout_s
        self._end = time.monotonic() + limits.timeout_s
        self._poll = select.poll()
        self._poll.register(number, select.POLLIN)

    def readable(self) -> bool:
        """Return True, which io asks for."""
        return True

    def readinto(self, into: Any) -> int:  # noqa: ANN401 - a buffer, which 3.11 has no name for
        """Fill a buffer of io with what comes within the time that is left."""
        left = self._end - time.monotonic()
        if left <= 0 or not self._poll.poll(left * 1000):
            raise MediaError(f"{self._name} is a pipe that gave nothing for {self._timeout_s:g} s")
        data = os.read(self._number, len(into))
        into[: len(data)] = data
        return len(data)


def _fetch_stream(stream: Readable, name: str, limits: FetchLimits) -> Fetched:
    try:
        data = _read_all(stream, name, limits.max_bytes + 1)
        if not data and _rewound(stream):
            data = _read_all(stream, name, limits.max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{name} cannot be read: {_reason(error)}") from error
    return _checked(data, name, limits)


def _read_all(stream: Readable, name: str, most: int) -> bytes:
    """Read what is left of a stream; one that is not buffered gives it in pieces."""
    parts, count = [], 0
    while count < most and (part := stream.read(most - count)):
        if isinstance(part, str):
            raise MediaError(f"{name} was opened as text: open it in binary mode ('rb')")
        parts.append(bytes(part))
        count += len(parts[-1])
    return b"".join(parts)


def _rewound(stream: Any) -> bool:  # noqa: ANN401 - not every stream can tell where it stands
    """Go back to the start of a stream that was written or read before; False if there is none."""
    seekable = getattr(stream, "seekable", None)
    if seekable is None or not seekable() or not stream.tell():
        return False
    stream.seek(0)
    return True


def _fetch_data_uri(source: str, limits: FetchLimits) -> Fetched:
    head, comma, body = source[5:].partition(",")
    kind, *options = head.split(";")
    name = f"the data URI ({kind or 'text/plain'})"
    if not comma:
        raise MediaError(f"{name} has no ',' before its data: {_short(source)!r}")
    if len(body) > 4 * limits.max_bytes:  # no encoding takes more than 3 letters for a byte
        raise MediaTooLargeError(
            f"{name} has {len(body)} letters, too many for {limits.max_bytes} bytes"
        )
    data = unquote_to_bytes(body)
    if "base64" in (option.strip().lower() for option in options):
        packed = b"".join(data.split())
        try:
            data = base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
        except binascii.Error as error:
            raise MediaError(f"{name} is not valid base64: {error}") from error
    return _checked(data, name, limits)


def _checked(data: bytes, name: str, limits: FetchLimits) -> Fetched:
    if not data:
        raise MediaError(f"{name} is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise _too_large(name, len(data), limits)
    return Fetched(data, name)


def _too_large(name: str, size: int, limits: FetchLimits) -> MediaTooLargeError:
    return MediaTooLargeError(
        f"{name} has at least {size} bytes, more than the limit of {limits.max_bytes}"
    )


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} letters)"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

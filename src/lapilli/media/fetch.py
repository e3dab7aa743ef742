"""Where a medium's bytes come from: disk, network, memory; knows no picture format.

path, "~/path"            read, up to limits.max_bytes
http:// https://          downloaded (media/download.py)
data:...;base64,...       unpacked
"-"                       read from the stream that the caller gives
bytes, file-like          read
Pillow image, array       handed on as they are
"""

import base64
import binascii
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lapilli.errors import MediaError
from lapilli.media.download import FetchLimits, download, url_name

__all__ = ["FetchLimits", "Fetched", "fetch"]

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_DEFAULT_LIMITS = FetchLimits()


@runtime_checkable
class Readable(Protocol):
    """An open file, or anything else that can be read from."""

    def read(self, size: int = ..., /) -> Any: ...  # noqa: ANN401 - text streams have it too


@dataclass(frozen=True, slots=True)
class Fetched:
    """A medium that is here now, and what to call it in messages."""

    data: bytes | Image.Image | NDArray[Any]
    name: str


def fetch(
    source: object, *, limits: FetchLimits = _DEFAULT_LIMITS, stdin: Readable | None = None
) -> Fetched:
    """The bytes of a source, or the image or array that it already is.

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
    raise MediaError(
        f"a {type(source).__name__} is no source of a picture: give a path, a URL, a data URI, "
        "bytes, an open file, a Pillow image or a numpy array"
    )


def _fetch_text(source: str, limits: FetchLimits, stdin: Readable | None) -> Fetched:
    if source == "-":
        if stdin is None:
            raise MediaError("'-' means standard input, which is not available here: give a path")
        return _fetch_stream(stdin, "standard input", limits)
    if source[:5].lower() == "data:":
        return _fetch_data_uri(source, limits)
    if _URL.match(source):
        return _checked(download(source, limits), url_name(source), limits)
    return _fetch_path(source, limits)


def _fetch_path(source: str | bytes, limits: FetchLimits) -> Fetched:
    named = os.fsdecode(source)
    if not named:
        raise MediaError("the path of the picture is empty")
    try:
        path = Path(named).expanduser()
        if path.is_dir():
            raise MediaError(f"{named} is a directory: give a picture file")
        if path.is_file() and path.stat().st_size > limits.max_bytes:
            raise MediaError(_too_large(named, path.stat().st_size, limits))
        with path.open("rb") as stream:
            return _fetch_stream(stream, named, limits)
    except FileNotFoundError as error:
        raise MediaError(f"{_short(named)} does not exist (from {Path.cwd()})") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: "~" of a user who has no home
        raise MediaError(f"{_short(named)} cannot be read: {_reason(error)}") from error
    except ValueError as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{_short(named)!r} is no path: {error}") from error


def _fetch_stream(stream: Readable, name: str, limits: FetchLimits) -> Fetched:
    data = stream.read(limits.max_bytes + 1)
    if isinstance(data, str):
        raise MediaError(f"{name} was opened as text: open it in binary mode ('rb')")
    return _checked(bytes(data), name, limits)


def _fetch_data_uri(source: str, limits: FetchLimits) -> Fetched:
    head, comma, body = source[5:].partition(",")
    kind, *options = head.split(";")
    name = f"the data URI ({kind or 'text/plain'})"
    if not comma:
        raise MediaError(f"{name} has no ',' before its data: {_short(source)!r}")
    if len(body) > 4 * limits.max_bytes:  # no encoding takes more than 3 letters for a byte
        raise MediaError(f"{name} has {len(body)} letters, too many for {limits.max_bytes} bytes")
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
        raise MediaError(_too_large(name, len(data), limits))
    return Fetched(data, name)


def _too_large(name: str, size: int, limits: FetchLimits) -> str:
    return f"{name} has at least {size} bytes, more than the limit of {limits.max_bytes}"


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} letters)"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

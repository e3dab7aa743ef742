"""Media of requests: what a client names becomes what the model takes, within limits.

    {"image_url": {"url": ...}}    data URI | base64 | http(s) | file: | id of an upload
    {"uuid": ..., "image_url": null}   a picture that this client showed before
    {"image_embeds": ...}          features, as the bytes of a safetensors file
      -> bytes -> decoded, prepared (once per content) -> MediaPart

All of it runs in the server's worker threads, never on the event loop. A stranger's file is never
opened by a path, and never unpickled.
"""

import base64
import binascii
import hashlib
import json
import math
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from lapilli.config.reader import shown
from lapilli.errors import MediaError, MediaTooLargeError
from lapilli.generate.engine.feature_cache import FeatureStats
from lapilli.media.fetch import FetchLimits, fetch
from lapilli.modality.image.decode import to_rgb
from lapilli.modality.image.image import ImageModality
from lapilli.modality.image.pixels import PreparedImage
from lapilli.pipeline import Chat
from lapilli.prompt.guard import check_work
from lapilli.prompt.message import MediaPart
from lapilli.serve.errors import UnknownMediumError, invalid
from lapilli.serve.files import Files
from lapilli.serve.options import ServeOptions
from lapilli.shapes import Float, Tensor

_LONGEST_HEADER: Final = 4096
_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_UUID: Final = 256


Part = str | dict[str, Any]
"""A text, or a picture in OpenAI's form that a worker thread is to open."""


class NamedPart(dict[str, Any]):
    """A picture of another protocol in OpenAI's form, and what its own protocol calls it.

    Args:
        part: the picture.
        name: the client's field, for errors.
        instead: what may be sent in the place of a URL.
        is_base64: its image_url is base64, whatever it looks like.
    """

    def __init__(
        self,
        part: Mapping[str, Any],
        name: str = "image_url",
        instead: str = "a data URI (data:image/png;base64,...)",
        *,
        is_base64: bool = False,
    ) -> None:
        super().__init__(part)
        self.name = name
        self.instead = instead
        self.is_base64 = is_base64


@dataclass(frozen=True, slots=True)
class CachedPicture:
    """A prepared picture and the bytes that it takes."""

    item: PreparedImage
    num_bytes: int


class PictureCache:
    """Pictures that were prepared, by their content, and by what a client calls them.

    Names belong to the owner of a key: nobody sees what another one has shown.

    Args:
        max_bytes: of all of them.
    """

    def __init__(self, max_bytes: int) -> None:
        self.stats = FeatureStats()
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, CachedPicture] = OrderedDict()
        self._names: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> PreparedImage | None:
        """Return the picture of this content, if it is kept."""
        with self._lock:
            found = self._kept.get(digest)
            if found is None:
                self.stats.misses += 1
                return None
            self._kept.move_to_end(digest)
            self.stats.hits += 1
            return found.item

    def put(self, digest: bytes, item: PreparedImage) -> None:
        """Keep a picture; those that were not used for longest go."""
        size = item.pixel_values.nbytes
        with self._lock:
            if size > self._max_bytes or digest in self._kept:
                return
            self._kept[digest] = CachedPicture(item, size)
            self._bytes += size
            while self._bytes > self._max_bytes:
                _, gone = self._kept.popitem(last=False)
                self._bytes -= gone.num_bytes
                self.stats.evictions += 1

    def call(self, owner: str, name: str, digest: bytes) -> None:
        """Remember what a client calls a picture."""
        with self._lock:
            self._names[owner, name] = digest
            self._names.move_to_end((owner, name))
            while len(self._names) > 100_000:
                self._names.popitem(last=False)

    def called(self, owner: str, name: str) -> PreparedImage:
        """Return the picture that a client calls so.

        Raises:
            UnknownMediumError: it is not kept, or never was.
        """
        with self._lock:
            digest = self._names.get((owner, name))
        item = None if digest is None else self.get(digest)
        if item is None:
            raise UnknownMediumError(
                f"no picture with the uuid {name!r} is kept (any more): send its image_url again"
            )
        return item


class MediaReader:
    """Opens the media of requests.

    Args:
        chat: the model, which says how a picture is prepared.
        options: what may be named, and limits.
        files: uploaded files.
    """

    def __init__(self, chat: Chat, options: ServeOptions, files: Files) -> None:
        self._chat = chat
        self._options = options
        self._files = files
        self.pictures = PictureCache(options.limits.cache_bytes)

    def check_count(self, count: int, param: str | None = None) -> None:
        """Refuse more pictures than one request may have.

        Raises:
            ApiError: there are.
        """
        most = self._options.limits.images
        if count > most:
            message = f"{count} pictures in one request, the limit is {most}"
            raise invalid(message, param)

    def opened(self, parts: Iterable[Part], owner: str) -> list[str | MediaPart]:
        """Return parts with their pictures opened; raises what `part` does."""
        return [self.part(one, owner) if isinstance(one, dict) else one for one in parts]

    def part(self, given: Mapping[str, Any], owner: str) -> MediaPart:
        """Return the medium of a part in OpenAI's form, or in the form of our own extensions.

        Args:
            given: `image_url` (a text, {"url": ...} or None), `file_id`, `uuid`, `image_embeds`,
                and `detail`: "low" shows the model the whole picture in one tile.
            owner: whose request it is.

        Raises:
            MediaError: it cannot be fetched or decoded, or may not be named.
            MediaTooLargeError: more than the limits.
            UnknownMediumError: an upload or a uuid that is not there.
        """
        check_work()
        uuid = given.get("uuid")
        if uuid is not None and not (isinstance(uuid, str) and 0 < len(uuid) <= _LONGEST_UUID):
            raise MediaError(f"uuid must be a text of at most {_LONGEST_UUID} letters")
        if given.get("image_embeds") is not None:
            return MediaPart(self.features(given["image_embeds"]))
        url, detail = given.get("image_url"), given.get("detail")
        if isinstance(url, Mapping):
            uuid, detail = uuid or url.get("uuid"), url.get("detail", detail)
            url = url.get("url")
        if given.get("file_id") is not None:
            data = self._files.content(str(given["file_id"]), owner)
        elif url is not None:
            named = given if isinstance(given, NamedPart) else NamedPart(given)
            data = self.content(url, owner, named)
        elif uuid is not None:
            return MediaPart(self._in_detail(self.pictures.called(owner, uuid), detail))
        else:
            raise MediaError("a picture has no image_url, file_id or uuid: give one of them")
        return MediaPart(self._in_detail(self.picture(data, owner=owner, uuid=uuid), detail))

    def _in_detail(self, item: PreparedImage, detail: object) -> PreparedImage:
        """Return the picture as OpenAI's `detail` asks for: all of it but where it is "low"."""
        modality = self._chat.model.modality("image")
        if detail != "low" or not isinstance(modality, ImageModality):
            return item
        return modality.overview(item)

    def picture(self, data: bytes, *, owner: str = "", uuid: str | None = None) -> PreparedImage:
        """Return an encoded picture as the model takes it, decoded once per content.

        Raises:
            MediaError: it cannot be decoded, or the model does not look at pictures.
            MediaTooLargeError: too many bytes or pixels.
        """
        limits, model = self._options.limits, self._chat.model
        if "image" not in model.modalities:
            raise MediaError(f"the model {self._chat.name} reads text only: leave pictures out")
        if len(data) > limits.image_bytes:
            raise MediaTooLargeError(
                f"the picture has {len(data)} bytes, more than the limit of {limits.image_bytes}: "
                "shrink it"
            )
        digest = hashlib.sha256(data + self._chat.alpha.encode()).digest()
        item = self.pictures.get(digest)
        if item is None:
            image = to_rgb(
                data,
                alpha=self._chat.alpha,
                max_pixels=limits.image_pixels,
                max_bytes=limits.decoded_bytes,
            )
            modality = model.modality("image")
            if not isinstance(modality, ImageModality):
                raise MediaError(f"the pictures of {self._chat.name} are none that can be decoded")
            item = modality.prepare(image)
            self.pictures.put(digest, item)
        if uuid is not None:
            self.pictures.call(owner, uuid, digest)
        return item

    def content(self, url: object, owner: str, named: NamedPart) -> bytes:
        """Return the bytes that a URL stands for.

        Args:
            url: of the picture.
            owner: whose request it is.
            named: the part that it is of, which knows what the client calls it.

        Raises:
            MediaError: another kind of URL than is allowed, or nothing behind it.
        """
        if not isinstance(url, str) or not url:
            raise MediaError(f"{named.name} must be a text, got {shown(url)}")
        options = self._options
        scheme = url[:8].lower().partition(":")[0] if ":" in url[:8] else ""
        if named.is_base64:
            packed = "".join(url.split())
            padded = packed + "=" * (-len(packed) % 4)
            return _unpacked(padded, f"{named.name} {url[:60]!r} is no base64")
        if scheme == "data":
            return self._fetched(url)
        if scheme in ("http", "https"):
            if not options.allow_remote_images:
                raise MediaError(
                    f"{named.name}: this server fetches no pictures from URLs: send "
                    f"{named.instead}, or let it be started with --allow-remote-images"
                )
            return self._fetched(url)
        if scheme == "file":
            return self._of_file(url)
        if url.startswith("file-"):
            return self._files.content(url, owner)
        return _unpacked(  # without a prefix, as some clients send it
            url,
            f"{named.name} {url[:60]!r} is no data URI, no http(s) URL and no base64: send "
            f"{named.instead}",
        )

    def _fetched(self, url: str) -> bytes:
        limits = self._options.limits
        bounds = FetchLimits(
            timeout_s=limits.fetch_seconds,
            max_bytes=limits.image_bytes,
            max_redirects=limits.redirects,
            public_only=True,
        )
        data = fetch(url, limits=bounds).data
        assert isinstance(data, bytes)  # noqa: S101 - of a text it always is
        return data

    def _of_file(self, url: str) -> bytes:
        """Return the bytes of a file below the media root, links followed."""
        root = self._options.media_root
        if root is None:
            raise MediaError("this server opens no files: start it with --media-root FOLDER")
        parts = urlsplit(url)
        path = Path(url2pathname(parts.path))
        try:
            found = (path if path.is_absolute() else root / path).resolve(strict=True)
        except (OSError, ValueError) as error:
            raise UnknownMediumError(f"{url} is not below the media root") from error
        if parts.netloc or not found.is_relative_to(root.resolve()) or not found.is_file():
            raise UnknownMediumError(f"{url} is not below the media root")
        limit = self._options.limits.image_bytes
        with found.open("rb") as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise MediaTooLargeError(f"{url} has more than {limit} bytes, the limit")
        return data

    def features(self, given: object) -> Float[Tensor, "n D"]:
        """Return the features of one picture, from the base64 of a safetensors file's bytes.

        The header is checked against the bytes that came before anything is allocated.

        Raises:
            MediaError: no such file, another number of tensors than one, or numbers that are not
                finite or too large to compute with.
        """
        if not isinstance(given, str):
            raise MediaError(f"image_embeds must be base64 text, got {shown(given)}")
        try:
            data = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError) as error:
            raise MediaError(f"image_embeds is no base64: {error}") from error
        features = one_tensor(data)
        if not bool(features.isfinite().all()):
            raise MediaError("image_embeds has NaN or infinite numbers")
        if features.shape[0] > self._chat.context_length:
            raise MediaError(
                f"image_embeds has {features.shape[0]} rows, more than the context of "
                f"{self._chat.context_length}"
            )
        checked: Tensor = self._chat.prepare(MediaPart(features))
        self._check_size(checked)
        return checked

    def _check_size(self, features: Float[Tensor, "n D"]) -> None:
        """Refuse finite numbers that the model's own arithmetic would make infinite.

        Its norms square them in float32; what is infinite there becomes 0, an answer to nothing.

        Raises:
            MediaError: numbers as large as that.
        """
        embed = self._chat.model.language_model.embed
        kind = embed(torch.zeros(1, dtype=torch.long, device=self._chat.model.device)).dtype
        squares = features.to(kind).float().square().sum(dim=-1)
        if not bool(squares.isfinite().all()):
            raise MediaError(
                f"image_embeds has numbers up to {float(features.abs().max()):.1e}, too large for "
                f"the model to square them (it computes in {kind}): send the features of its own "
                "tower or projector"
            )


def _unpacked(text: str, wrong: str) -> bytes:
    """Return the bytes of base64; raises MediaError with `wrong` where it is none."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(wrong) from error


def one_tensor(data: bytes) -> Float[Tensor, "n D"]:
    """Return the only tensor of a safetensors file, whose header is checked first.

    Raises:
        MediaError: the header lies, or there is something else than one matrix of floats.
    """
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 0 < length <= min(_LONGEST_HEADER, len(data) - 8):
        raise MediaError(
            f"image_embeds: {len(data)} bytes with a header of {length} are no safetensors file of "
            "one tensor"
        )
    try:
        header = json.loads(data[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        [name] = names
        kind, shape = header[name]["dtype"], header[name]["shape"]
        begin, end = header[name]["data_offsets"]
        rows, width = shape
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MediaError(
            "image_embeds: expected a safetensors file with one matrix [n, D] in it"
        ) from error
    whole = all(type(one) is int and one >= 0 for one in (rows, width, begin, end))
    if whole and 0 in (rows, width):
        raise MediaError(
            f"image_embeds has the shape [{rows}, {width}]: at least one row is needed, and one "
            "number in it"
        )
    if not whole or kind not in _DTYPES:
        raise MediaError(
            f"image_embeds: dtype {shown(kind)}, shape {shown(shape)}: expected "
            f"{', '.join(_DTYPES)} and [n, D]"
        )
    dtype = _DTYPES[kind]
    body = data[8 + length :]
    expected = math.prod((rows, width, dtype.itemsize))
    if begin != 0 or end != expected or len(body) != expected or not expected:
        raise MediaError(
            f"image_embeds says {rows} x {width} of {kind}, which take {expected} bytes, and has "
            f"{len(body)}"
        )
    return torch.frombuffer(bytearray(body), dtype=dtype).reshape(rows, width)

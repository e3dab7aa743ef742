"""Decoding of pictures: encoded files, Pillow images and arrays become Pillow images in RGB."""

import ctypes
import logging
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from lapilli.errors import ConfigError, MediaError, MediaTooLargeError

Alpha = Literal["drop", "composite"]
Depth = Literal["scale", "clip"]

# Pillow refuses at twice its MAX_IMAGE_PIXELS, which is this number.
MAX_PIXELS = 178_956_970

_ORIENTATION_TAG = 0x0112
_BITS_TAG = 0x0102
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What decoding may take, beside the file itself. A photo of 100 megapixels takes 400 to 800 MiB.
MAX_BYTES = 1 << 30

# Bytes per pixel that a decoder holds beside the picture, measured with Pillow 11 to 13: WebP keeps
# two canvases and a copy, JPEG 2000 whole numbers of 32 bits, AVIF its own colours.
_DECODER_BYTES = {
    "WEBP": 16,
    "AVIF": 16,
    "JPEG2000": 20,
    "BMP": 0,
    "GIF": 0,
    "JPEG": 0,
    "MPO": 0,
    "PNG": 0,
    "PPM": 0,
    "TGA": 0,
}
_OTHER_DECODER_BYTES = 4  # one copy: what formats decoded in Python hold, and large strips of TIFF
_PROGRESSIVE_JPEG_BYTES = 2  # a coefficient per channel and pixel, until the last scan is read
# Resizing holds a table of 8 bytes for each of the 6 pixels that a new one is made of, and a PNG
# two rows of up to 8 bytes: nothing for a photo, gigabytes for a picture 178956970 pixels wide.
_BYTES_PER_SIDE = 64
_STRIP_PIXELS = 1 << 20

# A PNG may carry more text than Pillow unpacks, before or after the pixels.
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def _keep_libraries_quiet() -> None:
    """Send what Pillow and libtiff say of damaged files to nobody's standard error.

    Pillow's words go to whoever has set logging up. libtiff prints them from C, and Pillow raises
    its errors besides; its wheels carry a libtiff of their own, the system's is left alone.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    package = Path(Image.__file__).parent
    for folder in (package.parent / "pillow.libs", package / ".dylibs"):
        for path in folder.glob("libtiff*"):
            with suppress(OSError, AttributeError):  # it has other names: then it goes on talking
                library = ctypes.CDLL(str(path))
                library.TIFFSetErrorHandler(None)
                library.TIFFSetWarningHandler(None)


_keep_libraries_quiet()

_BEGINNINGS = (  # compared with lower-cased bytes
    (b"%pdf-", "a PDF document"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG drawing: convert it to PNG"),
    (b"<?xml", "an XML file (perhaps SVG: convert it to PNG)"),
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip-compressed: unpack it first"),
    (b"{", "JSON or text"),
)


def to_rgb(
    source: bytes | Image.Image | NDArray[Any],
    *,
    exif: bool = True,
    alpha: Alpha = "drop",
    depth: Depth = "scale",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    name: str = "the picture",
) -> Image.Image:
    """Return the first frame of a picture in RGB, 8 bits a channel.

    Args:
        source: an encoded file, a Pillow image, or an array: uint8 [H, W] or [H, W, 1 | 3 | 4], or
            floating point of the same shapes with values from 0 to 1.
        exif: turn the picture as its EXIF orientation says. The original ignores it.
        alpha: "drop" forgets the alpha channel and shows the colours under it, as the original
            does; "composite" lays the picture on white.
        depth: 16-bit grey is scaled to 8 bits, and Pillow's 32-bit grey (mode "I") too where a
            value is above 255; "clip" cuts at 255 as the original does.
        max_pixels: a larger picture is refused before its pixels are unpacked.
        max_bytes: a picture whose decoding would hold more bytes is refused likewise.
        name: what the picture is called in messages.

    Raises:
        MediaError: no picture, a damaged one, one too large, or an array of another kind.

    Note: our defaults differ from the original for EXIF orientation and for 16-bit grey, where it
        shows people lying on their side and white sheets; `exif=False, depth="clip"` is what the
        original does.
    """
    with _named(name, min(max_pixels, MAX_PIXELS)), _warnings_of_pillow.kept_quiet():
        if isinstance(source, np.ndarray):
            image = _from_array(source, name)
        elif isinstance(source, Image.Image):
            image = source
        elif isinstance(source, bytes):
            image = _open(source, name)
        else:
            raise MediaError(
                f"{name} is a {type(source).__name__}: give encoded bytes, a Pillow image or an "
                "array"
            )
        _check_size(image, name, exif=exif, max_pixels=max_pixels, max_bytes=max_bytes)
        before = image.size
        try:
            image.load()
        except ValueError:
            if not isinstance(source, bytes):
                raise
            image = _open_without_text(source)
            image.load()
        if image.size != before:  # the picture inside an icon has a size of its own
            _check_size(image, name, exif=exif, max_pixels=max_pixels, max_bytes=max_bytes)
        has_16_bits = _has_16_bits(image)  # asked now: an image that was turned knows no file
        if exif:
            image = _upright(image)
        if image.mode in ("I", "F") or has_16_bits:
            return _from_deep_grey(image, name, depth=depth, has_16_bits=has_16_bits)
        return _flatten(image, alpha=alpha)


def check_alpha(alpha: str) -> None:
    """Refuse a way to treat transparency that there is not.

    Raises:
        ConfigError: another one than "drop" and "composite".
    """
    if alpha not in get_args(Alpha):
        raise ConfigError(f"alpha {alpha!r} is unknown: choose from {', '.join(get_args(Alpha))}")


def check_bytes(needed: int, name: str, what: str, max_bytes: int = MAX_BYTES) -> None:
    """Refuse what would take too much memory, before it is done.

    Args:
        needed: bytes that it would take.
        name: what the picture is called.
        what: what would be done, such as "decoding".
        max_bytes: most bytes that it may take.

    Raises:
        MediaError: `needed` is more than `max_bytes`.
    """
    if needed > max_bytes:
        raise MediaTooLargeError(
            f"{name} is too large: {what} would take {-(-needed >> 20)} MiB, more than the limit "
            f"of {max_bytes >> 20} MiB: shrink it"
        )


def as_rgb(image: Image.Image) -> Image.Image:
    """Return the colours of an image of any mode, without its alpha: Pillow's `convert("RGB")`."""
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBa", "La"):  # premultiplied: Pillow converts only to their plain twins
        image = image.convert(image.mode.upper())
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")


class _PillowWarnings:
    """A filter that keeps Pillow's warnings from standard error while pictures are decoded.

    `warnings.catch_warnings` puts back what it found, which goes wrong where threads overlap: the
    first of them sets the filter, the last one takes it away.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = warnings.catch_warnings()

    @contextmanager
    def kept_quiet(self) -> Iterator[None]:
        """Ignore what Pillow warns of inside the block."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._before.__exit__(None, None, None)


_warnings_of_pillow = _PillowWarnings()


def _open(encoded: bytes, name: str) -> Image.Image:
    if not encoded:
        raise MediaError(f"{name} is empty (0 bytes)")
    image: Image.Image
    try:
        image = Image.open(BytesIO(encoded))
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{name} is no picture that can be read: {_looks_like(encoded)}"
        ) from error
    except ValueError:
        image = _open_without_text(encoded)
    if image.format == "EPS":  # Pillow would start Ghostscript, and the file is its program
        raise MediaError(f"{name} is an EPS program, which is not run: convert it to PNG")
    return image


def _check_size(
    image: Image.Image, name: str, *, exif: bool, max_pixels: int, max_bytes: int
) -> None:
    """Refuse an image without pixels, and one that takes too much memory to decode."""
    if not image.width or not image.height:
        raise MediaError(f"{name} is empty: {image.width}x{image.height} pixels")
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise MediaTooLargeError(
            f"{name} has {image.width}x{image.height} = {pixels} pixels, more "
            f"than the limit of {max_pixels}: shrink it"
        )
    needed = pixels * _bytes_per_pixel(image, exif=exif) + _BYTES_PER_SIDE * max(image.size)
    check_bytes(needed, f"{name} ({image.width}x{image.height})", "decoding", max_bytes)


def _bytes_per_pixel(image: Image.Image, *, exif: bool) -> int:
    """Return what one pixel takes while the image is decoded, turned and made RGB."""
    stored = _stored_bytes(image.mode)
    # The RGB copy, or the turned one before the first is let go. Whether it will be turned is not
    # asked: Pillow decodes a PNG to find its EXIF data.
    copies = max(0 if image.mode == "RGB" else 4, stored if exif else 0)
    if image.mode[0] in "IF":  # in 8 bits before it is RGB
        copies += 1
    if not isinstance(image, ImageFile.ImageFile):
        return stored + copies
    decoder = _DECODER_BYTES.get(image.format or "", _OTHER_DECODER_BYTES)
    if image.info.get("progressive"):
        decoder += _PROGRESSIVE_JPEG_BYTES * len(image.getbands())
    return stored + max(copies, decoder)


def _stored_bytes(mode: str) -> int:
    """Return the bytes in which Pillow keeps a pixel."""
    if mode in ("1", "L", "P"):
        return 1
    return 2 if mode.startswith("I;16") else 4


def _open_without_text(encoded: bytes) -> Image.Image:
    """Open a PNG again that Pillow refused, without its texts and its colour profile.

    Neither is shown, and Pillow refuses a picture that has too much of them.

    Raises:
        ValueError: Pillow's own, of a file that has none, where they are not the reason.
    """
    if not encoded.startswith(_PNG_SIGNATURE):
        return Image.open(BytesIO(encoded))
    kept, at = [encoded[:8]], 8
    while at < len(encoded):
        (length,) = struct.unpack_from(">I", encoded, at) if at + 4 <= len(encoded) else (0,)
        end = at + 12 + length  # length, kind, data, checksum
        if encoded[at + 4 : at + 8] not in _PNG_TEXT:
            kept.append(encoded[at:end])
        at = end
    return Image.open(BytesIO(b"".join(kept)))


def _looks_like(encoded: bytes) -> str:
    start = encoded.lstrip()[:64].lower()
    shown = f"it begins with {encoded[:16]!r}"
    for beginning, meaning in _BEGINNINGS:
        if start.startswith(beginning):
            return f"{shown}, {meaning}"
    if encoded[4:8] == b"ftyp":
        brand = encoded[8:12].decode("ascii", "replace")
        return f"{shown}, a HEIC picture or a video (brand {brand!r}): convert it to JPEG or PNG"
    return shown


@contextmanager
def _named(name: str, most: int) -> Iterator[None]:
    """Turn whatever Pillow raises into one error that names the picture; `most`: its pixels."""
    try:
        yield
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        # Pillow says how many pixels the file declares, and then a limit of its own.
        count = re.search(r"\d+", str(error))
        pixels = "too many pixels" if count is None else f"{count[0]} pixels"
        raise MediaTooLargeError(
            f"{name} has {pixels}, more than the limit of {most}: shrink it"
        ) from error
    except MemoryError as error:
        raise MediaError(f"{name} takes more memory than there is: shrink it") from error
    # Each of forty decoders raises what it ran into: OSError, SyntaxError, struct.error, AVIF's
    # RuntimeError. The arrays that are read here raise nothing but MediaError.
    except Exception as error:  # see above: forty decoders, as many errors
        raise MediaError(f"{name} is damaged or cut off: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # noqa: BLE001 - whatever unreadable EXIF data ends in, the pixels are good
        return image
    if orientation in _TRANSPOSITIONS:
        return image.transpose(_TRANSPOSITIONS[orientation])
    return image


def _has_16_bits(image: Image.Image) -> bool:
    """Return whether grey values have 16 bits, whatever they are.

    Pillow opens most such files as "I;16", but PGM and TIFF with a sign as "I".
    """
    if image.mode == "I":
        bits = getattr(image, "tag_v2", {}).get(_BITS_TAG)
        return image.format == "PPM" or bits == (16,)
    return image.mode.startswith("I;16")


def _flatten(image: Image.Image, *, alpha: Alpha) -> Image.Image:
    if alpha == "composite" and image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return as_rgb(image)


def _from_deep_grey(
    image: Image.Image, name: str, *, depth: Depth, has_16_bits: bool
) -> Image.Image:
    """Return grey of more than 8 bits, and floating point, in 8 bits.

    Values of 32 bits that all lie within 0 to 255 are 8-bit grey that was converted, and stay.
    """
    if depth == "clip":
        return image.convert("RGB")
    grey = Image.new("L", image.size)
    tops = range(0, image.height, max(1, _STRIP_PIXELS // image.width))
    strips = [(0, top, image.width, min(top + tops.step, image.height)) for top in tops]
    ends = np.array([_ends(np.asarray(image.crop(strip))) for strip in strips])
    low, high = ends[:, 0].min(), ends[:, 1].max()
    if image.mode == "F":
        _check_floats(low, high, 'floating point (mode "F")', name)
    elif low < 0 or high > 0xFFFF:
        raise MediaError(
            f"{name} has grey values from {low:g} to {high:g}, outside of 16 bits "
            "(0 to 65535): scale them first"
        )
    levels = 255.0 if image.mode == "F" else 1 / 257  # 65535 = 257 * 255
    if image.mode == "I" and high <= 0xFF and not has_16_bits:
        levels = 1.0
    for strip in strips:
        values = np.asarray(image.crop(strip), np.float64)
        grey.paste(Image.fromarray(np.rint(values * levels).astype(np.uint8)), strip[:2])
    return grey.convert("RGB")


def _ends(values: NDArray[Any]) -> tuple[float, float]:
    """Return the smallest and the largest value; NaN if one is NaN."""
    return float(values.min()), float(values.max())


def _check_floats(low: float, high: float, kind: str, name: str) -> None:
    if not (low >= 0 and high <= 1):  # written so that NaN is refused
        raise MediaError(
            f"{name} is {kind} with values from {low} to "
            f"{high}: floating point must lie between 0 and 1, or give uint8"
        )


def _from_array(values: NDArray[Any], name: str) -> Image.Image:
    shape = "x".join(map(str, values.shape))
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        hint = ""
        if values.ndim == 3 and values.shape[0] in (1, 3, 4):
            hint = "; it looks channel-first: transpose it to height, width, channels"
        raise MediaError(
            f"{name} is an array of shape {shape}: expected HxW or HxWxC with 1, 3 or 4 channels"
            f"{hint}"
        )
    if not values.size:
        raise MediaError(f"{name} is an empty array of shape {shape}")
    if values.dtype.kind == "f":
        _check_floats(*_ends(values), f"an array of {values.dtype}", name)
        values = _floats_to_8_bits(values)
    if values.dtype != np.uint8:
        raise MediaError(
            f"{name} is an array of {values.dtype}: give uint8, or floating point from 0 to 1"
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(values))


def _floats_to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    out = np.empty(values.shape, np.uint8)
    step = max(1, _STRIP_PIXELS // values.shape[1])
    for top in range(0, len(values), step):
        out[top : top + step] = np.rint(values[top : top + step].astype(np.float64) * 255)
    return out

"""Whatever is handed over as a picture -> a Pillow RGB image; knows no model, fetches nothing."""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lapilli.errors import MediaError

Alpha = Literal["drop", "composite"]
Depth = Literal["scale", "clip"]

# Pillow refuses at twice its MAX_IMAGE_PIXELS, which is this number.
MAX_PIXELS = 178_956_970

_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's decoders raise on damaged files (found by mutating files in the tests).
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
)

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
    name: str = "the picture",
) -> Image.Image:
    """The first frame of a picture in RGB, 8 bits a channel.

    Args:
        source: an encoded file, a Pillow image, or an array: uint8 [H, W] or [H, W, 1 | 3 | 4], or
            floating point of the same shapes with values from 0 to 1.
        exif: turn the picture as its EXIF orientation says. The original ignores it.
        alpha: "drop" forgets the alpha channel and shows the colours under it, as the original
            does; "composite" lays the picture on white.
        depth: 16-bit grey is scaled to 8 bits; "clip" cuts at 255 as the original does.
        max_pixels: a larger picture is refused before its pixels are unpacked.
        name: what the picture is called in messages.

    Raises:
        MediaError: no picture, a damaged one, one too large, or an array of another kind.

    Note: our defaults differ from the original for EXIF orientation and for 16-bit grey, where it
        shows people lying on their side and white sheets; `exif=False, depth="clip"` is what the
        original does.
    """
    if isinstance(source, np.ndarray):
        image = _from_array(source, name)
    elif isinstance(source, Image.Image):
        image = source
    elif isinstance(source, bytes):
        image = _open(source, name)
    else:
        raise MediaError(
            f"{name} is a {type(source).__name__}: give encoded bytes, a Pillow image or an array"
        )
    if not image.width or not image.height:
        raise MediaError(f"{name} is empty: {image.width}x{image.height} pixels")
    if image.width * image.height > max_pixels:
        raise MediaError(
            f"{name} has {image.width}x{image.height} = {image.width * image.height} pixels, more "
            f"than the limit of {max_pixels}: shrink it, or raise max_pixels if you trust it"
        )
    with _damage_named(name):
        image.load()
        if exif:
            image = _upright(image)
        return _flatten(image, name, alpha=alpha, depth=depth)


def as_rgb(image: Image.Image) -> Image.Image:
    """The colours of an image of any mode, its alpha forgotten: Pillow's `convert("RGB")`."""
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBa", "La"):  # premultiplied: Pillow converts only to their plain twins
        image = image.convert(image.mode.upper())
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def _open(encoded: bytes, name: str) -> Image.Image:
    if not encoded:
        raise MediaError(f"{name} is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of its limit; max_pixels is the limit here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(encoded))
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{name} is no picture that can be read: {_looks_like(encoded)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name} is too large to be unpacked safely: {error}") from error
    except _DAMAGE as error:
        raise MediaError(f"{name} is damaged and cannot be opened: {error}") from error
    if image.format == "EPS":  # Pillow would start Ghostscript, and the file is its program
        raise MediaError(f"{name} is an EPS program, which is not run: convert it to PNG")
    return image


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
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except MediaError:
        raise
    except _DAMAGE as error:
        raise MediaError(f"{name} is damaged or cut off: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGE:
        return image  # unreadable EXIF data says nothing about the pixels
    if orientation in _TRANSPOSITIONS:
        return image.transpose(_TRANSPOSITIONS[orientation])
    return image


def _flatten(image: Image.Image, name: str, *, alpha: Alpha, depth: Depth) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image, name, depth=depth)
    if alpha == "composite" and image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return as_rgb(image)


def _from_deep_grey(image: Image.Image, name: str, *, depth: Depth) -> Image.Image:
    """16-bit grey (also what Pillow opens as 32-bit "I") and floating point, in 8 bits."""
    if depth == "clip":
        return image.convert("RGB")
    if image.mode == "F":
        return _from_array(np.asarray(image), name).convert("RGB")
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise MediaError(
            f"{name} has grey values from {values.min()} to {values.max()}, outside of 16 bits "
            "(0 to 65535): scale them first"
        )
    return Image.fromarray(_to_8_bits(values)).convert("RGB")


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    scaled: NDArray[np.uint8] = np.rint(values / 257.0).astype(np.uint8)  # 65535 = 257 * 255
    return scaled


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
        if not (values.min() >= 0 and values.max() <= 1):  # written so that NaN is refused
            raise MediaError(
                f"{name} is an array of {values.dtype} with values from {values.min()} to "
                f"{values.max()}: floating point must lie between 0 and 1, or give uint8"
            )
        values = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise MediaError(
            f"{name} is an array of {values.dtype}: give uint8, or floating point from 0 to 1"
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(values))

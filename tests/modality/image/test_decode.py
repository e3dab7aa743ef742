"""Whatever is handed over as a picture becomes RGB, or an error that names it."""

import contextlib
import io
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from lapilli.errors import MediaError, MediaTooLargeError
from lapilli.modality.image.decode import MAX_BYTES, MAX_PIXELS, _check_size, as_rgb, to_rgb

SIDE = 24
RANDOM = np.random.default_rng(7)
NOISE = RANDOM.integers(0, 256, (SIDE, SIDE + 8, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_comes_out_as_it_went_in():
    assert (pixels(to_rgb(encoded(Image.fromarray(NOISE)))) == NOISE).all()
    assert (pixels(to_rgb(Image.fromarray(NOISE))) == NOISE).all()
    assert (pixels(to_rgb(NOISE)) == NOISE).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    image = Image.fromarray(NOISE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (pixels(to_rgb(data)) == np.asarray(expected)).all()
    assert (pixels(to_rgb(data, exif=False)) == NOISE).all()
    # An image that a program turned itself is not turned twice.
    assert (pixels(to_rgb(expected)) == np.asarray(expected)).all()


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_unknown_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (pixels(to_rgb(encoded(Image.fromarray(NOISE), exif=exif))) == NOISE).all()


def test_damaged_exif_is_ignored():
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff")
    assert to_rgb(data).size == (SIDE + 8, SIDE)  # and Pillow's warning goes nowhere


def test_cmyk():
    image = Image.fromarray(NOISE).convert("CMYK")
    data = encoded(image, "TIFF")
    assert (pixels(to_rgb(data)) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["1", "L", "HSV", "YCbCr", "LAB"])
def test_other_colour_spaces(mode):
    image = Image.fromarray(NOISE)
    image = image.convert(mode) if mode != "LAB" else Image.frombytes("LAB", image.size, NOISE)
    assert to_rgb(image).mode == "RGB"


def palette(transparency: bytes | int | None) -> Image.Image:
    image = Image.fromarray(NOISE).quantize(8)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])])
def test_palette(transparency):
    image = palette(transparency)
    plain = np.asarray(palette(None).convert("RGB"))
    data = encoded(image) if transparency is None else encoded(image, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pixels(to_rgb(data)) == plain).all()
        composed = pixels(to_rgb(data, alpha="composite"))
    if transparency is None:
        assert (composed == plain).all()
    else:
        hidden = np.asarray(image) == 0
        assert (composed[hidden] == 255).all()
        assert (composed[np.asarray(image) > 2] == plain[np.asarray(image) > 2]).all()


def test_alpha_is_dropped_or_laid_on_white():
    alpha = np.zeros((SIDE, SIDE + 8, 1), np.uint8)
    alpha[: SIDE // 2] = 255
    image = Image.fromarray(np.concatenate([NOISE, alpha], axis=2))
    for source in (image, encoded(image), np.asarray(image)):
        assert (pixels(to_rgb(source)) == NOISE).all()
        composed = pixels(to_rgb(source, alpha="composite"))
        assert (composed[: SIDE // 2] == NOISE[: SIDE // 2]).all()
        assert (composed[SIDE // 2 :] == 255).all()
    grey = image.convert("LA")
    assert (pixels(to_rgb(grey)) == np.asarray(grey.convert("RGB"))).all()
    assert (pixels(to_rgb(grey, alpha="composite"))[SIDE // 2 :] == 255).all()


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha(mode):
    image = Image.fromarray(NOISE).convert(mode.upper()).convert(mode)
    assert as_rgb(image).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind):
    values = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    data = encoded(Image.fromarray(values), kind)
    expected = np.rint(values / 257).astype(np.uint8)
    assert (pixels(to_rgb(data)) == expected[:, :, None]).all()
    clipped = pixels(to_rgb(data, depth="clip"))
    assert (clipped == np.minimum(values, 255)[:, :, None]).all()


def test_32_bit_grey_counts_as_16_bits():
    values = np.full((SIDE, SIDE), 65535, np.int32)
    assert (pixels(to_rgb(Image.fromarray(values))) == 255).all()
    with pytest.raises(MediaError, match="scan has grey values from 70000 to 70000, outside of 16"):
        to_rgb(Image.fromarray(values * 0 + 70000), name="scan")


@pytest.mark.parametrize("source", ["image", "turned", "TIFF"])
def test_8_bit_grey_in_32_bits_stays_as_it_is(source):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    image = grey.convert("I")
    if source == "turned":
        image.getexif()[0x0112] = 3
        grey = grey.transpose(Image.Transpose.ROTATE_180)
    shown = to_rgb(encoded(image, source) if source.isupper() else image)
    assert (pixels(shown) == np.asarray(grey)[:, :, None]).all()


def as_signed_tiff(image: Image.Image) -> bytes:
    data = encoded(image, "TIFF", tiffinfo={339: 2})  # SampleFormat: signed whole numbers
    assert Image.open(io.BytesIO(data)).mode == "I"
    return data


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
@pytest.mark.parametrize("kind", ["image", "PNG", "TIFF", "PPM", "signed"])
def test_dark_16_bit_grey_stays_dark(mode, kind):
    image = Image.new(mode, (8, 8), 255)
    if kind != "image":
        image = image.convert("I;16")
    given = {"image": lambda: image, "signed": lambda: as_signed_tiff(image)}
    shown = to_rgb(given.get(kind, lambda: encoded(image, kind))())
    assert (pixels(shown) == 1).all()


def test_32_bit_grey_that_cannot_be_told_is_refused():
    for values in (np.full((8, 8), -1, np.int32), np.full((8, 8), 65536, np.int32)):
        for kind in ("image", "TIFF"):
            image = Image.fromarray(values)
            with pytest.raises(
                MediaError, match=r"scan has grey values from .* outside of 16 bits"
            ):
                to_rgb(encoded(image, kind) if kind == "TIFF" else image, name="scan")
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    message = r'scan is floating point \(mode "F"\) with values from 0.0 to 255.0: .* 0 and 1'
    with pytest.raises(MediaError, match=message):
        to_rgb(grey.convert("F"), name="scan")


def test_floating_point_images():
    values = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
    expected = np.rint(values.astype(np.float64) * 255)
    assert (pixels(to_rgb(Image.fromarray(values)))[:, :, 0] == expected).all()
    with pytest.raises(MediaError, match="must lie between 0 and 1"):
        to_rgb(Image.fromarray(values * 2))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(to_rgb(data))[0, 0].tolist() == [255, 0, 0]
    opened = Image.open(io.BytesIO(data))
    opened.seek(2)
    assert pixels(to_rgb(opened))[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_truncated_file(kind):
    data = encoded(Image.fromarray(np.tile(NOISE, (20, 20, 1))), kind)
    with pytest.raises(MediaError, match=r"cat\.img is (damaged|no picture)"):
        to_rgb(data[: len(data) // 2], name="cat.img")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"cat\.img is empty \(0 bytes\)"),
        (b"\n<!DOCTYPE html><html>", r"it begins with b'\\n<!DOCTYPE html>', an HTML page"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"<svg xmlns=''>", "an SVG drawing: convert"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer: run"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", r"a HEIC picture or a video \(brand 'heic'\)"),
        (b"hello", r"cat\.img is no picture that can be read: it begins with b'hello'$"),
        (bytes(100), r"it begins with b'\\x00"),
    ],
)
def test_no_picture(data, message):
    with pytest.raises(MediaError, match=message):
        to_rgb(data, name="cat.img")


def test_too_many_pixels_for_our_limit():
    data = encoded(Image.fromarray(NOISE))
    assert to_rgb(data, max_pixels=SIDE * (SIDE + 8)).size == (SIDE + 8, SIDE)
    with pytest.raises(MediaError, match="cat has 32x24 = 768 pixels, more than the limit of 767"):
        to_rgb(data, max_pixels=767, name="cat")


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size; nothing of it is ever unpacked."""
    data = bytearray(encoded(Image.new("L", (1, 1))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    crc = PngImagePlugin._crc32(bytes(data[12:29]))
    data[29:33] = crc.to_bytes(4, "big")
    return bytes(data)


def test_decompression_bombs():
    for most in (178_956_970, 50_000_000):
        message = f"has 20000000000 pixels, more than the limit of {most}: shrink it$"
        with pytest.raises(MediaTooLargeError, match=message):
            to_rgb(bomb(200_000, 100_000), max_pixels=most)
    with pytest.raises(MediaTooLargeError, match=r"limit of 178956970: shrink it$"):
        to_rgb(bomb(200_000, 100_000), max_pixels=1 << 60)
    # Between Pillow's warning and its error only our own limit speaks.
    with pytest.raises(MediaError, match="10000x10000 = 100000000 pixels, more than the limit"):
        to_rgb(bomb(10_000, 10_000), max_pixels=50_000_000)


def test_the_words_of_pillow_do_not_matter(monkeypatch):
    """Errors are told apart by their class: what Pillow writes in them may change."""
    plain = Image.open

    def refusing(file):
        data = file.getvalue()
        if b"zTXt" in data:
            raise ValueError("zu viel Text")
        if data[16:20] == (20_000).to_bytes(4, "big"):
            raise Image.DecompressionBombError("zu viele.")
        return plain(file)

    monkeypatch.setattr(Image, "open", refusing)
    assert (pixels(to_rgb(texts("before"))) == NOISE).all()
    with pytest.raises(
        MediaError, match="cat has too many pixels, more than the limit of 178956970"
    ):
        to_rgb(bomb(20_000, 30_000), name="cat")


@pytest.mark.parametrize(
    ("width", "height"), [(178_956_970, 1), (1, 178_956_970), (30_000_000, 3), (20_000_000, 2)]
)
def test_few_pixels_that_take_much_memory(width, height):
    data = bomb(width, height)
    with pytest.raises(MediaError, match=r"too large: decoding would take \d+ MiB, more than the"):
        to_rgb(data, name="cat")


def webp_of(width: int, height: int) -> bytes:
    """The header of a lossless WebP, which claims a size; 34 bytes."""
    size = (width - 1 | (height - 1) << 14).to_bytes(4, "little")
    body = b"VP8L" + (13).to_bytes(4, "little") + b"\x2f" + size + bytes(9)
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body


def test_a_decoder_counts_with_what_it_holds():
    assert len(webp_of(9, 9)) == 34
    with pytest.raises(MediaError, match=r"\(16383x10900\) is too large: decoding would take 34"):
        to_rgb(webp_of(16383, 10900))
    data = encoded(Image.fromarray(NOISE), "WEBP")
    most = 20 * SIDE * (SIDE + 8) + 64 * (SIDE + 8)
    assert to_rgb(data, max_bytes=most).size == (SIDE + 8, SIDE)
    with pytest.raises(MediaError, match="too large"):
        to_rgb(data, max_bytes=most - 1)


@pytest.mark.parametrize("kind", ["photo", "scan", "progressive", "WEBP", "AVIF", "JPEG2000"])
def test_a_photo_of_24_megapixels_is_within_the_limit(kind):
    """Its header alone: the size is checked before the pixels are unpacked."""
    small = Image.new("I;16" if kind == "scan" else "RGB", (8, 8))
    options = {"progressive": True} if kind == "progressive" else {}
    formats = {"photo": "JPEG", "progressive": "JPEG", "scan": "PNG"}
    image = Image.open(io.BytesIO(encoded(small, formats.get(kind, kind), **options)))
    image._size = (6000, 4000)
    _check_size(image, "photo", exif=True, max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES)


def test_images_and_arrays_that_are_given_have_the_same_limit():
    with pytest.raises(MediaError, match="too large: decoding would take"):
        to_rgb(Image.new("L", (30_000_000, 1)))
    with pytest.raises(MediaError, match="too large: decoding would take"):
        to_rgb(np.zeros((1, 30_000_000), np.uint8))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a file of Linux")
def test_16_bits_take_no_more_than_the_result_and_the_file():
    """By VmHWM: ru_maxrss begins with what the program that started this one had."""
    code = """
import io
import numpy as np
from pathlib import Path
from PIL import Image
from lapilli.modality.image.decode import to_rgb

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

Image.fromarray(np.zeros((4, 4), np.uint16)).convert("L")
stream = io.BytesIO()
Image.new("I;16", (6000, 4000)).save(stream, "PNG")
to_rgb(Image.new("I;16", (8, 8)))
Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of drawing, does not count
before = peak()
to_rgb(stream.getvalue())
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 250 * 1024  # kB; 468 MB before the strips


def test_16_bits_count_with_all_of_their_copies():
    """The file's own grey, the one of 8 bits and the result: 7 bytes a pixel, 1181 MiB."""
    stream = io.BytesIO()
    Image.new("I;16", (13_300, 13_300)).save(stream, "PNG")
    with pytest.raises(MediaError, match="decoding would take 1182 MiB, more than the limit of 10"):
        to_rgb(stream.getvalue())


def texts(place: str) -> bytes:
    """A PNG whose texts are longer than Pillow unpacks, before or after the pixels."""
    data = encoded(Image.fromarray(NOISE))
    body = b"Comment\0\0" + zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 9))
    chunk = b"zTXt" + body
    text = len(body).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    at = 33 if place == "before" else len(data) - 12
    return data[:at] + text + data[at:]


@pytest.mark.parametrize("place", ["before", "after"])
def test_long_texts_are_no_damage(place):
    assert (pixels(to_rgb(texts(place))) == NOISE).all()
    with pytest.raises(MediaError, match="damaged"):
        to_rgb(texts(place)[:200])


def test_whatever_a_decoder_raises_is_our_error():
    data = bytearray(encoded(Image.fromarray(np.tile(NOISE, (4, 4, 1))), "AVIF"))
    start = data.index(b"mdat") + 4
    data[start:] = bytes([255]) * (len(data) - start)
    with pytest.raises(MediaError, match="is damaged"):  # a RuntimeError of Pillow's
        to_rgb(bytes(data))


def test_what_libtiff_prints_from_c_is_not_heard(capfd):
    data = bytearray(encoded(Image.fromarray(NOISE), "TIFF", compression="tiff_deflate"))
    at = data.index(b"\x78")  # zlib's stream
    data[at + 40 : at + 60] = bytes(20)
    with pytest.raises(MediaError):
        to_rgb(bytes(data))
    assert capfd.readouterr() == ("", "")


def test_no_warning_of_pillow_comes_through_from_any_thread():
    damaged = encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda _: to_rgb(damaged).size, range(64)))
    assert set(sizes) == {(SIDE + 8, SIDE)}
    assert warnings.filters == before


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)])
def test_arrays(shape):
    values = RANDOM.integers(0, 256, shape, dtype=np.uint8)
    colours = values.reshape(4, 6, -1)[:, :, :3]
    assert (pixels(to_rgb(values)) == colours).all()
    assert (pixels(to_rgb(values[::-1, ::-1])) == colours[::-1, ::-1]).all()
    assert (pixels(to_rgb(values / 255)) == colours).all()
    assert (pixels(to_rgb((values / 255).astype(np.float16))) == colours).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 4, 5), np.uint8), "shape 3x4x5: expected HxW .* looks channel-first"),
        (np.zeros((2, 3, 4, 3), np.uint8), "shape 2x3x4x3: expected"),
        (np.zeros(5, np.uint8), "shape 5: expected"),
        (np.zeros((0, 4, 3), np.uint8), "an empty array of shape 0x4x3"),
        (np.zeros((4, 4), np.int64), "an array of int64: give uint8"),
        (np.full((4, 4), 255.0), r"from 255\.0 to 255\.0: floating point must lie"),
        (np.full((4, 4), -0.1), r"from -0\.1"),
        (np.full((4, 4), np.nan), "from nan to nan"),
    ],
)
def test_arrays_that_are_no_pictures(values, message):
    with pytest.raises(MediaError, match=message):
        to_rgb(values)


def test_eps_is_not_run():
    data = encoded(Image.fromarray(NOISE), "EPS")
    with pytest.raises(MediaError, match=r"plot\.eps is an EPS program, which is not run"):
        to_rgb(data, name="plot.eps")


def test_an_image_without_pixels():
    with pytest.raises(MediaError, match="the picture is empty: 0x5 pixels"):
        to_rgb(Image.new("RGB", (0, 5)))


WHOLE = {
    kind: encoded(Image.fromarray(NOISE), kind)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "DDS")
}


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damaged_files_give_a_picture_or_our_error(kind, data):
    damaged = bytearray(WHOLE[kind])
    places = st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=6)
    for place in data.draw(places):
        damaged[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(1, len(damaged)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
        with contextlib.suppress(MediaError):
            assert to_rgb(bytes(damaged[:end]), max_pixels=1 << 20).mode == "RGB"

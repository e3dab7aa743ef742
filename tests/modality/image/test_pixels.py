"""Pixels against the golden numbers of the original and against transformers."""

import hashlib
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from lapilli.config.model import ImageConfig, PixelConfig
from lapilli.errors import ConfigError, MediaError
from lapilli.geometry import ImageSize
from lapilli.modality.image import pixels as pixels_module
from lapilli.modality.image.pixels import PreparedImage, pad_to_square
from tests.integration.oracle import pixel_processor
from tests.modality.image.build import (
    cases_of,
    image_config,
    num_tiles,
    opened,
    prepare,
    vision_config,
)
from tests.versions import needs

TOLERANCE = 1e-5
RESAMPLED = needs(
    "pillow", "13", "resamples tall pictures in another order than the golden numbers"
)


@pytest.mark.slow
def test_resizing_that_takes_much_memory_is_refused():
    tall = Image.new("RGB", (1, 2_000_000))  # 336 x 2000000 between two passes of Pillow's
    with pytest.raises(MediaError, match=r"1x2000000.* too large: resizing it to 336x336 would"):
        prepare(tall, image_config(336, "anyres"))
    assert prepare(tall.rotate(90, expand=True), image_config(336, "anyres")).size.height == 1
    with pytest.raises(MediaError, match="a square of 2000000x2000000 would take"):
        pad_to_square(tall, (0, 0, 0))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def config_of(case: dict) -> ImageConfig:
    given = case["input"]
    points = given.get("pinpoints") or []
    points = json.loads(points) if isinstance(points, str) else points
    return image_config(
        given["crop"],
        given["aspect"] if given["aspect"] in ("pad", "anyres") else "square",
        pinpoints=tuple(ImageSize(height, width) for width, height in points),
    )


def grid9(values: np.ndarray) -> np.ndarray:
    places = np.round(np.linspace(0, values.shape[-1] - 1, 9)).astype(int)
    return values[:, :, places][:, :, :, places]


def is_misread(pictures: list[Image.Image], aspect: str) -> bool:
    """Whether the original takes a picture for channel-first numbers; here it is a picture."""
    sides = [max(image.size) if aspect == "pad" else image.height for image in pictures]
    return aspect != "anyres" and any(side in (1, 3) for side in sides)


def prepared(pictures: list[Image.Image], config: ImageConfig) -> list[PreparedImage]:
    return [prepare(image, config) for image in pictures]


# Palette images whose transparency is a list make Pillow warn when the golden way converts them.
@RESAMPLED
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_golden_picture(conformance):
    worst, compared, identical, differing = 0.0, 0, 0, 0
    for case, images, arrays in cases_of(conformance, "process_images"):
        given, expect = case["input"], case["expect"]
        sources = [images / name for name in given["images"]]
        if not sources or not all(source.is_file() for source in sources):
            continue  # the photographs stay where the golden numbers are
        pictures = [opened(path, convert=given.get("convert", True)) for path in sources]
        if is_misread(pictures, given["aspect"]):
            differing += 1
            continue
        if "exception" in expect:
            with pytest.raises((ConfigError, TypeError)):
                prepared(pictures, config_of(case))
            continue
        items = prepared(pictures, config_of(case))
        stacks = len({item.pixel_values.shape for item in items}) == 1
        assert stacks == (expect["container"] == "tensor"), case["id"]
        sizes = [[item.size.width, item.size.height] for item in items]
        assert sizes == expect["sizes"], case["id"]
        values = torch.cat([item.pixel_values for item in items]).numpy()
        with np.load(arrays) as stored:
            difference = np.abs(grid9(values) - stored[f"{case['id']}/pixels/grid9"]).max()
        assert difference <= TOLERANCE, case["id"]
        worst = max(worst, float(difference))
        compared += 1
        hashes = [hashlib.sha256(item.pixel_values.numpy().tobytes()).hexdigest() for item in items]
        identical += hashes == [image["sha256"] for image in expect["images"]]
    assert compared > 50
    assert differing < 10
    assert identical == compared, f"{identical} of {compared} bit for bit, worst {worst}"


@RESAMPLED
@pytest.mark.slow
def test_the_pictures_of_every_golden_checkpoint(conformance):
    compared = 0
    for spec_path in sorted((conformance / "cases").glob("*/*/spec.json")):
        spec = json.loads(spec_path.read_text("utf-8"))
        images = conformance / "images" / spec_path.parts[-3]
        mm, side = spec["mm"], spec["vision"]["image_size"]
        lines = json.loads(spec_path.with_name("cases.json").read_text("utf-8"))["cases"]
        for case in (case for case in lines if case["op"] == "pixels"):
            sources = [images / name for name in case["input"]["images"]]
            if "exception" in case["expect"] or not all(source.is_file() for source in sources):
                continue
            given = {
                "crop": side,
                "aspect": mm.get("image_aspect_ratio"),
                "pinpoints": mm.get("image_grid_pinpoints"),
            }
            items = prepared([opened(source) for source in sources], config_of({"input": given}))
            hashes = [hashlib.sha256(item.pixel_values.numpy().tobytes()) for item in items]
            expected = [image["sha256"] for image in case["expect"]["images"]]
            assert [one.hexdigest() for one in hashes] == expected, (spec["name"], case["id"])
            compared += len(items)
    assert compared > 10


# ---- transformers as oracle


extents = st.integers(4, 200)  # 1 and 3 are taken for channels there


@settings(max_examples=60, deadline=None)
@given(extents, extents, st.sampled_from([28, 33, 56]))
def test_square_agrees_with_transformers(width, height, side):
    image = picture(width, height)
    processor = pixel_processor("CLIP", size={"shortest_edge": side}, crop_size=side)
    expected = processor(image, return_tensors="np")["pixel_values"]
    found = prepare(image, image_config(side)).pixel_values.numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE


@settings(max_examples=40, deadline=None)
@given(extents, extents, st.booleans())
def test_anyres_agrees_with_transformers(width, height, explicit):
    # A picture that shrinks to three rows is taken for one of three channels by older transformers.
    assume(max(width, height) < 8 * min(width, height))
    image = picture(width, height)
    config = image_config(28, "anyres")
    size = {"height": 28, "width": 28} if explicit else {"shortest_edge": 28}
    processor = pixel_processor(
        "LlavaNext",
        size=size,
        crop_size=28,
        image_grid_pinpoints=[list(point) for point in config.pinpoints],
    )
    expected = processor(image, return_tensors="np")
    if explicit:
        pixels = replace(config.pixels, shortest_edge=None, resize_to=ImageSize(28, 28))
        config = replace(config, pixels=pixels)
    found = prepare(image, config, vision_config(28))
    assert list(found.size) == expected["image_sizes"][0].tolist()
    assert found.pixel_values.shape == expected["pixel_values"][0].shape
    assert np.abs(found.pixel_values.numpy() - expected["pixel_values"][0]).max() <= TOLERANCE


SIGLIP = PixelConfig(
    crop_size=ImageSize(56, 56),
    resize_to=ImageSize(56, 56),
    do_center_crop=False,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


@settings(max_examples=30, deadline=None)
@given(extents, extents)
def test_siglip_agrees_with_transformers(width, height):
    image = picture(width, height)
    processor = pixel_processor("Siglip", size={"height": 56, "width": 56})
    expected = processor(image, return_tensors="np")["pixel_values"]
    found = prepare(image, ImageConfig(pixels=SIGLIP)).pixel_values.numpy()
    assert np.abs(found - expected).max() <= TOLERANCE


@settings(max_examples=60, deadline=None)
@given(
    extents,
    extents,
    st.fixed_dictionaries(
        {
            name: st.booleans()
            for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        }
    ),
    st.sampled_from([0, 2, 3]),
)
def test_any_preprocessor_config_agrees_with_transformers(width, height, flags, resample):
    image = picture(width, height)
    options = {
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "rescale_factor": 1 / 127,
    }
    processor = pixel_processor(
        "CLIP",
        size={"shortest_edge": 40},
        crop_size={"height": 31, "width": 44},
        resample=resample,
        **options,
        **flags,
    )
    expected = processor(image, return_tensors="np")["pixel_values"]
    config = PixelConfig(
        crop_size=ImageSize(31, 44),
        shortest_edge=40,
        resample=resample,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
        rescale_factor=1 / 127,
        **flags,
    )
    found = prepare(image, ImageConfig(pixels=config)).pixel_values.numpy()
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    scale = max(1.0, float(np.abs(expected).max()))  # without rescaling the numbers reach 640
    assert np.abs(found - expected).max() <= TOLERANCE * scale


# ---- our own


@pytest.mark.parametrize("aspect", ["square", "pad", "anyres"])
@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (2000, 20), (20, 2000), (3, 1), (5, 3), (1, 3), (3, 3)]
)
def test_extreme_sizes_work(aspect, width, height):
    config = image_config(28, aspect)
    size = ImageSize(height, width)
    found = prepare(picture(width, height), config, vision_config(28))
    assert found.size == size
    assert found.pixel_values.shape == (num_tiles(size, config, 28), 3, 28, 28)
    assert found.pixel_values.isfinite().all()


def test_a_plain_picture_is_its_colour():
    image = Image.new("RGB", (1, 1), (255, 0, 128))
    found = prepare(image, image_config(28)).pixel_values
    pixels = image_config(28).pixels
    expected = [
        (level / 255 - mean) / std
        for level, mean, std in zip((255, 0, 128), pixels.mean, pixels.std, strict=True)
    ]
    assert found.amax((0, 2, 3)).tolist() == pytest.approx(expected, abs=1e-6)
    assert found.amin((0, 2, 3)).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "limit", "levels"),
    [("square", 60 * 60, 0.2), ("pad", 240 * 240, 1.0)],
)
@pytest.mark.parametrize(("width", "height"), [(400, 30), (30, 400), (500, 31)])
def test_the_way_without_an_intermediate_shows_the_same(
    monkeypatch, mode, limit, levels, width, height
):
    smooth = picture(6, 6).resize((width, height), Image.Resampling.BICUBIC)
    config = image_config(28, mode)
    plain = prepare(smooth, config).pixel_values
    monkeypatch.setattr(pixels_module, "MAX_INTERMEDIATE_PIXELS", limit)
    thrifty = prepare(smooth, config).pixel_values
    level = 1 / 255 / min(config.pixels.std)
    assert not torch.equal(plain, thrifty)
    assert (plain - thrifty).abs().mean() <= levels * level


def test_a_strip_does_not_fill_the_memory():
    for width, height in ((60_000, 1), (1, 60_000)):
        for aspect in ("square", "pad", "anyres"):
            strip = Image.new("RGB", (width, height), "white")  # square: 6.8 G pixels in between
            assert prepare(strip, image_config(336, aspect)).pixel_values.isfinite().all()


def test_padding_is_centred_with_the_rest_below():
    padded = np.asarray(pad_to_square(Image.new("RGB", (4, 1), "red"), (1, 2, 3)))
    rows = [row[0].tolist() for row in padded]
    assert rows == [[1, 2, 3], [255, 0, 0], [1, 2, 3], [1, 2, 3]]


def test_a_tower_of_another_size():
    with pytest.raises(ConfigError, match=r"tiles of \[\(3, 28, 28\)\].* reads 56x56"):
        prepare(picture(9, 9), image_config(28), vision_config(56))


def test_tiles_of_unequal_sizes():
    config = image_config(28, "anyres")
    pixels = replace(config.pixels, shortest_edge=30, do_resize=False, do_center_crop=False)
    with pytest.raises(ConfigError, match=r"tiles of \[\(3, 28, 28\), \(3, 30, 30\)\]"):
        prepare(picture(9, 9), replace(config, pixels=pixels))


def test_resizing_without_a_size():
    config = ImageConfig(pixels=PixelConfig(crop_size=ImageSize(28, 28)))
    with pytest.raises(ConfigError, match="do_resize but no size"):
        prepare(picture(9, 9), config)


def test_a_picture_without_pixels():
    with pytest.raises(MediaError, match="empty: 5x0 pixels"):
        prepare(Image.new("RGB", (5, 0)), image_config(28))


def test_preparing_warns_of_nothing():
    image = picture(30, 20).quantize(4)
    image.info["transparency"] = bytes([0, 10])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(image, image_config(28)).pixel_values.shape == (1, 3, 28, 28)

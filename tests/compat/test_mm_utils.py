import base64
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lapilli.compat.mm_utils import (
    divide_to_patches,
    get_anyres_image_grid_shape,
    load_image_from_base64,
    process_images,
    select_best_resolution,
    tokenizer_image_token,
)
from lapilli.compat.tower import CLIPImageProcessor
from lapilli.errors import ConfigError, MediaError

CROP = {"height": 28, "width": 28}
PINPOINTS = [(28, 56), (56, 28), (56, 56)]


@pytest.fixture
def processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=CROP)


def test_equal_tile_counts_stack_and_others_do_not(processor: CLIPImageProcessor) -> None:
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS)
    wide, square = Image.new("RGB", (60, 20)), Image.new("RGB", (60, 60))
    assert process_images([wide, wide], processor, config).shape == (2, 3, 3, 28, 28)
    mixed = process_images([wide, square], processor, config)
    assert [tuple(item.shape) for item in mixed] == [(3, 3, 28, 28), (5, 3, 28, 28)]


def test_anyres_needs_pinpoints(processor: CLIPImageProcessor, picture: Image.Image) -> None:
    config = SimpleNamespace(image_aspect_ratio="anyres")
    with pytest.raises(ConfigError, match="'anyres' but image_grid_pinpoints is empty"):
        process_images([picture], processor, config)


def test_no_pictures_are_refused(processor: CLIPImageProcessor) -> None:
    with pytest.raises(MediaError, match="the list is empty"):
        process_images([], processor, SimpleNamespace(image_aspect_ratio="pad"))


def test_a_picture_one_pixel_high_fails_as_in_the_original(
    processor: CLIPImageProcessor,
) -> None:
    with pytest.raises(MediaError, match="5x1 pixels: the original takes its only row"):
        processor(Image.new("RGB", (5, 1)), return_tensors="pt")


def test_the_processor_has_the_attributes_that_programs_read(
    processor: CLIPImageProcessor,
) -> None:
    assert processor.crop_size == CROP
    assert processor.size == {"shortest_edge": 28}
    assert len(processor.image_mean) == len(processor.image_std) == 3
    assert processor.do_normalize is True
    with pytest.raises(AttributeError, match="colour"):
        _ = processor.colour


def test_the_processor_returns_tensors_or_arrays(
    processor: CLIPImageProcessor, picture: Image.Image
) -> None:
    pixels = processor.preprocess([picture, picture], return_tensors="pt").pixel_values
    assert pixels.shape == (2, 3, 28, 28)
    arrays = processor(picture)["pixel_values"]
    assert torch.equal(torch.from_numpy(arrays[0]), pixels[0])
    half = processor(picture, return_tensors="pt").to(torch.float16)
    assert half["pixel_values"].dtype == torch.float16


@given(st.integers(1, 90), st.integers(1, 90))
def test_patches_cover_a_picture_once(width: int, height: int) -> None:
    patches = divide_to_patches(Image.new("RGB", (width, height)), 28)
    assert len(patches) == -(-width // 28) * -(-height // 28)
    assert {patch.size for patch in patches} == {(28, 28)}


@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
def test_the_best_resolution_is_one_of_the_candidates(size: tuple[int, int]) -> None:
    assert select_best_resolution(size, PINPOINTS) in PINPOINTS


def test_pinpoints_may_be_text() -> None:
    assert get_anyres_image_grid_shape((100, 50), "[[28, 56], [56, 28]]", 28) == (2, 1)
    with pytest.raises(ConfigError, match="is not a list: '28x56'"):
        get_anyres_image_grid_shape((100, 50), "28x56", 28)


def test_a_picture_in_base64(picture: Image.Image) -> None:
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    opened = load_image_from_base64(base64.b64encode(buffer.getvalue()).decode())
    assert opened.size == picture.size


def test_image_tokens_need_no_tokenizer_of_ours() -> None:
    class Words:
        bos_token_id = 1

        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[1, *(len(word) for word in text.split())])

    ids = tokenizer_image_token("one <image> three", Words(), return_tensors="pt")
    assert ids.tolist() == [1, 3, -200, 5]
    with pytest.raises(ValueError, match="expected None or 'pt'"):
        tokenizer_image_token("one", Words(), return_tensors="np")


def test_transparency_is_dropped_and_options_count() -> None:
    processor = CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    opaque = Image.new("P", (28, 28), 3)
    opaque.putpalette([0, 0, 0] * 3 + [9, 99, 200])
    clear = opaque.copy()
    clear.info["transparency"] = 3
    pixels = [processor(one, return_tensors="pt")["pixel_values"] for one in (opaque, clear)]
    assert torch.equal(*pixels)
    wide = Image.new("RGB", (200, 120), (9, 99, 200))
    options = {"do_center_crop": False, "size": {"shortest_edge": 28}, "return_tensors": "pt"}
    assert processor.preprocess(wide, **options)["pixel_values"].shape == (1, 3, 28, 46)
    raw = processor.preprocess(wide, do_rescale=False, do_normalize=False, return_tensors="pt")
    assert float(raw["pixel_values"].max()) == 200
    processor.image_mean = [0.5] * 3
    assert processor.image_mean == [0.5] * 3

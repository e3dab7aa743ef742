"""The image modality: one batch of tiles for all pictures, each as if it were alone."""

import dataclasses

import pytest
import torch
from PIL import Image

from lapilli.config.model import ImageConfig, PixelConfig, ProjectorConfig, VisionConfig
from lapilli.errors import ConfigError
from lapilli.geometry import ImageSize
from lapilli.modality.base import Modality
from lapilli.modality.image import image as module
from lapilli.modality.image.image import ImageModality

VISION = VisionConfig(
    image_size=28, patch_size=7, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2
)
PROJECTOR = ProjectorConfig(kind="mlp", vision_size=16, hidden_size=12, depth=2)
SQUARE = ImageConfig(pixels=PixelConfig(crop_size=ImageSize(28, 28), shortest_edge=28))
PINPOINTS = (ImageSize(28, 56), ImageSize(56, 28), ImageSize(56, 56))
UNPAD = dataclasses.replace(SQUARE, aspect="anyres", merge="spatial_unpad", pinpoints=PINPOINTS)


POOLED = dataclasses.replace(PROJECTOR, pool=2)
RESAMPLED = dataclasses.replace(PROJECTOR, kind="resampler", num_queries=5)


def _modality(
    image: ImageConfig, *, has_newline: bool = False, projector: ProjectorConfig = PROJECTOR
) -> ImageModality:
    torch.manual_seed(0)
    return ImageModality(image, VISION, projector, has_newline=has_newline).eval()


def _pictures() -> list[Image.Image]:
    return [Image.linear_gradient("L").convert("RGB").resize(s) for s in ((40, 90), (64, 30))]


@pytest.mark.parametrize(
    "image",
    [
        SQUARE,
        dataclasses.replace(SQUARE, aspect="pad"),
        dataclasses.replace(UNPAD, merge="flat"),
        dataclasses.replace(UNPAD, merge="spatial"),
        UNPAD,
        dataclasses.replace(UNPAD, aspect="pad"),
    ],
    ids=lambda c: f"{c.aspect}-{c.merge}",
)
@pytest.mark.parametrize("has_newline", [False, True])
def test_every_picture_has_as_many_features_as_promised(image, has_newline):
    modality = _modality(image, has_newline=has_newline)
    items = [modality.prepare(picture) for picture in _pictures()]
    with torch.no_grad():
        features = modality.embed(items)
    assert [f.shape for f in features] == [(modality.num_tokens(i), 12) for i in items]


@pytest.mark.slow
@pytest.mark.parametrize("has_newline", [False, True])
@pytest.mark.parametrize(
    ("image", "projector"),
    [
        (SQUARE, POOLED),
        (UNPAD, POOLED),
        (dataclasses.replace(UNPAD, merge="spatial"), POOLED),
        (dataclasses.replace(UNPAD, merge="flat"), POOLED),
        (SQUARE, RESAMPLED),
        (dataclasses.replace(UNPAD, merge="flat"), RESAMPLED),
    ],
)
def test_projectors_that_join_features_are_counted(image, projector, has_newline):
    modality = _modality(image, has_newline=has_newline, projector=projector)
    plain = _modality(image, has_newline=has_newline)
    items = [modality.prepare(picture) for picture in _pictures()]
    with torch.no_grad():
        features = modality.embed(items)
        alone = [modality.embed([item])[0] for item in items]
    assert [f.shape for f in features] == [(modality.num_tokens(i), 12) for i in items]
    assert all(modality.num_tokens(i) < plain.num_tokens(i) for i in items)
    torch.testing.assert_close(features, alone, atol=1e-5, rtol=1e-5)


def test_pooled_tiles_lie_in_one_map_row_by_row():
    image = dataclasses.replace(UNPAD, merge="spatial")
    modality = _modality(image, projector=POOLED)
    item = modality.prepare(Image.new("RGB", (56, 56)))  # 2x2 tiles of 2x2 features
    values = torch.arange(5 * 4, dtype=torch.float32).reshape(5, 4, 1)
    merged = modality.merge(values, item)[:, 0].tolist()
    assert merged[:8] == [0, 1, 2, 3, 4, 5, 8, 9]


def test_a_resampler_under_a_map_is_refused():
    with pytest.raises(ConfigError, match=r"resampler's 5 features have no place.*merge 'flat'"):
        _modality(UNPAD, projector=RESAMPLED)


@pytest.mark.parametrize("limit", [1, 2, 16])
def test_together_equals_alone_for_every_tile_limit(monkeypatch, limit):
    modality = _modality(UNPAD, has_newline=True)
    items = [modality.prepare(picture) for picture in _pictures()]
    with torch.no_grad():
        alone = [modality.embed([item])[0] for item in items]
        monkeypatch.setattr(module, "TILE_LIMIT", limit)
        together = modality.embed(items)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_nothing_gives_nothing():
    assert _modality(SQUARE).embed([]) == []


def test_parameter_names():
    names = set(_modality(UNPAD, has_newline=True).state_dict())
    assert {"image_newline", "projector.0.weight", "projector.2.bias"} <= names
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "image_newline" not in _modality(UNPAD).state_dict()


def test_newline_ends_rows_of_tiled_pictures_and_learns():
    modality = _modality(UNPAD, has_newline=True)
    item = modality.prepare(_pictures()[0])
    modality.embed([item])[0].sum().backward()
    rows = modality.image_newline.grad
    plain = _modality(UNPAD)
    ends = modality.num_tokens(item) - plain.num_tokens(item)
    assert ends > 0
    torch.testing.assert_close(rows, torch.full_like(rows, ends))


def test_a_picture_that_is_not_tiled_gets_no_newline():
    image = dataclasses.replace(UNPAD, aspect="pad")
    modality = _modality(image, has_newline=True)
    assert modality.num_tokens(modality.prepare(_pictures()[0])) == VISION.num_patches


def test_follows_the_protocol():
    modality = _modality(SQUARE)
    assert isinstance(modality, Modality)
    assert modality.name == "image"

"""The image modality: one batch of tiles for all pictures, each as if it were alone."""

import dataclasses

import pytest
import torch
from PIL import Image

from lapilli.config.model import ImageConfig, PixelConfig, ProjectorConfig, VisionConfig
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


def _modality(image: ImageConfig, *, has_newline: bool = False) -> ImageModality:
    torch.manual_seed(0)
    return ImageModality(image, VISION, PROJECTOR, has_newline=has_newline).eval()


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

"""The image modality: each picture as if it were alone, the tower as transformers has it."""

import dataclasses

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from lapilli.config.model import ImageConfig, PixelConfig, ProjectorConfig, VisionConfig
from lapilli.errors import ConfigError
from lapilli.geometry import ImageSize
from lapilli.modality import Modality
from lapilli.modality.image import image as module
from lapilli.modality.image.image import ImageModality, VisionTransformer

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


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("has_newline", [False, True])
def test_an_overview_is_the_first_tile_alone(merge, has_newline):
    """As the original lays out a picture of one tile: with a newline where rows end in one."""
    modality = _modality(dataclasses.replace(UNPAD, merge=merge), has_newline=has_newline)
    whole = modality.prepare(_pictures()[0])
    item = modality.overview(whole)
    assert len(whole.pixel_values) > len(item.pixel_values) == 1
    with torch.no_grad():
        [features], [base] = modality.embed([item]), modality.encode_tiles(whole.pixel_values[:1])
    ends = has_newline and merge == "spatial_unpad"
    assert len(features) == modality.num_tokens(item) == len(base) + ends
    torch.testing.assert_close(features[: len(base)], base)
    if ends:
        torch.testing.assert_close(features[-1], modality.image_newline.detach())


def test_a_picture_of_one_tile_is_its_own_overview():
    modality = _modality(SQUARE)
    item = modality.prepare(_pictures()[0])
    assert modality.overview(item) is item


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


CLIP = VisionConfig(
    image_size=28,
    patch_size=7,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
)
SIGLIP = dataclasses.replace(CLIP, family="siglip", activation="gelu_tanh", norm_eps=1e-6)

SIZES = {
    "image_size": 28,
    "patch_size": 7,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "attn_implementation": "eager",
}


def _pair(config: VisionConfig):
    torch.manual_seed(0)
    if config.family == "clip":
        act = {"quick_gelu": "quick_gelu", "gelu": "gelu"}[config.activation]
        oracle = CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act=act))
    else:
        oracle = SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False))
    oracle.eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tower = VisionTransformer(config).eval()
    state = {}
    for name, tensor in oracle.state_dict().items():
        plain = name.removeprefix("vision_model.")
        if not plain.endswith("position_ids"):
            state["vision_model." + plain] = tensor
    tower.load_state_dict(state)
    return oracle, tower


@pytest.mark.slow
@pytest.mark.parametrize("layer", [-5, -2, -1, 0, 1, 4])
@pytest.mark.parametrize(
    "config", [CLIP, dataclasses.replace(CLIP, activation="gelu"), SIGLIP], ids=str
)
def test_every_hidden_state_equals_transformers(config, layer):
    oracle, tower = _pair(dataclasses.replace(config, feature_layer=layer))
    pixels = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        expected = oracle(pixels, output_hidden_states=True).hidden_states[layer]
        found = tower(pixels)
    if config.family == "clip":
        expected = expected[:, 1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.shape == (3, tower.config.num_patches, 32)


def test_class_token_is_kept_on_request():
    patch = VisionTransformer(CLIP).eval()
    whole = VisionTransformer(dataclasses.replace(CLIP, feature_select="cls_patch")).eval()
    whole.load_state_dict(patch.state_dict())
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert whole(pixels).shape == (2, whole.config.num_patches, 32) == (2, 17, 32)
        assert torch.equal(whole(pixels)[:, 1:], patch(pixels))


def test_layers_after_the_selected_one_are_kept_but_not_computed():
    tower = VisionTransformer(dataclasses.replace(CLIP, feature_layer=2))
    assert tower.num_used_layers == 2
    names = tower.state_dict().keys()
    assert "vision_model.encoder.layers.3.mlp.fc2.bias" in names
    assert "vision_model.post_layernorm.weight" in names
    for parameter in tower.vision_model.encoder.layers[2:].parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    assert tower(torch.randn(1, 3, 28, 28)).isfinite().all()


def test_batch_equals_solo_runs():
    tower = VisionTransformer(CLIP).eval()
    pixels = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        together = tower(pixels)
        for i in range(3):
            torch.testing.assert_close(
                together[i], tower(pixels[i : i + 1])[0], atol=1e-5, rtol=1e-5
            )


def test_pixels_are_cast_to_the_dtype_of_the_weights():
    tower = VisionTransformer(CLIP).bfloat16()
    assert tower(torch.randn(1, 3, 28, 28)).dtype == torch.bfloat16


def test_gradients_reach_every_used_parameter():
    tower = VisionTransformer(dataclasses.replace(CLIP, feature_layer=-1))
    tower(torch.randn(2, 3, 28, 28)).square().mean().backward()
    without = {name for name, p in tower.named_parameters() if p.grad is None}
    assert without == {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}


@pytest.mark.parametrize("layer", [5, -6])
def test_refuses_a_hidden_state_that_does_not_exist(layer):
    with pytest.raises(ConfigError, match=f"feature_layer {layer} does not exist"):
        VisionTransformer(dataclasses.replace(CLIP, feature_layer=layer))


def test_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ConfigError, match="hidden_size 32 is not a multiple of num_heads 5"):
        VisionTransformer(dataclasses.replace(CLIP, num_heads=5))


def test_refuses_tiles_of_another_size():
    with pytest.raises(ConfigError, match="reads tiles of 28x28 pixels, found 42x28"):
        VisionTransformer(CLIP)(torch.randn(1, 3, 28, 42))

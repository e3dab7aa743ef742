"""The tower gives the hidden states of transformers' CLIP and SigLIP."""

import dataclasses

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from lapilli.config.model import VisionConfig
from lapilli.errors import ConfigError
from lapilli.modality.image.vision import VisionTransformer

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
